"""Callbacks of a training run, in transformers' form: events, state, control.

    on_init_end                      the trainer is built
    on_train_begin, on_train_end     around the whole run
    on_epoch_begin, on_epoch_end     around an epoch
    on_step_begin, on_step_end       around an optimizer step
    on_optimizer_step                after an update, while the gradients are still there
    on_log, on_evaluate, on_save     after a metrics line, an evaluation, a checkpoint

Each event gets (args, state, control, **objects). A callback asks for a log, an evaluation, a
checkpoint or the end of the run by setting `control`. Only names are compared, so callbacks that
derive from transformers' TrainerCallback work too.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minitune.config.sft_config import SFTConfig
from minitune.read_files import parse_json

# Events of transformers that a run here does not have.
ABSENT_EVENTS = {
    "on_substep_end": "micro-steps are no batches; use on_step_end",
    "on_pre_optimizer_step": "clipping and update are one kernel; use on_optimizer_step",
}


@dataclass
class TrainerState:
    """The position of a run, as callbacks see it.

    epoch: passes through the data so far, with a fraction.
    global_step, max_steps: optimizer steps done, and those of the whole run.
    num_input_tokens_seen: tokens trained on so far.
    log_history: each training record, evaluation and the final numbers, oldest first.
    sample_answers: each record of answers to sample_prompts, oldest first.
    best_metric, best_global_step: metric_for_best_model (by default the evaluation loss) of the
        best evaluation, and its step; None before an evaluation.
    best_model_checkpoint: the checkpoint of the best evaluated step, or None.
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    train_batch_size: int = 0
    num_input_tokens_seen: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    sample_answers: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False


@dataclass
class TrainerControl:
    """The wishes of callbacks; all but should_training_stop count for one step."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class TrainerCallback:
    """A base class of callbacks: each event does nothing.

    An event may return a TrainerControl, which then replaces the present one.
    """

    def on_init_end(self, args, state, control, **kwargs):
        """Run after the trainer is built."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Run before the first step."""

    def on_train_end(self, args, state, control, **kwargs):
        """Run after the last step; the adapter is saved afterwards."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Run before the first step of an epoch."""

    def on_epoch_end(self, args, state, control, **kwargs):
        """Run after the last step of an epoch."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Run before an optimizer step."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Run after an update; `.grad` still holds the gradients, before clipping."""

    def on_step_end(self, args, state, control, **kwargs):
        """Run after an optimizer step, before its log, evaluation and checkpoint."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Run after a record is written; `logs` holds it."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Run after an evaluation; `metrics` holds eval_loss, and the scores of answers."""

    def on_save(self, args, state, control, **kwargs):
        """Run after a checkpoint is written."""


class EarlyStoppingCallback(TrainerCallback):
    """The end of a run whose evaluations get no better, by metric_for_best_model."""

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0):
        """Stop after `early_stopping_patience` evaluations in a row that are not better.

        early_stopping_threshold: the metric has to improve by more than this.

        Raises: ValueError if the patience is below 1, or the threshold negative.
        """
        if early_stopping_patience < 1:
            raise ValueError(
                f"early_stopping_patience is {early_stopping_patience}; expected at least 1"
            )
        if early_stopping_threshold is None or not early_stopping_threshold >= 0:
            raise ValueError(
                f"early_stopping_threshold is {early_stopping_threshold}; expected at least 0"
            )
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Check that there are evaluations.

        Raises: ValueError if there are none.
        """
        if args.eval_strategy == "no":
            raise ValueError(
                "EarlyStoppingCallback needs evaluations; choose eval_strategy 'steps' or 'epoch'"
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Count evaluations that are not better, and ask for the end after enough of them.

        An evaluation without the metric counts for nothing.
        """
        name = args.metric_for_best_model or "loss"
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None:
            return
        best, sign = state.best_metric, 1 if args.greater_is_better else -1
        if best is None or sign * (value - best) > self.early_stopping_threshold:
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint keeps."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }


class CallbackHandler:
    """The callbacks of a trainer, in the order in which they were added."""

    def __init__(self, callbacks: Iterable[Any] = ()):
        self.callbacks: list[Any] = []
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Add a callback, or an object of a callback's class.

        Raises: ValueError if it is no callback, or waits for an event that never comes.
        """
        callback = callback() if isinstance(callback, type) else callback
        events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
        if not any(hasattr(callback, event) for event in events):
            raise ValueError(
                f"{callback!r:.80} is no callback; derive its class from TrainerCallback"
            )
        for event, remedy in ABSENT_EVENTS.items():
            method = getattr(type(callback), event, None)
            # the method of a base class of transformers does nothing
            if method is not None and not method.__qualname__.startswith("TrainerCallback."):
                raise ValueError(f"{type(callback).__name__}.{event} would never run: {remedy}")
        self.callbacks.append(callback)

    def pop(self, callback: Any) -> Any:
        """Remove a callback, or the first one of a class, and return it; None if there is none."""
        for i, present in enumerate(self.callbacks):
            if present is callback or (isinstance(callback, type) and type(present) is callback):
                return self.callbacks.pop(i)
        return None

    def call(
        self,
        event: str,
        args: SFTConfig,
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> TrainerControl:
        """Run an event of all callbacks, and return the control that the last one leaves."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                control = method(args, state, control, **objects) or control
        return control

    def states(self) -> list[dict[str, Any]]:
        """Return the name and the state of each callback that keeps one.

        Raises: ValueError if a state is not one of JSON.
        """
        states = []
        for callback in self.callbacks:
            if not callable(getattr(callback, "state", None)):
                continue
            name = type(callback).__name__
            try:
                attributes = parse_json(json.dumps(callback.state()["attributes"]))
            except (TypeError, KeyError, ValueError, RecursionError) as error:
                raise ValueError(
                    f'{name}.state() cannot be saved: {error}; return {{"args": ..., "attributes": '
                    "...} with values of JSON"
                ) from error
            states.append({"name": name, "attributes": attributes})
        return states

    def restore_(self, states: Iterable[dict[str, Any]]) -> None:
        """Set the attributes that `states` returned, in place, in callbacks of the same names."""
        left = list(states)
        for callback in self.callbacks:
            name = type(callback).__name__
            found = next((entry for entry in left if entry["name"] == name), None)
            if found is not None:
                left.remove(found)
                for attribute, value in found["attributes"].items():
                    setattr(callback, attribute, value)

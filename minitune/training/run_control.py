"""The control of a run: the state that callbacks see, their wishes, and the best evaluation."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minitune.config.sft_config import SFTConfig
from minitune.read_files import parse_json
from minitune.training.callbacks import CallbackHandler, TrainerControl, TrainerState
from minitune.training.checkpoint import REMEDY, STATE, Progress, RunSize

LOSS = "eval_loss"
# Names of a best evaluation's values in checkpoints of older versions -> the names now
OLDER_NAMES = {"loss": "value", "saved_loss": "saved_value"}


@dataclass
class BestEvaluation:
    """The best evaluation of a run, and the best one that has a checkpoint.

    metric: the name of the number that decides, such as eval_loss.
    greater_is_better: True if a greater number is better.
    value, step: of the best evaluation; None before an evaluation.
    saved_value, saved_step: of the best checkpoint; None before a checkpoint of an evaluated step.
    """

    metric: str = LOSS
    greater_is_better: bool = False
    value: float | None = None
    step: int | None = None
    saved_value: float | None = None
    saved_step: int | None = None

    @classmethod
    def of(cls, args: SFTConfig) -> "BestEvaluation":
        """Return the state before an evaluation, for the metric in the settings."""
        name = args.metric_for_best_model or LOSS
        name = name if name.startswith("eval_") else f"eval_{name}"
        return cls(name, bool(args.greater_is_better))

    def is_better(self, value: float, than: float | None) -> bool:
        """Return True if a value is better than another one, or the first one."""
        if than is None:
            return True
        return value > than if self.greater_is_better else value < than

    def add(self, step: int, value: float) -> bool:
        """Take the value of an evaluation, and return True if it is better than all before."""
        is_best = self.is_better(value, self.value)
        if is_best:
            self.value, self.step = value, step
        return is_best

    def add_checkpoint(self, step: int, value: float) -> None:
        """Take a checkpoint of a step with this value."""
        if self.is_better(value, self.saved_value):
            self.saved_value, self.saved_step = value, step

    def text(self, value: float) -> str:
        """Return the metric and a value of it: `eval_loss 0.7809`."""
        return f"{self.metric} {value:.4f}"


class RunControl:
    """The state of a run, its callbacks, and the tasks that are due after a step."""

    def __init__(self, args: SFTConfig, callbacks: Iterable[Any], objects: Callable[[], dict]):
        """Take the callbacks.

        objects: returns the keyword arguments of every event, such as the model.
        """
        self.args, self._objects = args, objects
        self.handler = CallbackHandler(callbacks)
        self.state, self.control, self.best = TrainerState(), TrainerControl(), BestEvaluation()
        self._size = RunSize(1, 1, 0)
        self._evaluated: tuple[int, float] | None = None  # step and metric of the last evaluation
        self.event("on_init_end")

    def event(self, name: str, **objects: Any) -> None:
        """Run an event of all callbacks.

        Raises: ValueError if a callback wants to end the epoch.
        """
        self.control = self.handler.call(
            name, self.args, self.state, self.control, **self._objects(), **objects
        )
        if self.control.should_epoch_stop:
            raise ValueError(
                "a callback set should_epoch_stop, but the step decides the samples; set "
                "should_training_stop, or lower num_train_epochs"
            )

    # ---- a run

    def begin(self, args: SFTConfig, size: RunSize, progress: Progress, saved: dict) -> None:
        """Start a run, or continue one.

        args: the settings, with the run folder.
        progress: the position of the run.
        saved: the content of the state.json that the run continues from; {} for a new run.

        Raises: ValueError if the saved values are broken.
        """
        self.args, self._size, self.control = args, size, TrainerControl()
        self._evaluated, self.best = None, _saved_best(saved, BestEvaluation.of(args))
        if not isinstance(saved.get("callbacks", []), list):
            raise ValueError(f"{STATE}: callbacks is {saved['callbacks']!r}; {REMEDY}")
        self.handler.restore_(saved.get("callbacks", []))
        self.state = TrainerState(
            max_steps=size.total_steps,
            num_train_epochs=math.ceil(size.total_steps / size.steps_per_epoch),
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps or args.logging_steps,
            save_steps=args.save_steps,
            train_batch_size=args.per_device_train_batch_size,
        )
        self.move_to(progress)
        self._show_best()

    def read_history(self, metrics: Path) -> None:
        """Take the records of the run that is continued from metrics.jsonl."""
        lines = metrics.read_text(encoding="utf-8").splitlines()
        records = [parse_json(line, str(metrics)) for line in lines]
        self.state.log_history = [record for record in records if "samples" not in record]
        self.state.sample_answers = [record for record in records if "samples" in record]

    def to_json(self) -> dict[str, Any]:
        """Return the values that a checkpoint keeps."""
        return {"best": asdict(self.best), "callbacks": self.handler.states()}

    def move_to(self, progress: Progress) -> None:
        """Show the position of the run in the state."""
        self.state.global_step = progress.step
        self.state.epoch = progress.step / self._size.steps_per_epoch
        self.state.num_input_tokens_seen = progress.tokens

    # ---- a step

    def begin_step(self) -> None:
        """Run the events before a step."""
        if self.state.global_step % self._size.steps_per_epoch == 0:
            self.event("on_epoch_begin")
        self.event("on_step_begin")

    def end_step(self, progress: Progress) -> None:
        """Set the tasks that are due after a step, and run its event, which may change them."""
        self.move_to(progress)
        state = self.state
        self._set_due_tasks("steps", state.logging_steps, state.eval_steps, state.save_steps)
        if progress.step == 1 and self.args.logging_first_step:
            self.control.should_log = True
        self.event("on_step_end")

    def ends_epoch(self) -> bool:
        """Return True after the last step of an epoch or of the run.

        Sets the tasks that are then due, and runs the event, which may change them.
        """
        if not self._is_due(self._size.steps_per_epoch):
            return False
        self._set_due_tasks("epoch", *[self._size.steps_per_epoch] * 3)
        self.event("on_epoch_end")
        return True

    def _set_due_tasks(self, strategy: str, logging: int, evaluation: int, saving: int) -> None:
        """Set the tasks of a strategy that are due; the numbers are their intervals in steps."""
        args, control = self.args, self.control
        control.should_log = args.logging_strategy == strategy and self._is_due(logging)
        control.should_evaluate = args.eval_strategy == strategy and self._is_due(evaluation)
        control.should_save = args.save_strategy == strategy and self._is_due(saving)

    def _is_due(self, interval: int) -> bool:
        """Return True after every `interval` steps and after the last step."""
        step = self.state.global_step
        return step % interval == 0 or step == self._size.total_steps

    # ---- results

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the history, and run its event; sample answers have no event."""
        if "samples" in record:
            self.state.sample_answers.append(record)
            return
        self.state.log_history.append(dict(record))
        self.event("on_log", logs=dict(record))
        self.control.should_log = False

    def is_best(self, metrics: dict[str, Any]) -> bool:
        """Return True if an evaluation is the best so far."""
        value = metrics.get(self.best.metric)
        return value is not None and self.best.is_better(value, self.best.value)

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Take the numbers of an evaluation of the run, and run its event.

        An evaluation without the metric of the best one, because no answers were scored, is never
        the best.
        """
        step, value = self.state.global_step, metrics.get(self.best.metric)
        self.event("on_evaluate", metrics=metrics)
        self.control.should_evaluate = False
        self._evaluated = None if value is None else (step, value)
        is_best = value is not None and self.best.add(step, value)
        if self.args.save_strategy == "best":
            self.control.should_save = is_best
        self._show_best()

    def saving(self) -> None:
        """Note that a checkpoint of the present step is about to be written."""
        step = self.state.global_step
        if self._evaluated is not None and self._evaluated[0] == step:
            self.best.add_checkpoint(step, self._evaluated[1])
        self._show_best()

    def saved(self) -> None:
        """Run the event of a checkpoint."""
        self.event("on_save")
        self.control.should_save = False

    @property
    def is_logged(self) -> bool:
        """True if the losses of the present step are in the history."""
        step = self.state.global_step
        return any(
            record["step"] == step and "loss" in record for record in self.state.log_history[-3:]
        )

    @property
    def kept_step(self) -> int | None:
        """The step of the checkpoint that save_total_limit keeps, or None."""
        return None if self.args.metric_for_best_model is None else self.best.saved_step

    def _show_best(self) -> None:
        """Show the best evaluation in the state."""
        self.state.best_metric, self.state.best_global_step = self.best.value, self.best.step
        self.state.best_model_checkpoint = None
        if self.best.saved_step is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.best.saved_step}"
            self.state.best_model_checkpoint = str(folder)


def _saved_best(saved: dict[str, Any], fresh: BestEvaluation) -> BestEvaluation:
    """Return the best evaluation that a state.json holds.

    fresh: the state before an evaluation; returned if none is saved, or one of another metric.

    Raises: ValueError if a value is of another type.
    """
    best = saved.get("best", {})  # checkpoints of older versions have none
    if isinstance(best, dict):
        best = {OLDER_NAMES.get(name, name): value for name, value in best.items()}
    names = {item.name for item in fields(BestEvaluation)}
    if not isinstance(best, dict) or not names.issuperset(best):
        raise ValueError(f"{STATE}: best is {best!r}; {REMEDY}")
    found = BestEvaluation(**best) if best else fresh
    for name in ("value", "step", "saved_value", "saved_step"):
        value = getattr(found, name)
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{STATE}: best.{name} is {value!r}; {REMEDY}")
    is_same = (found.metric, found.greater_is_better) == (fresh.metric, fresh.greater_is_better)
    return found if is_same else fresh

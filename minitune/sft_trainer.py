"""The trainer of the public door, under TRL's and Unsloth's names."""

from pathlib import Path
from typing import Any

from minitune.checkpoints.adapter import save_adapter
from minitune.data.sources.sources import Dataset
from minitune.data.templates.adapter_template import save_template
from minitune.training.callbacks import TrainerControl, TrainerState
from minitune.training.run_folder import ADAPTER
from minitune.training.trainer import Trainer


class SFTTrainer(Trainer):
    """A training run of a model's adapter. The arguments have TRL's names and meanings."""

    @property
    def state(self) -> TrainerState:
        """The position and the history of the run."""
        return self.run_control.state

    @property
    def control(self) -> TrainerControl:
        """The wishes of the callbacks."""
        return self.run_control.control

    def add_callback(self, callback: Any) -> None:
        """Add a callback, an object or a class.

        Raises: ValueError if it is none.
        """
        self.run_control.handler.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first one of a class."""
        self.run_control.handler.pop(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first one of a class, and return it; None if there is none."""
        return self.run_control.handler.pop(callback)

    def evaluate(
        self, eval_dataset: Dataset | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss of the evaluation data, a mean over its trained-on tokens, and its speed.

        eval_dataset: data in place of that of the trainer.
        metric_key_prefix: first word of the names; the callbacks always get "eval".

        Raises: ValueError if there is no evaluation data.
        """
        metrics = {**self._evaluation(eval_dataset), "epoch": self.state.epoch}
        self.run_control.log({"step": self.state.global_step, **metrics})
        self.run_control.event("on_evaluate", metrics=metrics)
        return {
            f"{metric_key_prefix}{name[4:]}" if name.startswith("eval_") else name: value
            for name, value in metrics.items()
        }

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the adapter, and the chat template if one was assigned.

        output_dir: default: adapter in the run folder.

        Raises: ValueError if there is no run folder yet, or the folder cannot be written.
        """
        if output_dir is None:
            if self._run is None:
                raise ValueError(
                    "there is no run folder before train(); pass a folder to save_model"
                )
            output_dir = self.output / ADAPTER
        save_adapter(self.model, output_dir)
        save_template(self.processing_class, Path(output_dir))

"""A callback that writes the metrics of a run for TensorBoard."""

import importlib
from pathlib import Path

from minitune.training.callbacks import TrainerCallback
from minitune.training.own_files import TENSORBOARD, add_outputs, check_free


class TensorBoardCallback(TrainerCallback):
    """Writes each number of a record as a scalar: train/loss, eval/loss and so on.

    The files are in logging_dir, or in OUTPUT/tensorboard.
    """

    def __init__(self):
        """Find TensorBoard's writer.

        Raises: ValueError if the package tensorboard is not installed.
        """
        try:
            self._new_writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError:
            raise ValueError(
                "report_to 'tensorboard' needs the package tensorboard; run `pip install "
                "tensorboard`, or choose report_to 'none': metrics.jsonl holds every number"
            ) from None
        self._writer = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the files."""
        folder = args.logging_dir
        if folder is None:
            folder = str(Path(args.output_dir) / TENSORBOARD)
        if args.logging_dir is None:
            check_free(Path(args.output_dir), [TENSORBOARD])
            add_outputs(Path(args.output_dir), [TENSORBOARD])
        self._writer = self._new_writer(log_dir=folder)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the numbers of a record."""
        if self._writer is None:  # an evaluation outside of a run
            return
        for name, value in logs.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._writer.add_scalar(_scalar_name(name), value, state.global_step)
        self._writer.flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Close the files."""
        self._writer.close()
        self._writer = None


def _scalar_name(name: str) -> str:
    """Return the name of a number in transformers' groups, such as eval/loss."""
    for group in ("eval", "train"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return f"train/{name}"

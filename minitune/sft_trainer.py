"""The trainer of the public door, under TRL's and Unsloth's names."""

from minitune.training.trainer import Trainer


class SFTTrainer(Trainer):
    """A training run of a model's adapter. The arguments have TRL's names and meanings."""

"""Checkpoints of a run: everything that a resumed run needs to continue with the same bits.

    checkpoint-N/
      adapter_config.json, adapter_model.safetensors   the adapter (checkpoints/adapter.py)
      optimizer.safetensors                            the optimizer's moments
      state.json                                       progress, identity, plan inputs (resume.py)

The order of the samples follows from seed and step, so no other state exists.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitune.atomic_files import atomic_folder, write_json
from minitune.checkpoints.adapter import load_adapter_values, write_adapter_files
from minitune.checkpoints.finite_check import FiniteCheck
from minitune.checkpoints.safetensors_folder import read_safetensors
from minitune.config.numbers import check_number, number, shown, whole
from minitune.model.causal_lm import CausalLM
from minitune.read_files import read_json
from minitune.training.loss_scale import LossScale
from minitune.training.optimizer import FlatAdamW

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
REMEDY = "resume from another checkpoint"
MAX_STATE_BYTES = 256 << 20  # callbacks and steps that are not logged yet add to it
LOSSES = number(-1e300, 1e300)
PROGRESS = {  # the bounds of the numbers that a run continues from
    "step": whole(),
    "tokens": whole(0, 1 << 62),
    "seconds": number(0, 1e12),
    "loss_sum": LOSSES,
    "grad_norm": number(0, 1e300),
}
STEPS = whole()
MOMENT_DTYPES = (torch.float32, torch.uint8)
NEVER_NEGATIVE = ("exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


@dataclass(frozen=True)
class RunSize:
    """The length of a run.

    units_per_step: samples, or with packing rows, of one optimizer step.
    steps_per_epoch: optimizer steps of one pass through the data.
    total_steps: optimizer steps of the whole run.
    """

    units_per_step: int
    steps_per_epoch: int
    total_steps: int


@dataclass
class Progress:
    """The position of a run; every checkpoint saves it.

    step: optimizer steps done.
    tokens: tokens trained on so far, with those that carry no label.
    seconds: time spent so far.
    loss_sum: sum of the losses of all steps.
    grad_norm: gradient norm of the last step, before clipping.
    unlogged: losses of the steps since the last metrics line.
    loss_scale: the scale of a run in float16, otherwise None.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    grad_norm: float = 0.0
    unlogged: list[float] = field(default_factory=list)
    loss_scale: LossScale | None = None

    @classmethod
    def from_state(cls, values: dict[str, Any], source: Path) -> "Progress":
        """Return the progress that a checkpoint's state holds.

        source: the file that errors name.

        Raises: ValueError if a value is missing, of another type or out of its bounds.
        """
        try:
            for name, bounds in PROGRESS.items():
                check_number(name, values.get(name), bounds)
            losses = values.get("unlogged")
            if not isinstance(losses, list):
                raise ValueError(f"unlogged is {shown(losses)}; expected a list of losses")
            for loss in losses:
                check_number("unlogged", loss, LOSSES)
            # Checkpoints of older versions have no scale.
            scale = LossScale.from_state(values.get("loss_scale"))
        except ValueError as error:
            raise ValueError(f"{source}: {error}; {REMEDY}") from None
        numbers = {name: values[name] for name in PROGRESS}
        return cls(**numbers, unlogged=losses, loss_scale=scale)


def save_checkpoint(
    model: CausalLM, optimizer: FlatAdamW, state: dict[str, Any], folder: str | Path
) -> None:
    """Write a checkpoint folder.

    state: everything that resuming needs beside adapter and optimizer, as JSON values.

    Raises: ValueError if the folder cannot be written.
    """
    with atomic_folder(folder) as partial:
        write_adapter_files(model, partial)
        moments = {name: tensor.cpu() for name, tensor in optimizer.state_dict().items()}
        save_file(moments, partial / OPTIMIZER)
        counts = {"optimizer_steps": optimizer.steps, "frozen": _frozen_parameters(model)}
        write_json(partial / STATE, {**state, **counts})


def read_state(folder: str | Path, **required: type) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json.

    required: keys that must be there, and the types of their values.

    Raises: ValueError if the file is missing or broken, or lacks a required key.
    """
    path = Path(folder) / STATE
    hint = f"a checkpoint to resume from holds {STATE} and {OPTIMIZER}"
    try:
        # A callback may keep an infinite value.
        state = read_json(path, hint=hint, finite=False, max_bytes=MAX_STATE_BYTES)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    for name, expected in {"optimizer_steps": int, **required}.items():
        if not isinstance(state.get(name), expected):
            found = f"is {shown(state[name])}" if name in state else "is missing"
            raise ValueError(f"{path}: {name} {found}; {REMEDY}")
    if not STEPS.hold(steps := state["optimizer_steps"]):
        raise ValueError(f"{path}: optimizer_steps is {shown(steps)}; expected {STEPS}; {REMEDY}")
    return state


def load_checkpoint(model: CausalLM, optimizer: FlatAdamW, folder: str | Path) -> dict[str, Any]:
    """Load adapter and optimizer in place, and return the checkpoint's state.

    Raises: ValueError that names the file or the setting that does not fit.
    """
    state, path = read_state(folder), Path(folder) / OPTIMIZER
    _check_frozen(model, state.get("frozen", []), Path(folder) / STATE)
    try:
        moments = read_safetensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    _check_moments(moments, path)
    load_adapter_values(model, folder)
    optimizer.load_state_dict(moments, state["optimizer_steps"])
    return state


def _frozen_parameters(model: CausalLM) -> list[str]:
    """Return the names of the adapter's parameters that requires_grad_(False) froze."""
    return [name for name, p in model.adapter_parameters() if not p.requires_grad]


def _check_frozen(model: CausalLM, saved: Any, path: Path) -> None:
    """Check that the run froze the parameters that are frozen now.

    saved: their names in a checkpoint's state. path: the file that the error names.

    Raises: ValueError if a parameter was frozen and is not, or the other way round.
    """
    frozen = _frozen_parameters(model)
    if saved != frozen:
        names = {*map(str, saved if isinstance(saved, list) else [])} ^ {*frozen}
        raise ValueError(
            f"{path}: the run froze other parameters than the model has frozen now "
            f"({min(names, default=saved)!r} differs); set requires_grad of the adapter's "
            "parameters as the run had it, or start again with overwrite=True"
        )


def _check_moments(moments: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError if a moment is not finite, negative, or of another dtype.

    path: the file that errors name.
    """
    finite = FiniteCheck()
    for name, values in moments.items():
        if values.dtype not in MOMENT_DTYPES:
            raise ValueError(f"{path}: {name} is {values.dtype}; expected float32 or uint8")
        if values.is_floating_point() and values.numel():
            finite.add(name, values)
            if name in NEVER_NEGATIVE and values.amin() < 0:
                raise ValueError(f"{path}: {name} holds a negative value; {REMEDY}")
    finite.require(lambda name, text: ValueError(f"{path}: {name} {text}"), REMEDY)

"""Checkpoints of a run: everything that a resumed run needs to continue with the same bits.

    checkpoint-N/
      adapter_config.json, adapter_model.safetensors   the adapter (checkpoints/adapter.py)
      optimizer.safetensors                            the optimizer's moments
      state.json                                       progress, identity, plan inputs (resume.py)

The order of the samples follows from seed and step, so no other state exists.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from minitune.atomic_files import atomic_folder, write_json
from minitune.checkpoints.adapter import load_adapter_values, write_adapter_files
from minitune.checkpoints.safetensors_folder import read_safetensors
from minitune.model.causal_lm import CausalLM
from minitune.read_files import read_json
from minitune.training.optimizer import FlatAdamW

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
REMEDY = "resume from another checkpoint"


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
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    grad_norm: float = 0.0
    unlogged: list[float] = field(default_factory=list)

    @classmethod
    def from_state(cls, values: dict[str, Any], source: Path) -> "Progress":
        """Return the progress that a checkpoint's state holds.

        source: the file that errors name.

        Raises: ValueError if a value is missing or of another type.
        """
        default = cls()
        for item in fields(cls):
            value, expected = values.get(item.name), type(getattr(default, item.name))
            if not isinstance(value, (int, float) if expected is float else expected):
                raise ValueError(f"{source}: {item.name} is {value!r}; {REMEDY}")
        return cls(**{item.name: values[item.name] for item in fields(cls)})


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
    state = read_json(path, hint=hint, finite=False)  # a callback may keep an infinite value
    for name, expected in {"optimizer_steps": int, **required}.items():
        if not isinstance(state.get(name), expected):
            found = f"is {state[name]!r}" if name in state else "is missing"
            raise ValueError(f"{path}: {name} {found}; {REMEDY}")
    return state


def load_checkpoint(model: CausalLM, optimizer: FlatAdamW, folder: str | Path) -> dict[str, Any]:
    """Load adapter and optimizer in place, and return the checkpoint's state.

    Raises: ValueError that names the file or the setting that does not fit.
    """
    state, path = read_state(folder), Path(folder) / OPTIMIZER
    _check_frozen(model, state.get("frozen", []), Path(folder) / STATE)
    moments = read_safetensors(path)
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

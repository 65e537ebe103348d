"""TODO docstring."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minitune.atomic_files import atomic_folder
from minitune.checkpoints.adapter import write_adapter_files, load_adapter
from minitune.model.causal_lm import CausalLM
from minitune.training.optimizer import FlatAdamW

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def save_checkpoint(
    model: CausalLM, optimizer: FlatAdamW, state: dict[str, Any], folder: str | Path
) -> None:
    """Write checkpoint `folder`: adapter, optimizer moments, and `state` (JSON) with the optimizer's step count."""
    with atomic_folder(folder) as partial:
        write_adapter_files(model, partial)
        save_file(
            {name: t.cpu() for name, t in optimizer.state_dict().items()}, partial / OPTIMIZER
        )
        (partial / STATE).write_text(
            json.dumps({**state, "optimizer_steps": optimizer.steps}, indent=2) + "\n"
        )


def read_state(folder: str | Path, **needed: type) -> dict[str, Any]:
    """A checkpoint's state.json. ValueError where it is missing or broken, or lacks what is `needed` (name: type)."""
    path = Path(folder) / STATE
    try:
        state = json.loads(path.read_text())
    except OSError:
        raise ValueError(
            f"{path}: not found; a checkpoint to resume from holds {STATE} and {OPTIMIZER}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path}: holds a {type(state).__name__}; expected an object with a checkpoint's state"
        )
    for name, kind in {"optimizer_steps": int, **needed}.items():
        if not isinstance(state.get(name), kind):
            words = f"is {state[name]!r}" if name in state else "is missing"
            raise ValueError(f"{path}: {name} {words}; resume from another checkpoint")
    return state


def load_checkpoint(model: CausalLM, optimizer: FlatAdamW, folder: str | Path) -> dict[str, Any]:
    """Put adapter and optimizer back as they were saved, and return the state. ValueError names what does not fit."""
    state, path = read_state(folder), Path(folder) / OPTIMIZER
    try:
        moments = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: not found, truncated, or not a safetensors file ({error})"
        ) from None
    load_adapter(model, folder)
    optimizer.load_state_dict(moments, state["optimizer_steps"])
    return state

"""A PEFT model with bitsandbytes' linears as a System."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from referees.systems import NF4_PARTS, System

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peft_system(model: Any, nf4: dict[str, Tensor], autocast: bool) -> System:
    """Return the system of a PEFT model.

    nf4: the quantised tensors, as `nf4_of_bitsandbytes` returns them.
    autocast: compute in bf16 under autocast.
    """
    model.train()
    model.config.use_cache = False
    parameters = {_checkpoint_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    for p in parameters.values():
        p.data = p.data.float()

    def loss(ids: Tensor) -> Tensor:
        ids = ids.to(DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids).loss

    return System(model, parameters, nf4, loss)


def nf4_of_bitsandbytes(model: Any) -> dict[str, Tensor]:
    """Return the quantised tensors of a model, under the names of the checkpoint."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            parts = (module.weight.data, state.absmax, state.state2.absmax, state.offset)
            for part, t in zip(NF4_PARTS, parts, strict=True):
                found[f"{_checkpoint_name(name)}.{part}"] = t
    return found


def _checkpoint_name(name: str) -> str:
    """Return the checkpoint's name of one of PEFT's names."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "").replace(".default.", ".")

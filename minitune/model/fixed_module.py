"""Modules that only hold parameters: the hand-written passes read these, and call no module.

Without this class, two calls of PyTorch's would be without effect, or wrong in silence:

- A hook would never run, because the linears of a layer run fused, and norms inside other kernels.
- `half()` or `to()` of a part would change its numbers behind the back of buffers and kernels.
"""

from typing import Any

from torch import nn


class FixedModule(nn.Module):
    """A module that stays on its device and in its dtype."""

    def _apply(self, fn, recurse=True):
        raise ValueError(
            "the model stays on its device and in its dtype; "
            "choose both with from_pretrained(device=..., dtype=...)"
        )


class UnhookedModule(FixedModule):
    """A fixed module whose hooks would never run."""

    def _refuse_hook(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"a hook of {type(self).__name__} would never run, because a decoder layer is one "
            "hand-written pass; hook the layer, model.model.layers[i], or the model in a training "
            "loop of your own"
        )

    register_forward_pre_hook = register_forward_hook = _refuse_hook
    register_full_backward_pre_hook = register_full_backward_hook = _refuse_hook
    register_backward_hook = _refuse_hook


class NamedLinear(UnhookedModule, nn.Linear):
    """A linear that gives a weight its name; no pass calls it."""

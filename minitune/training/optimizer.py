"""AdamW over one flat buffer that holds every LoRA parameter, and the learning-rate schedules.

An adapter has hundreds of small matrices. Here they are slices of one float32 vector `values` (P,),
and their gradients are slices of one vector `grads` (P,). An update is three launches over P
numbers instead of three a matrix: two for the gradient norm, one that clips and updates
(kernels/adamw.py). Clearing the gradients is one launch. Several processes could sum their
gradients by one all-reduce of `grads`.

Bytes a parameter:

    value                    4
    gradient                 4
    moments m, v, float32    8
    moments m, v, 8 bits     2 + 8/256: a byte each, and a float32 scale each for a block of 256

An 8B model with r=16 on all seven linears has 42 million trainable parameters: 671 MB with float32
moments, 421 MB with 8-bit moments.

8-bit moments have the format and the formula of bitsandbytes, with these differences:

- Blocks are cut from the flat buffer, so a block may hold numbers of two parameters. The smaller
  moments are then rounded more coarsely. This cannot happen if the size of each parameter is a
  multiple of 256, as for rank 16 and widths that are multiples of 16.
- All parameters have 8-bit moments. bitsandbytes keeps 32 bits for those below 4096 elements.
- A gradient that is not finite is not skipped.
- Weight decay comes before the update, as in torch.

Nothing here waits for the device: the gradient norm stays a tensor.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from minitune.config.training_config import SCHEDULES
from minitune.kernels.adamw import MOMENT_BLOCKSIZE, adamw_, adamw_8bit_
from minitune.kernels.backend import cdiv
from minitune.kernels.global_norm import global_norm
from minitune.model.nf4 import dynamic_map

NEGATIVE_VALUE_NEXT_TO_ZERO = 126  # its index in the signed dynamic map
INVERSE_SQRT_TIMESCALE = 10_000  # steps, of a run without warm-up; the value of transformers


@cache
def moment_tables(device: torch.device) -> Tensor:
    """Return the tables that adamw_8bit_ reads, float32 (4, 256).

    Their rows are the signed dynamic map, the borders between its values, the unsigned map, and its
    borders. A border lies half way between two values, except for one. Between 0 and the negative
    value next to it the border is 0, so that a negative m stays negative, as in bitsandbytes' CUDA
    kernel. A positive m may become 0. The last border is infinite.
    """
    signed, unsigned = dynamic_map(device), dynamic_map(device, signed=False)
    signed_borders, unsigned_borders = _borders(signed), _borders(unsigned)
    # Not 0 itself: m = 0 must lie above this border.
    signed_borders[NEGATIVE_VALUE_NEXT_TO_ZERO] = -torch.finfo(torch.float32).tiny
    return torch.stack([signed, signed_borders, unsigned, unsigned_borders])


def _borders(values: Tensor) -> Tensor:
    """Return the numbers half way between ascending values (256,), with infinity as the last."""
    return torch.cat([(values[:-1] + values[1:]) / 2, values.new_tensor([math.inf])])


class FlatAdamW:
    """AdamW as in torch.optim, with the global-norm clipping of clip_grad_norm_ in `step`.

    The parameters stay ordinary parameters: `p.data` and `p.grad` are views of the flat buffers.
    Writing into them in place takes effect at once. If a `.data` or `.grad` was replaced, the next
    step copies it into the flat buffer and binds the view again. A `.grad` of None counts as zero.
    Clipping does not change the gradients.
    """

    @torch.inference_mode(False)  # else the buffers could not be updated outside of it
    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        eight_bit: bool = False,
    ):
        """Move the parameters into one flat buffer, except those that are frozen.

        max_grad_norm: limit of the global gradient norm; 0 turns clipping off.
        eight_bit: True stores the moments in 8 bits.

        Raises: ValueError if no parameter requires a gradient, or if a parameter is not float32.
        """
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "no parameters to train; attach an adapter with FastLanguageModel.get_peft_model, "
                "or unfreeze it with requires_grad_(True)"
            )
        if wrong := [p.dtype for p in self.parameters if p.dtype != torch.float32]:
            raise ValueError(
                f"a LoRA parameter is {wrong[0]}; the optimizer keeps its values in torch.float32"
            )
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.eight_bit = eight_bit
        self.steps = 0
        count = sum(p.numel() for p in self.parameters)
        device = self.parameters[0].device
        self.values, self.grads = torch.zeros(2, count, device=device, dtype=torch.float32)
        moment_dtype = torch.uint8 if eight_bit else torch.float32
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, count, device=device, dtype=moment_dtype)
        if eight_bit:
            blocks = cdiv(count, MOMENT_BLOCKSIZE)
            self.exp_avg_absmax, self.exp_avg_sq_absmax = torch.zeros(2, blocks, device=device)
            self._tables = moment_tables(self.values.device)
        self._value_views = self._views(self.values)
        self._grad_views = self._views(self.grads)
        self._bind()

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Return the slice of each parameter in a flat buffer (P,), in the parameter's shape."""
        slices = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(slices, self.parameters, strict=True)]

    @torch.no_grad()
    def _bind(self) -> None:
        """Make each value and gradient a view of the flat buffers; copy those that are not."""
        views = zip(self.parameters, self._value_views, self._grad_views, strict=True)
        for p, value, grad in views:
            if p.data_ptr() != value.data_ptr():
                value.copy_(p)
                p.data = value
            if p.grad is None:
                grad.zero_()
                p.grad = grad
            elif p.grad.data_ptr() != grad.data_ptr():
                grad.copy_(p.grad)
                p.grad = grad

    def zero_grad(self) -> None:
        """Clear all gradients; they stay views of the flat buffer."""
        self.grads.zero_()
        for p, grad in zip(self.parameters, self._grad_views, strict=True):
            p.grad = grad

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients, 0-dim."""
        self._bind()
        with torch.cuda.device_of(self.values):  # Triton launches on the current device
            return global_norm(self.grads)

    @torch.no_grad()
    def step(self, lr: float | Tensor, norm: Tensor | None = None) -> Tensor:
        """Update all parameters once and return the gradient norm before clipping, 0-dim.

        lr: learning rate, a number or a 0-dim tensor on the CPU.
        norm: `gradient_norm()` of the present gradients; None computes it.
        """
        if norm is None:
            norm = self.gradient_norm()
        self.steps += 1
        settings = {
            "lr": float(lr),
            "step": self.steps,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }
        torch.autograd.graph.increment_version(self.parameters)  # so that autograd notices
        with torch.cuda.device_of(self.values):
            moments = self.state_dict().values()
            if self.eight_bit:
                adamw_8bit_(self.values, self.grads, *moments, self._tables, norm, **settings)
            else:
                adamw_(self.values, self.grads, *moments, norm, **settings)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments: two tensors (P,) float32, or 8-bit codes and their scales.

        Codes are (P,) uint8, scales (P / 256, rounded up) float32. The values of the parameters are
        saved with the adapter, and `steps` is a plain number.
        """
        state = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.eight_bit:
            state["exp_avg_absmax"] = self.exp_avg_absmax
            state["exp_avg_sq_absmax"] = self.exp_avg_sq_absmax
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from a `state_dict()` that was saved after `steps` updates.

        Raises: ValueError if a size differs or the moments are of the other kind. Nothing has
            changed then.
        """
        if "exp_avg" in state and (state["exp_avg"].dtype == torch.uint8) != self.eight_bit:
            saved, optim = "8 bits", "adamw_8bit"
            if self.eight_bit:
                saved, optim = "float32", "adamw_torch"
            raise ValueError(
                f"the saved moments are in {saved}; continue with optim {optim!r}, as the run began"
            )
        moments = self.state_dict()
        for name, moment in moments.items():
            if name not in state or state[name].shape != moment.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(
                    f"optimizer state {name!r} is {found}; this adapter needs {tuple(moment.shape)}"
                )
        for name, moment in moments.items():
            moment.copy_(state[name])
        self.steps = steps


def warmup_count(warmup_steps: float, warmup_ratio: float, total_steps: int) -> int:
    """Return the number of warm-up steps.

    warmup_steps: a number of steps; below 1 a share of all steps; 0 leaves it to warmup_ratio.
    warmup_ratio: a share of all steps.
    """
    if warmup_steps >= 1:
        return int(warmup_steps)
    return math.ceil(total_steps * (warmup_steps or warmup_ratio))


def learning_rate_factor(
    kind: str, step: int, warmup: int, total_steps: int, cycles: int = 1
) -> float:
    """Return the factor of the peak rate in update `step`, as in transformers' get_scheduler.

    The factor rises linearly from 0 over `warmup` steps, except for `constant`. Then

    - `linear` falls to 0 at total_steps;
    - `cosine` follows half a wave down to 0;
    - `cosine_with_restarts` follows `cycles` half waves, each from 1 down to 0;
    - `inverse_sqrt` falls as the root of warmup / step; without warm-up it falls as the root of
      10,000 / (10,000 + step);
    - `constant_with_warmup` stays.

    step: number of the update, from 0.

    Raises: ValueError if `kind` is not known.
    """
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant_with_warmup":
        return 1.0
    decay_steps = max(1, total_steps - warmup)
    if kind == "linear":
        return max(0.0, (total_steps - step) / decay_steps)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / decay_steps)))
    if kind == "cosine_with_restarts":
        progress = (step - warmup) / decay_steps
        phase = cycles * progress % 1.0 if progress < 1 else 1.0
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * phase)))
    if kind == "inverse_sqrt":
        timescale = warmup or INVERSE_SQRT_TIMESCALE
        return 1.0 / math.sqrt((step + timescale - warmup) / timescale)
    raise ValueError(f"lr_scheduler_type {kind!r} is not known; choose {', '.join(SCHEDULES)}")

"""AdamW over one flat buffer that holds every LoRA parameter, and the learning-rate schedules.

An adapter is hundreds of small matrices. Here they are slices of one float32 vector `values` (P,), and their gradients
slices of one vector `grads` (P,): the optimizer is then three launches over P numbers (two for the norm, one that clips
and updates, kernels/adamw.py) instead of as many a matrix, clearing the gradients is one, and gradients of several
processes would be summed by one all-reduce of `grads`.

Bytes a parameter: values 4, gradient 4, and the moments m and v: 8 in float32, or with `eight_bit` 2 + 8/256, a byte
each and a float32 scale each for every block of 256. For 8B with all seven linears and r=16, 42 million parameters,
that is 671 MB or 421 MB.

Blocks are cut from the flat buffer. Where every parameter's size is a multiple of 256, as for rank 16 with widths that
are multiples of 16, a block never holds numbers of two parameters; elsewhere, in toy models, some do, and then the
smaller parameter's moments are rounded more coarsely. bitsandbytes keeps parameters of less than 4096 elements in 32
bits; here all of them are in 8. Otherwise format and formula are its own, but that a gradient that is not finite is not
skipped, and that weight decay comes before the update, as in torch.

Nothing here waits for the device: the gradient norm stays a tensor.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from minitune.kernels.adamw import MOMENT_BLOCKSIZE, adamw_, adamw_8bit_, global_norm
from minitune.model.nf4 import dynamic_map


@cache
def moment_tables(device: torch.device) -> Tensor:
    """What adamw_8bit_ looks up, fp32 (4, 256): the signed map, the borders between its values, the same unsigned.

    A border is half way, but for one: between 0 and the negative value next to it the border is at 0, so that a
    negative m stays negative, as bitsandbytes' CUDA kernel makes sure; a positive one may become 0. The last border is
    infinite.
    """
    rows = []
    for values in (dynamic_map(device), dynamic_map(device, signed=False)):
        rows += [values, torch.cat([(values[:-1] + values[1:]) / 2, values.new_tensor([math.inf])])]
    rows[1][126] = -torch.finfo(torch.float32).tiny  # not 0 itself: 0 is above the border
    return torch.stack(rows)


class FlatAdamW:
    """AdamW as in torch.optim, with the global-norm clipping of clip_grad_norm_ inside `step`.

    The parameters stay ordinary parameters: `p.data` and `p.grad` are views of the flat buffers. Writing into them in
    place counts at once; a `.data` or `.grad` that someone replaced is taken over, and bound again, by the next step.
    A `.grad` of None counts as zero. Clipping leaves the gradients as they are.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        eight_bit: bool = False,
    ):
        """max_grad_norm 0 turns clipping off. ValueError where there is no parameter, or one is not float32."""
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError(
                "no parameters to train; attach an adapter with FastLanguageModel.get_peft_model first"
            )
        if wrong := [p.dtype for p in self.parameters if p.dtype != torch.float32]:
            raise ValueError(
                f"a LoRA parameter is {wrong[0]}; the optimizer keeps its values in torch.float32"
            )
        self.betas, self.eps, self.weight_decay, self.max_grad_norm = (
            betas,
            eps,
            weight_decay,
            max_grad_norm,
        )
        self.eight_bit, self.steps = eight_bit, 0
        count, device = sum(p.numel() for p in self.parameters), self.parameters[0].device
        self.values, self.grads = torch.zeros(2, count, device=device)
        self.exp_avg, self.exp_avg_sq = torch.zeros(
            2, count, device=device, dtype=torch.uint8 if eight_bit else None
        )
        if eight_bit:
            self.exp_avg_absmax, self.exp_avg_sq_absmax = torch.zeros(
                2, -(-count // MOMENT_BLOCKSIZE), device=device
            )
            self._tables = moment_tables(self.values.device)
        self._value_views, self._grad_views = self._views(self.values), self._views(self.grads)
        self._bind()

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def _bind(self) -> None:
        """Make every parameter and gradient a view of the flat buffers, taking over what is there and is not one."""
        for p, value, grad in zip(
            self.parameters, self._value_views, self._grad_views, strict=True
        ):
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
    def step(self, lr: float | Tensor) -> Tensor:
        """One update at rate `lr`, a number or 0-dim tensor on the CPU. Returns the norm before clipping, 0-dim."""
        self._bind()
        self.steps += 1
        settings = {
            "lr": float(lr),
            "step": self.steps,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }
        with torch.cuda.device_of(self.values):  # Triton launches on the current device
            norm = global_norm(self.grads)
            moments = self.state_dict().values()
            if self.eight_bit:
                adamw_8bit_(self.values, self.grads, *moments, self._tables, norm, **settings)
            else:
                adamw_(self.values, self.grads, *moments, norm, **settings)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """The moments: (P,) float32 each, or (P,) uint8 codes and (P / 256, rounded up) float32 scales each.

        The parameters' own values are the adapter's, and `steps` a plain number.
        """
        state = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.eight_bit:
            state |= {
                "exp_avg_absmax": self.exp_avg_absmax,
                "exp_avg_sq_absmax": self.exp_avg_sq_absmax,
            }
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from `state_dict()` as it was after `steps` updates.

        ValueError where the sizes differ, or the state has moments of the other kind; nothing has changed then.
        """
        mine = self.state_dict()
        if "exp_avg" in state and (state["exp_avg"].dtype == torch.uint8) != self.eight_bit:
            saved, optim = (
                ("float32", "adamw_torch") if self.eight_bit else ("8 bits", "adamw_8bit")
            )
            raise ValueError(
                f"the saved moments are in {saved}; continue with optim {optim!r}, as the run began"
            )
        for name, moment in mine.items():
            if name not in state or state[name].shape != moment.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(
                    f"optimizer state {name!r} is {found}; this adapter needs {tuple(moment.shape)}"
                )
        for name, moment in mine.items():
            moment.copy_(state[name])
        self.steps = steps


def warmup_count(warmup_steps: float, warmup_ratio: float, total_steps: int) -> int:
    """Steps of warm-up: warmup_steps, a share of all steps where it is below 1, or else warmup_ratio."""
    if warmup_steps >= 1:
        return int(warmup_steps)
    return math.ceil(total_steps * (warmup_steps or warmup_ratio))


def learning_rate_factor(kind: str, step: int, warmup: int, total_steps: int) -> float:
    """What the peak rate is multiplied by in update number `step` (from 0), as in transformers' get_scheduler.

    A linear rise from 0 over `warmup` steps, then: linear falls to 0 at total_steps, cosine follows half a wave down to
    0, constant_with_warmup stays. constant has no warm-up.
    """
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant_with_warmup":
        return 1.0
    falling = max(1, total_steps - warmup)
    if kind == "linear":
        return max(0.0, (total_steps - step) / falling)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / falling)))
    raise ValueError(
        f"lr_scheduler_type {kind!r} is not known; choose linear, cosine, constant or constant_with_warmup"
    )

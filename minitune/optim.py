"""AdamW over one flat buffer that holds every LoRA parameter, and the learning-rate schedules.

An adapter is hundreds of small matrices. Here they are slices of one float32 vector `values` (P,), and their gradients
slices of one vector `grads` (P,): the optimizer is then a dozen launches over P numbers instead of a dozen a matrix,
clearing the gradients is one, clipping needs one norm, and gradients of several processes would be summed by one
all-reduce of `grads`.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2            t <- t + 1
    w <- (1 - lr decay) w - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

16 bytes a parameter: values, gradient, m and v (8B, all seven linears, r=16: 42 million parameters, 671 MB), and 4 more
while a step runs. Nothing here waits for the device: the gradient norm stays a tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatAdamW:
    """AdamW as in torch.optim, with the global-norm clipping of clip_grad_norm_ inside `step`.

    The parameters stay ordinary parameters: `p.data` and `p.grad` are views of the flat buffers. Writing into them in
    place counts at once; a `.data` or `.grad` that someone replaced is taken over, and bound again, by the next step.
    A `.grad` of None counts as zero.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ):
        """max_grad_norm 0 turns clipping off. ValueError where there is no parameter, or one is not float32."""
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("no parameters to train; attach an adapter with FastLanguageModel.get_peft_model first")
        if wrong := [p.dtype for p in self.parameters if p.dtype != torch.float32]:
            raise ValueError(f"a LoRA parameter is {wrong[0]}; the optimizer keeps its values in torch.float32")
        self.betas, self.eps, self.weight_decay, self.max_grad_norm = betas, eps, weight_decay, max_grad_norm
        self.steps = 0
        count = sum(p.numel() for p in self.parameters)
        self.values, self.grads, self.exp_avg, self.exp_avg_sq = torch.zeros(4, count, device=self.parameters[0].device)
        self._value_views, self._grad_views = self._views(self.values), self._views(self.grads)
        self._bind()

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def _bind(self) -> None:
        """Make every parameter and gradient a view of the flat buffers, taking over what is there and is not one."""
        for p, value, grad in zip(self.parameters, self._value_views, self._grad_views, strict=True):
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
        """One update at rate `lr`, a number or 0-dim tensor. Returns the gradient norm before clipping, 0-dim."""
        self._bind()
        # A norm of norms: on a CPU one float32 sum over 42 million squares is off in the fifth digit.
        norm = nn.utils.get_total_norm(self._grad_views)
        if self.max_grad_norm > 0:
            self.grads.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        beta1, beta2 = self.betas
        self.exp_avg.lerp_(self.grads, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(self.grads, self.grads, value=1 - beta2)
        update = self.exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(self.eps)
        torch.div(self.exp_avg, update, out=update).mul_(lr / (1 - beta1**self.steps))
        if self.weight_decay:
            self.values.mul_(1 - lr * self.weight_decay)
        self.values.sub_(update)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, (P,) float32 each. The parameters' own values are the adapter's, and `steps` a plain number."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from `state_dict()` as it was after `steps` updates. ValueError where the sizes differ."""
        for name, mine in self.state_dict().items():
            if name not in state or state[name].shape != mine.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"optimizer state {name!r} is {found}; this adapter needs {tuple(mine.shape)}")
            mine.copy_(state[name])
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

"""Dynamic loss scaling: training in float16 without a gradient that underflows or overflows.

Each token's loss is multiplied by a scale c, a power of two, before the backward pass. After the
pass the gradients of the adapters and the loss are divided again, in float32:

    micro-step          gradients of c * (sum of the token losses)      float16 inside of the layers
    end of the step     .grad and loss times 1 / (c * targets)          float32

c belongs to a token's loss, not to the mean over a step. The numbers in a layer therefore do not
depend on how many tokens a step has. Callbacks, clipping and AdamW see true gradients.

A gradient norm that is not finite means an overflow. c is then halved, and the same step runs
again: no step, no sample and no learning rate is lost. After GROWTH_INTERVAL steps without an
overflow c doubles. Once c has reached its limit, one step in GROWTH_INTERVAL is repeated, which is
0.2 % of the time. The host reads loss and norm once a step, in float16 only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitune.config.numbers import check_number, number, shown, whole
from minitune.data.batching import Batch
from minitune.model.precision import TOKEN_SCALE, wider_dtypes
from minitune.training.micro_step import MicroStep

GROWTH_INTERVAL = 500  # steps
MIN_SCALE, MAX_SCALE = 2.0**-12, 2.0**24
SCALES = number(MIN_SCALE, MAX_SCALE)  # of a checkpoint


class NotFinite(ValueError):
    """A loss that is NaN or infinite."""


class BeyondFloat16(NotFinite):
    """A loss, or gradients at every scale, that float16 cannot hold."""


@dataclass
class LossScale:
    """The scale of a run.

    scale: c, a power of two.
    steps: optimizer steps since c changed or the run began.
    """

    scale: float = TOKEN_SCALE
    steps: int = 0

    @classmethod
    def of_dtype(cls, dtype: torch.dtype, saved: "LossScale | None" = None) -> "LossScale | None":
        """Return the scale of a run in float16, and None for another dtype.

        saved: of a checkpoint that the run continues from.
        """
        return (saved or cls()) if dtype == torch.float16 else None

    @classmethod
    def from_state(cls, values: Any) -> "LossScale | None":
        """Return the scale that a checkpoint holds; None if the run was not in float16.

        Raises: ValueError if a value is missing, of another type or out of its bounds, or if the
            scale is no power of two.
        """
        if values is None:
            return None
        if not isinstance(values, dict):
            raise ValueError(f"loss_scale is {shown(values)}; expected an object")
        check_number("loss_scale.scale", values.get("scale"), SCALES)
        check_number("loss_scale.steps", values.get("steps"), whole())
        if math.frexp(values["scale"])[0] != 0.5:
            raise ValueError(f"loss_scale.scale is {values['scale']}; expected a power of two")
        return cls(float(values["scale"]), values["steps"])

    @property
    def denominator(self) -> float:
        """The denominator of a micro-step's loss."""
        return 1 / self.scale

    def unscale_(self, loss: Tensor, gradients: list[Tensor], targets: int) -> None:
        """Turn the scaled sum of token losses, and its gradients, into those of the mean, in place.

        targets: number of the tokens.
        """
        factor = 1 / (self.scale * targets)
        loss.mul_(factor)
        torch._foreach_mul_(gradients, factor)

    def accept(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Return True if the step's gradients are finite; otherwise halve the scale.

        loss, grad_norm: 0-dim; the host waits for both.

        Raises: BeyondFloat16 if no scale helps: the loss is not finite, or the scale was halved
            down to MIN_SCALE.
        """
        loss_value, norm = torch.stack([loss, grad_norm]).tolist()
        if not math.isfinite(loss_value):
            raise _loss_beyond_float16("loss", loss_value, loss.device)
        if math.isfinite(norm):
            self.steps += 1
            if self.steps >= GROWTH_INTERVAL and self.scale < MAX_SCALE:
                self.scale, self.steps = 2 * self.scale, 0
            return True
        if self.scale <= MIN_SCALE:
            raise BeyondFloat16(
                f"gradients in float16 are not finite down to a loss scale of {self.scale:g}; "
                f"{_remedy(loss.device)}"
            )
        self.scale, self.steps = self.scale / 2, 0
        return False


def run_micro_steps(
    micro_step: MicroStep, batches: Sequence[Batch], scale: LossScale | None
) -> Tensor:
    """Add the gradients of an optimizer step's batches to `.grad`, which is 0 before.

    scale: of a run in float16, otherwise None.

    Returns the mean of the batches' token losses, 0-dim, on the device.
    """
    model, targets = micro_step.model, sum(batch.targets for batch in batches)
    denominator = targets if scale is None else scale.denominator
    loss = torch.zeros((), device=model.device)
    for batch in batches:
        loss += micro_step(batch, denominator)
    if scale is not None:
        gradients = [p.grad for _, p in model.trainable_parameters()]
        scale.unscale_(loss, gradients, targets)
    return loss


def check_evaluation_loss(loss: float, dtype: torch.dtype, device: torch.device) -> None:
    """Check that the loss of an evaluation is a number.

    dtype, device: of the model.

    Raises: NotFinite if the loss is NaN or infinite; BeyondFloat16 if the model is in float16.
    """
    if math.isfinite(loss):
        return
    if dtype == torch.float16:
        raise _loss_beyond_float16("evaluation loss", loss, device)
    raise NotFinite(
        f"the evaluation loss is {loss} in {str(dtype).removeprefix('torch.')}: weights or adapter "
        "hold too large values; take an earlier checkpoint, or lower learning_rate"
    )


def _loss_beyond_float16(name: str, loss: float, device: torch.device) -> BeyondFloat16:
    """Return the error of a loss that is not finite in float16."""
    return BeyondFloat16(f"the {name} is {loss} in float16; {_remedy(device)}")


def _remedy(device: torch.device) -> str:
    """Return the text that names the dtypes which hold what float16 cannot."""
    return (
        f"float16 holds numbers up to 65504: load the model with {wider_dtypes(device)}, or lower "
        "learning_rate if the loss rose before"
    )

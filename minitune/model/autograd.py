"""The autograd functions around the hand-written passes, for a training loop of the user's own.

Each function is one node of the graph of `model(...).loss.backward()`. The trainer does without
them: a micro-step calls the passes directly.

Forward and backward ignore autocast, which would change the dtypes that the kernels expect. The
passes are written out for one derivative, so a gradient cannot be differentiated again.

In float16 each node scales its gradient by a power of two (precision.py), and the logits are
float32, so that autograd does not round their gradient. A loop therefore needs no
torch.amp.GradScaler. A loop that has one gets the gradients of its scaled loss.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minitune.kernels.backend import accumulator
from minitune.model.activations import Activations, SaveLevel
from minitune.model.layers import LayerContext
from minitune.model.loss import Head, LossRows
from minitune.model.packed_sequences import PackedSequences
from minitune.model.precision import TOKEN_SCALE, layer_scale, logits_scale, own_precision
from minitune.model.unchanged_tensors import UnchangedTensors, frozen_tensors


class DecoderLayerNode(torch.autograd.Function):
    """A decoder layer as one node of the autograd graph."""

    @staticmethod
    def forward(
        ctx,
        s: Tensor,
        layer: nn.Module,
        packed: PackedSequences,
        context: LayerContext,
        level: SaveLevel,
        tile_rows: int | None,
        *lora_parameters: Tensor,
    ):
        ctx.read = UnchangedTensors(layer, lora_parameters, frozen_tensors(layer))
        y = s.clone()
        saved = layer.forward_saving_(y, packed, context, level, tile_rows).tensors()
        ctx.layer, ctx.packed, ctx.context, ctx.tile_rows = layer, packed, context, tile_rows
        ctx.names = tuple(saved)
        ctx.save_for_backward(*saved.values())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        layer, D = ctx.layer, ctx.layer.D
        ctx.read.check(layer.lora_parameters())
        a = Activations(**dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        dtype = ctx.context.dtype
        scale = layer_scale(dy) if dtype == torch.float16 else None
        dresidual = layer.new_residual_gradient(len(dy), dtype, dy.device)
        dresidual[:, :D] = dy if scale is None else dy * scale
        with own_precision(dy.device, dtype):
            gradients = layer.backward_(
                dresidual, a, ctx.packed, ctx.context, ctx.tile_rows, ctx.needs_input_grad[0]
            )
        ds = dresidual[:, :D].to(dy.dtype)
        if scale is not None:
            computed = [gradient for gradient in (ds, *gradients) if gradient is not None]
            torch._foreach_div_(computed, scale)
        return ds, None, None, None, None, None, *gradients


class LossNode(torch.autograd.Function):
    """The loss of the labelled rows. Forward also computes the gradient, which backward scales."""

    @staticmethod
    def forward(ctx, s: Tensor, model: nn.Module, loss_rows: LossRows, denominator: float | Tensor):
        dresidual = torch.empty_like(s, dtype=model.dtype) if ctx.needs_input_grad[0] else None
        ctx.factor = None
        if model.dtype == torch.float16:  # save the gradient of TOKEN_SCALE * sum of token losses
            ctx.factor = 1 / (TOKEN_SCALE * torch.as_tensor(denominator, dtype=torch.float32))
            denominator = 1 / TOKEN_SCALE
        loss = model.rows_loss(s, loss_rows, denominator, dresidual)
        if ctx.factor is not None:
            loss = loss * ctx.factor
        if dresidual is not None:
            ctx.save_for_backward(dresidual)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        (dresidual,) = ctx.saved_tensors
        if ctx.factor is None:
            ds = (dresidual * dloss.to(dresidual.dtype)).to(accumulator(dresidual.dtype))
        else:
            ds = dresidual.float() * (dloss * ctx.factor)
        return ds, None, None, None


class LogitsNode(torch.autograd.Function):
    """The logits (N, V) of the residual stream s (N, D), in float32 if the model is in float16."""

    @staticmethod
    def forward(ctx, s: Tensor, head: Head):
        logits, rstd = head.logits(s)
        ctx.head = head
        ctx.read = UnchangedTensors(head.norm, (head.norm.weight, head.weight))
        ctx.save_for_backward(s, rstd, logits if head.softcap else None)
        return logits.float() if logits.dtype == torch.float16 else logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits: Tensor):
        s, rstd, logits = ctx.saved_tensors
        dtype = ctx.head.weight.dtype
        ctx.read.check((ctx.head.norm.weight, ctx.head.weight))
        scale = logits_scale(dlogits) if dtype == torch.float16 else None
        if scale is not None:
            room = torch.empty_like(dlogits, dtype=dtype)
            dlogits = torch.mul(dlogits, scale, out=room)
        with own_precision(dlogits.device, dtype):
            ds = ctx.head.logits_backward(dlogits, logits, s, rstd).to(s.dtype)
        return ds if scale is None else ds / scale, None

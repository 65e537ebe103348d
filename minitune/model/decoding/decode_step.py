"""A decode step: one token of each row through the layers, over the cache.

The layers are those of training. They read the residual stream as in training too: float32 from the
embedding to the head, and rounded to the compute dtype when a layer begins.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from minitune.kernels.backend import matmul, matmul_accumulated
from minitune.kernels.decode_attention import decode_attention, store_keys_values
from minitune.model.activations import Activations
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.decoding.kv_cache import PAGE, KVCache
from minitune.model.layers import LayerPass, new_residual
from minitune.model.linear import FusedLinear
from minitune.model.loss import Head
from minitune.model.packed_sequences import PackedSequences

Weights = Mapping[FusedLinear, Any]


class StepInputs(NamedTuple):
    """The rows of a decode step, on the device.

    tokens: int64 (rows,), the token that each row reads.
    positions: int32 (rows,), the position of this token.
    page_table: int32 (rows, pages), the pages of each row.
    """

    tokens: Tensor
    positions: Tensor
    page_table: Tensor

    def select(self, rows: Any) -> "StepInputs":
        """Return some of the rows."""
        return StepInputs(self.tokens[rows], self.positions[rows], self.page_table[rows])


def decode_step(
    model, cache: KVCache, inputs: StepInputs, head: Head, weights: Weights | None = None
) -> Tensor:
    """Return the logits (rows, V) in float32 behind one token of each row.

    head: the final norm and the head, in the compute dtype.
    weights: the weights of all fused linears; None dequantises each layer at its use.
    """
    _, positions, page_table = inputs
    pages = page_table.gather(1, (positions // PAGE).long()[:, None])[:, 0]
    places = pages.long() * PAGE + positions % PAGE
    lengths = positions + 1
    # Only the positions count: attention sees the rows through the page table.
    packed = PackedSequences(positions, start=positions, end=lengths)
    s = new_residual(model.model.embed_tokens(inputs.tokens, model.dtype))  # (rows, D)
    for index, layer in enumerate(model.model.layers):
        keys, values, heads = cache.keys[index], cache.values[index], layer.self_attn
        with _layer_pass(model, layer, packed, weights) as p:
            a = Activations(s.to(model.dtype, copy=True))
            q, k, v = heads.heads_of(layer.compute_qkv(a.x, p), p)
            store_keys_values(k, v, keys, values, places)
            a.attn = layer.o.new_input(a.x)  # (rows, H K + R)
            decode_attention(
                q,
                keys,
                values,
                page_table,
                lengths,
                scale=heads.scale,
                softcap=heads.softcap,
                window=heads.window,
                out=heads.query_heads(a.attn),
            )
            layer.finish_rows_(s, a, p)
    return float_logits(head, s)


def _layer_pass(
    model, layer: DecoderLayer, packed: PackedSequences, weights: Weights | None
) -> AbstractContextManager[LayerPass]:
    """Return a pass over a layer with these weights."""
    context = model.layer_context
    if weights is None:
        return context.layer_pass(layer.fused_linears, packed)
    return nullcontext(LayerPass(packed, context, weights))


def float_logits(head: Head, s: Tensor) -> Tensor:
    """Return the logits (rows, V) of the residual stream s (rows, D), in float32."""
    h, _ = head.norm.from_residual(s, head.weight.dtype)
    product = matmul_accumulated if s.is_cuda else _rounded_product
    logits = product(h, head.weight.t(), head.multiplier)
    return head.softcap * (logits / head.softcap).tanh() if head.softcap else logits


def _rounded_product(a: Tensor, b: Tensor, multiplier: float) -> Tensor:
    """Return multiplier * a @ b in float32, rounded to the dtype of a and b before.

    A CPU would have to convert the whole head for each step otherwise.
    """
    return matmul(a, b, None, multiplier).float()

"""A decode step: one token of each row through the layers, over the cache.

The layers are those of training. They read the residual stream as in training too: float32 from the
embedding to the head, and rounded to the compute dtype when a layer begins.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitune.kernels.backend import matmul, matmul_accumulated
from minitune.kernels.decode_attention import decode_attention
from minitune.model.activations import Activations
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.decoding.cpu_step import run_layers_
from minitune.model.decoding.cpu_weights import CpuWeights
from minitune.model.decoding.few_row_step import FewRowFused
from minitune.model.decoding.kv_cache import KVCache, copy_async_
from minitune.model.decoding.step_weights import BASE, MAX_FEW_ROWS, PassWeights, StepWeights
from minitune.model.layers import LayerPass, new_residual
from minitune.model.loss import Head
from minitune.model.packed_sequences import PackedSequences


@dataclass(frozen=True)
class StepInputs:
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


class StepBuffers:
    """The inputs and the logits of all slots, at fixed addresses for CUDA graphs.

    Slots without a sequence have token 0 at position 0, and page 0.

    logits: float32 (slots, V).
    """

    def __init__(self, cache: KVCache, vocab_size: int, adapter_of_row: Tensor):
        slots, device = cache.slots, cache.keys.device
        self._page_table = cache.page_table
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._positions = torch.zeros(slots, dtype=torch.int32, device=device)
        self._adapter_of_row = adapter_of_row
        self.logits = torch.empty((slots, vocab_size), dtype=torch.float32, device=device)

    def inputs(self, rows: int, width: int) -> StepInputs:
        """Return the first rows, with the first `width` columns of the page table."""
        return StepInputs(
            self._tokens[:rows], self._positions[:rows], self._page_table[:rows, :width]
        )

    def fill_(self, tokens: list[int], positions: list[int], adapters: list[int]) -> None:
        """Write the inputs of the first slots, and empty the other slots."""
        rows = len(tokens)
        filled = (self._tokens, tokens, 0), (self._positions, positions, 0)
        for column, values, empty in (*filled, (self._adapter_of_row, adapters, BASE)):
            host = torch.full(column.shape, empty, dtype=column.dtype)
            host[:rows] = torch.tensor(values, dtype=column.dtype)
            copy_async_(column, host)

    def advance_(self, tokens: Tensor) -> None:
        """Make tokens (rows,) the next tokens of the first slots."""
        self._tokens[: len(tokens)] = tokens
        self._positions[: len(tokens)] += 1


def decode_step(
    model, cache: KVCache, inputs: StepInputs, head: Head, weights: StepWeights | None = None
) -> Tensor:
    """Return the logits (rows, V) in float32 behind one token of each row.

    head: the final norm and the head, in the compute dtype.
    weights: the weights of the step; None dequantises each layer at its use.
    """
    positions = inputs.positions
    lengths = positions + 1
    # Only the positions count: attention sees the rows through the page table.
    packed = PackedSequences(positions, start=positions, end=lengths)
    x = model.model.embed_tokens(inputs.tokens, model.dtype)  # (rows, D)
    s = new_residual(x)
    if isinstance(weights, CpuWeights):
        run_layers_(model, s, cache, positions, inputs.page_table, weights)
        return float_logits(head, s, weights)
    for index, layer in enumerate(model.model.layers):
        keys, values, heads = cache.keys[index], cache.values[index], layer.self_attn
        with layer_pass(model, layer, packed, weights) as p:
            a = Activations(x)
            q, k, v = heads.heads_of(layer.compute_qkv(a.x, p), p)
            a.attn = layer.o.new_input(a.x)  # (rows, H K + R)
            decode_attention(
                q,
                keys,
                values,
                inputs.page_table,
                lengths,
                scale=heads.scale,
                softcap=heads.softcap,
                window=heads.window,
                out=heads.query_heads(a.attn),
                new=(k, v),
            )
            layer.finish_rows_(s, a, p)
            x = _rounded_residual(s, p.weights[layer.down], model.dtype)
    return float_logits(head, s, weights)


def _rounded_residual(s: Tensor, down: Tensor | Any, dtype: torch.dtype) -> Tensor:
    """Return s (rows, D) in dtype, as the product by W_down left it if that rounds its sums.

    down: the weight of W_down in this pass.
    """
    rounded = down.take_rounded() if isinstance(down, FewRowFused) else None
    return s.to(dtype, copy=True) if rounded is None else rounded


def layer_pass(
    model,
    layer: DecoderLayer,
    packed: PackedSequences,
    weights: PassWeights | None,
    tile_rows: int | None = None,
) -> AbstractContextManager[LayerPass]:
    """Return a pass over a layer with these weights, or with dequantised weights for None."""
    context = model.layer_context
    if weights is None:
        return context.layer_pass(layer.fused_linears, packed, tile_rows)
    return nullcontext(LayerPass(packed, context, weights, tile_rows))


def float_logits(head: Head, s: Tensor, weights: StepWeights | None = None) -> Tensor:
    """Return the logits (rows, V) of the residual stream s (rows, D), in float32.

    weights: multiplies by the head, if there are at most MAX_FEW_ROWS rows.
    """
    h, _ = head.norm.from_residual(s, head.weight.dtype)
    if weights is not None and len(s) <= MAX_FEW_ROWS:
        logits = weights.logits(h, head.multiplier)
    else:
        logits = _float_product(h, head.weight.t(), head.multiplier)
    return head.softcap * (logits / head.softcap).tanh() if head.softcap else logits


def _float_product(a: Tensor, b: Tensor, multiplier: float) -> Tensor:
    """Return multiplier * a @ b in float32.

    On a GPU all products have a multiple of MAX_FEW_ROWS rows, so that the bits of a row do not
    depend on their number. On a CPU the product is in the dtype of a and b, because converting the
    whole head for each step would take longer than the step.
    """
    if not a.is_cuda:
        return matmul(a, b, None, multiplier).float()
    rows = len(a)
    padded = torch.nn.functional.pad(a, (0, 0, 0, -rows % MAX_FEW_ROWS))
    tiles = padded.split(MAX_FEW_ROWS)
    return torch.cat([matmul_accumulated(tile, b, multiplier) for tile in tiles])[:rows]

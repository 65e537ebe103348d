"""A decode step on a CPU in float32, with few PyTorch calls a layer.

A step of a small model is short on a CPU: SmolLM2-135M reads its weights in 16 ms with two threads,
and a call costs several microseconds, because the weights push its code out of the cache. Therefore
the tables of RoPE, the places of the new keys and the masks are computed once a step, all rows are
attended to in one call, and a layer makes 16 calls. It computes the function of DecoderLayer, whose
own methods serve the parts that only some families have.

Rows are padded to the longest one in attention, and a mask hides the padding. Keys and values are
read in place if the pages of each row follow each other and the rows are equally far apart, as in a
cache that was filled at once; otherwise they are gathered.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from minitune.kernels.backend import cdiv
from minitune.kernels.decode_attention import decode_attention
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.decoding.kv_cache import PAGE, KVCache
from minitune.model.layers import Attention, LayerPass
from minitune.model.norms import NoNorm, RMSNorm
from minitune.model.packed_sequences import PackedSequences

_ZERO = torch.zeros(())
MAX_PADDING = 2  # keys that are read in one call, for each key that is seen


def run_layers_(model, s: Tensor, cache: KVCache, positions: Tensor, page_table: Tensor, weights):
    """Take the residual stream s (rows, D) of a step through all layers, in place.

    positions: int32 (rows,), those of the new tokens.
    page_table: int32 (rows, pages).
    weights: the weights of the step.
    """
    step = CpuStep(model, positions, page_table)
    packed = PackedSequences(positions, start=positions, end=positions + 1)
    p = LayerPass(packed, model.layer_context, weights)
    for layer, keys, values in zip(model.model.layers, cache.keys, cache.values, strict=True):
        step.layer_(layer, s, keys, values, p)


class CpuStep:
    """The parts of a decode step that all layers share.

    positions: int32 (rows,), those of the new tokens.
    page_table: int32 (rows, pages).
    """

    def __init__(self, model, positions: Tensor, page_table: Tensor):
        self._lengths, self._page_table = positions + 1, page_table
        self._tables = [_wide_tables(tables, positions) for tables in model.layer_context.ropes]
        self._of_row = self._lengths.tolist()
        longest = max(self._of_row)
        self._is_even = min(self._of_row) == longest
        self._pages = page_table[:, : cdiv(longest, PAGE)].tolist()
        self._start = _equally_spaced(self._pages, [cdiv(n, PAGE) for n in self._of_row])
        self._places = torch.tensor(
            [
                pages[(n - 1) // PAGE] * PAGE + (n - 1) % PAGE
                for pages, n in zip(self._pages, self._of_row, strict=True)
            ]
        )
        self._masks: dict[int | None, Tensor] = {}
        self._pads_too_much = len(self._of_row) * longest > MAX_PADDING * sum(self._of_row)

    def layer_(
        self, layer: DecoderLayer, s: Tensor, keys: Tensor, values: Tensor, p: LayerPass
    ) -> None:
        """Take the residual stream s (rows, D) through a layer, in place.

        keys, values: (pages, PAGE, G, K), the cache of the layer.
        """
        norms, weights, F = layer.norms, p.weights, layer.F
        qkv = layer.qkv.forward_(_norm(norms.attention_in, s), weights[layer.qkv])
        q, k, v = self._heads(layer.self_attn, qkv, p)
        attn = self._attend(layer.self_attn, q, k, v, keys, values).flatten(1)  # (rows, H K)
        if norms.attention_out.is_norm:
            s.add_(_norm(norms.attention_out, layer.o.forward_(attn, weights[layer.o])))
        else:
            layer.o.forward_(attn, weights[layer.o], add_to=s)
        gate_up = layer.gate_up.forward_(_norm(norms.mlp_in, s), weights[layer.gate_up])
        m = _activated(gate_up[:, :F], layer.activation).mul_(gate_up[:, F:])  # (rows, F)
        if norms.mlp_out.is_norm:
            s.add_(_norm(norms.mlp_out, layer.down.forward_(m, weights[layer.down])))
        else:
            layer.down.forward_(m, weights[layer.down], add_to=s)

    def _heads(self, heads: Attention, qkv: Tensor, p: LayerPass) -> tuple[Tensor, ...]:
        """Return q (rows, H, K), k and v (rows, G, K) as attention reads them."""
        tables = None if heads.rope is None else self._tables[heads.rope]
        if heads.qk_norm is not None or tables is None or tables[0].shape[-1] != heads.K:
            heads.rotate_(qkv, p)
            return heads.heads_of(qkv, p)
        cos, sin = tables
        H, G, K = heads.H, heads.G, heads.K
        x = qkv.view(qkv.shape[0], H + 2 * G, K)
        # y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin: the rolled halves of a head are x2, x1.
        qk = x[:, : H + G]
        y = torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin)
        return y[:, :H], y[:, H:], x[:, H + G :]

    def _attend(
        self, heads: Attention, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Write k and v into the cache, and return attention's output (rows, H, K)."""
        options = {"scale": heads.scale, "softcap": heads.softcap, "window": heads.window}
        tables = self._page_table, self._lengths
        if heads.softcap or self._pads_too_much:
            return decode_attention(q, keys, values, *tables, **options, new=(k, v))
        for x, pages in ((k, keys), (v, values)):
            pages.view(-1, heads.G, heads.K).index_copy_(0, self._places, x)
        first = self._first_key(heads.window)
        mask = self._mask(heads.window, first)
        grouped = q.reshape(q.shape[0], heads.G, -1, heads.K)  # (rows, G, H / G, K)
        seen = (self._tokens(x, first) for x in (keys, values))
        out = functional.scaled_dot_product_attention(
            grouped, *seen, attn_mask=mask, scale=heads.scale
        )
        # A hidden value that is not finite gives NaN, because the mask only makes its weight 0.
        if mask is not None and not out.sum().isfinite():
            return decode_attention(q, keys, values, *tables, **options)
        return out.reshape(q.shape)

    def _first_key(self, window: int | None) -> int:
        """Return the first key that any row sees."""
        return 0 if window is None else max(min(self._of_row) - window, 0)

    def _mask(self, window: int | None, first: int) -> Tensor | None:
        """Return 0 for seen and -inf for hidden keys, (rows, 1, 1, keys); None if all are seen."""
        if self._is_even:
            return None
        if window not in self._masks:
            j, lengths = torch.arange(first, max(self._of_row)), self._lengths[:, None]
            hidden = j >= lengths  # (rows, keys)
            if window is not None:
                hidden |= j < lengths - window
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

    def _tokens(self, x: Tensor, first: int) -> Tensor:
        """Return keys or values (rows, G, keys, K), from the first key that any row sees."""
        _, _, G, K = x.shape
        rows, longest = len(self._of_row), max(self._of_row)
        if self._start is None:
            chosen = x[torch.tensor(self._pages)]  # (rows, pages, PAGE, G, K)
            return chosen.view(rows, -1, G, K)[:, first:longest].transpose(1, 2)
        begin, distance = self._start
        token = G * K
        return x.as_strided(
            (rows, G, longest - first, K),
            (distance * PAGE * token, K, token, 1),
            x.storage_offset() + (begin * PAGE + first) * token,
        )


def _wide_tables(tables, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return cos, cos and -sin, sin of each row, (rows, 1, R); None if queries have a factor."""
    if tables.query_scale is not None:
        return None
    cos, sin = tables.cos[positions][:, None], tables.sin[positions][:, None]
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _equally_spaced(table: list[list[int]], used: list[int]) -> tuple[int, int] | None:
    """Return the first page and the distance of two rows, if one view of the cache holds all rows.

    table: the pages of each row, of which the first `used` hold its keys.
    """
    first = table[0][0]
    distance = table[1][0] - first if len(table) > 1 else 0
    longest = max(used)
    # The last row must have the most pages, or the view would end behind the cache.
    if distance < 0 or used[-1] < longest:
        return None
    for row, (own, n) in enumerate(zip(table, used, strict=True)):
        begin = first + row * distance
        if own[:n] != list(range(begin, begin + n)):
            return None
    return first, distance


def _norm(norm: RMSNorm | NoNorm, x: Tensor) -> Tensor:
    """Return the norm of x (rows, D); x itself if there is none."""
    if not norm.is_norm:
        return x
    weight = norm.weight
    if norm.offset or weight.dtype != torch.float32:
        weight = weight.float() + norm.offset
    if x.shape[0] > 1:
        return functional.rms_norm(x, norm.shape, weight, norm.eps)
    # A single row's factor is a number, which spares most of the calls.
    size = torch.linalg.vector_norm(x).item()
    factor = 1 / math.sqrt(size * size / x.shape[1] + norm.eps)
    return torch.addcmul(_ZERO, x, weight, value=factor)


def _activated(gate: Tensor, activation: str) -> Tensor:
    """Return the activation of the gate (rows, F)."""
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh")

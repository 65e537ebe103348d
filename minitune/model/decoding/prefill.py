"""Prefill: the prompts through the layers, packed, into the pages of the cache.

The layers are those of a training step, with dequantised weights. On a GPU the bits of a prompt do
not depend on the prompts beside it: each prompt begins at a multiple of SEQUENCE_ALIGNMENT rows,
all matmuls have PREFILL_TILE_ROWS rows, and attention has the block sizes of short sequences. The
rows that fill up a prompt belong to it as further tokens, which no real token attends to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from minitune.kernels.attention_common import MAX_BLOCK, SHORT_SEQUENCE_ROWS, sequence_bounds
from minitune.kernels.backend import cdiv
from minitune.kernels.decode_attention import store_keys_values
from minitune.model.activations import Activations, row_tiles
from minitune.model.decoding.decode_step import layer_pass
from minitune.model.decoding.kv_cache import KVCache, places_of
from minitune.model.decoding.step_weights import PassWeights
from minitune.model.layers import Attention, LayerPass, new_residual
from minitune.model.packed_sequences import PackedSequences

MAX_PREFILL_ROWS = 8192  # of one pass, unless a single prompt is longer
SEQUENCE_ALIGNMENT = MAX_BLOCK
PREFILL_TILE_ROWS = 1024
BOUND = SHORT_SEQUENCE_ROWS  # max_seqlen for attention, which only chooses block sizes by it


class PackedPrompts(NamedTuple):
    """Prompts in one packed pass, on the host.

    ids, positions: (N,); the positions restart at 0 in each prompt.
    places: (N,), the place of each token in the cache; -1 for padding.
    last_rows: (B,), the row of the last token of each prompt.
    """

    ids: Tensor
    positions: Tensor
    places: Tensor
    last_rows: Tensor


def pads(device: torch.device) -> bool:
    """Return True if prompts are padded on a device."""
    return device.type == "cuda"


def prefill_batches(lengths: Sequence[int], is_padded: bool) -> Iterator[slice]:
    """Yield slices of prompts that are read in one pass each."""
    first = rows = 0
    for i, length in enumerate(lengths):
        needed = _multiple(length, SEQUENCE_ALIGNMENT) if is_padded else length
        if i > first and rows + needed > MAX_PREFILL_ROWS:
            yield slice(first, i)
            first, rows = i, 0
        rows += needed
    if lengths:
        yield slice(first, len(lengths))


def pack_prompts(
    prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]], is_padded: bool
) -> PackedPrompts:
    """Pack prompts with these pages.

    is_padded: fill up each prompt and the last tile with further tokens.
    """
    ids, positions, places, last_rows = [], [], [], []
    N = 0
    for i, (prompt, own_pages) in enumerate(zip(prompts, pages, strict=True)):
        T = rows = len(prompt)
        if is_padded:
            rows = _multiple(T, SEQUENCE_ALIGNMENT)
            if i == len(prompts) - 1:
                rows = _multiple(N + rows, PREFILL_TILE_ROWS) - N
        ids += [*prompt, *[prompt[-1]] * (rows - T)]
        positions.append(torch.arange(rows))
        places += [places_of(own_pages, T), torch.full((rows - T,), -1)]
        last_rows.append(N + T - 1)
        N += rows
    columns = torch.tensor(ids), torch.cat(positions), torch.cat(places)
    return PackedPrompts(*columns, torch.tensor(last_rows))


def _multiple(rows: int, step: int) -> int:
    """Return the least multiple of `step` that is not below `rows`."""
    return cdiv(rows, step) * step


def prefill(
    model,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    pages: Sequence[Sequence[int]],
    weights: PassWeights | None = None,
) -> Tensor:
    """Write the keys and values of prompts to their pages; return the residual stream (B, D).

    Its rows are those of the last token of each prompt, after the last layer.

    pages: the pages of each prompt.
    weights: the weights of the pass; None dequantises each layer at its use.
    """
    device, is_padded = model.device, pads(model.device)
    given = pack_prompts(prompts, pages, is_padded)
    packed = _packed_sequences(model, given.positions, is_padded)
    places = given.places.to(device)
    tile_rows = PREFILL_TILE_ROWS if is_padded else None
    s = new_residual(model.model.embed_tokens(given.ids.to(device), model.dtype))  # (N, D)
    for index, layer in enumerate(model.model.layers):
        heads = layer.self_attn
        with layer_pass(model, layer, packed, weights, tile_rows) as p:
            a = Activations(s.to(model.dtype, copy=True))
            q, k, v = heads.heads_of(layer.compute_qkv(a.x, p), p)
            store_keys_values(k, v, cache.keys[index], cache.values[index], places)
            a.attn = layer.o.new_input(a.x)  # (N, H K + R)
            _attend(heads, q, k, v, p, heads.query_heads(a.attn))
            del q, k, v  # frees their memory
            for tile in row_tiles(len(s), tile_rows):
                layer.finish_rows_(s[tile], a.rows(tile), p)
    return s[given.last_rows.to(device)]


def _attend(heads: Attention, q: Tensor, k: Tensor, v: Tensor, p: LayerPass, out: Tensor) -> None:
    """Write attention's output to out (N, H, K).

    On a CPU PyTorch's own attention is faster than that of training, and holds no scores of all
    pairs of tokens. It knows no window and no softcap.
    """
    if q.device.type != "cpu" or heads.window is not None or heads.softcap:
        heads.attend_heads(q, k, v, p, out=out)
        return
    for first, end in sequence_bounds(p.packed.start):
        qs, ks, vs = (x[None, first:end].transpose(1, 2) for x in (q, k, v))  # (1, heads, T, K)
        y = functional.scaled_dot_product_attention(
            qs, ks, vs, is_causal=True, scale=heads.scale, enable_gqa=True
        )
        out[first:end] = y[0].transpose(0, 1)


def _packed_sequences(model, positions: Tensor, is_padded: bool) -> PackedSequences:
    """Return the prompts on the device; padding has the last position that RoPE's tables hold."""
    packed = PackedSequences.from_positions(positions, model.windows)
    if is_padded:
        _, *bounds = packed.tensors()
        inside = packed.positions.clamp(max=model.max_seq_length - 1)
        packed = replace(packed.of_tensors([inside, *bounds]), uniform_seqlen=None)
        windows = {w: replace(x, max_seqlen=BOUND) for w, x in packed.windows.items()}
        packed = replace(packed, max_seqlen=BOUND, windows=windows)
    return packed.to(model.device)

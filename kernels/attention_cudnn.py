"""Attention through cuDNN, for packed samples that all have one length L: they lie there as (N / L, heads, L, K).

Results are those of attention.py: out, and lse (H, N) in the natural logarithm, so that forward and
backward can be mixed. PyTorch's operators allocate what they return, so a buffer of the caller's is
filled by a copy; and the backward works with a gradient of q in float32 and of k and v for every
head of q. So where there are many rows, some of the heads are taken at a time. cuDNN's backward is
not promised to repeat bit for bit, and PyTorch has no switch that would make it. The first call
with a new shape has cuDNN plan for it.

PyTorch keeps cuDNN's compiled graphs by the shapes and strides of q, k and v alone. A later call
whose out, dout or lse lay differently in memory would silently be computed wrong, so these are
always made dense here.
"""

from collections.abc import Iterator

import torch

from .backend import cdiv

# From this length on it is worth it: on an H200 in November 2026 (32 heads, 8 of keys, K = 128,
# bf16), forward and backward, 3.77 ms at 8192 rows against 4.45 of attention.py; at 2048 no
# difference, and below that it is slower.
CUDNN_MIN_LENGTH = 4096
# Rows x heads of a call. There, of 16384 to 65536 rows in 2 to 8 calls instead of 1, the backward
# takes up to 2% longer and the forward up to 6%; 8192 rows in 2 calls take 10% longer.
CUDNN_ROW_HEADS_PER_CALL = 1 << 18


def cudnn_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, uniform_seqlen: int) -> bool:
    """Whether cuDNN can take q (N, H, K), k, v (N, G, K) as samples of `uniform_seqlen` rows: 16 bit, sm_90 or later.

    ValueError where N is no multiple of `uniform_seqlen`.
    """
    if uniform_seqlen <= 0 or len(q) % uniform_seqlen:
        raise ValueError(
            f"{len(q)} rows do not divide into sequences of uniform_seqlen {uniform_seqlen}"
        )
    if (
        not q.is_cuda
        or len(q) == 0
        or q.dtype not in (torch.float16, torch.bfloat16)
        or q.shape[2] > 128
    ):
        return False
    aligned = all(x.stride(0) % 8 == x.stride(1) % 8 == x.data_ptr() % 16 == 0 for x in (q, k, v))
    capable = torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(
        q.device
    ) >= (9, 0)
    return aligned and capable and uniform_seqlen > 1


def kv_heads_at_once(rows: int, heads: int, kv_heads: int) -> int:
    """Heads of keys in a call over so many rows: as few as keep a GPU busy, for cuDNN's memory grows with them."""
    return cdiv(kv_heads, max(rows * heads // CUDNN_ROW_HEADS_PER_CALL, 1))


def cudnn_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    uniform_seqlen: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (N, H, K), lse (H, N) float32), causal within samples of `uniform_seqlen` rows; into `out` if it is given."""
    N, H, K = q.shape
    out = q.new_empty((N, H, K)) if out is None else out
    lse = q.new_empty((H, N), dtype=torch.float32)
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    for heads, kv_heads in _parts(q, k):
        inputs = [_batch(x, uniform_seqlen) for x in (q[:, heads], k[:, kv_heads], v[:, kv_heads])]
        result, sums = forward(*inputs, None, True, 0.0, True, False, scale=scale)[:2]
        _batch(out[:, heads], uniform_seqlen).copy_(result)
        lse[heads].unflatten(1, (-1, uniform_seqlen)).copy_(
            sums.view(-1, result.shape[1], uniform_seqlen).transpose(0, 1)
        )
        del result  # before the next takes as much
    return out, lse


def cudnn_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    uniform_seqlen: int,
    scale: float,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) for dout (N, H, K), from what the forward took and returned; into the buffers that are given."""
    gradients = tuple(
        torch.empty_like(x) if d is None else d for d, x in ((dq, q), (dk, k), (dv, v))
    )
    for heads, kv_heads in _parts(q, k):
        into = [d[:, part] for d, part in zip(gradients, (heads, kv_heads, kv_heads), strict=True)]
        inputs = (
            dout[:, heads],
            q[:, heads],
            k[:, kv_heads],
            v[:, kv_heads],
            out[:, heads],
            lse[heads],
        )
        _backward(*inputs, uniform_seqlen, scale, into)
    return gradients


def _backward(dout, q, k, v, out, lse, uniform_seqlen, scale, gradients) -> None:
    """Into the gradients; by itself, so that what it takes is free again before the next part."""
    dout, q, k, v, out = (
        _batch(x, uniform_seqlen) for x in (dout.contiguous(), q, k, v, out.contiguous())
    )
    lse = (
        lse.unflatten(1, (-1, uniform_seqlen)).transpose(0, 1).contiguous().unsqueeze(-1)
    )  # (N / L, H, L, 1)
    unused = torch.empty(
        (), dtype=torch.int64, device=q.device
    )  # the random state of a dropout that is not there
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    results = backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        unused,
        unused,
        None,
        None,
        None,
        uniform_seqlen,
        uniform_seqlen,
        0.0,
        True,
        scale=scale,
    )
    for d, result in zip(gradients, results, strict=False):
        _batch(d, uniform_seqlen).copy_(result)


def _parts(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """The heads of q (N, H, K) and of k (N, G, K) that each call takes."""
    (N, H, _), G = q.shape, k.shape[1]
    step = kv_heads_at_once(N, H, G)
    for first in range(0, G, step):
        last = min(first + step, G)
        yield slice(first * H // G, last * H // G), slice(first, last)


def _batch(x: torch.Tensor, uniform_seqlen: int) -> torch.Tensor:
    """(N, heads, K) seen as (N / L, heads, L, K)."""
    return x.unflatten(0, (-1, uniform_seqlen)).transpose(1, 2)

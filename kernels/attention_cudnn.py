"""Attention through cuDNN for packed sequences of one length L, seen as (N / L, heads, L, K).

Every row sees all keys of its sequence up to itself: sliding windows need attention.py.

Results are those of attention.py: out, and lse (H, N) in the natural logarithm. So the forward of
one file and the backward of the other can be mixed.

PyTorch's operators allocate their results, so a caller's buffer is filled by a copy. Their backward
works with a gradient of q in float32 and with gradients of k and v for every query head. Therefore
a call takes only some of the heads if there are many rows.

- cuDNN does not promise that its backward repeats bit for bit, and PyTorch has no switch for it.
- The first call with a new shape waits for cuDNN's plan.
- PyTorch caches cuDNN's graphs by the shapes and strides of q, k and v alone. A later call with
  other strides of out, dout or lse would silently give wrong results, so these are always made
  contiguous here.
"""

from collections.abc import Iterator

import torch

from .backend import cdiv

PROFILE_GROUP = "attention"

# Rows of a sequence from which on cuDNN is faster. On an H200 in November 2026 (32 heads, 8 of
# keys, K = 128, bf16), forward and backward of 8192 rows take 3.77 ms, and 4.45 ms in attention.py.
# At 2048 rows they take the same time, and below that cuDNN is slower.
CUDNN_MIN_LENGTH = 4096
CUDNN_MAX_HEAD_WIDTH = 128
# Rows times heads of a call. On the same GPU, 16384 to 65536 rows in 2 to 8 calls instead of 1 take
# up to 2% longer in backward and up to 6% in forward. 8192 rows in 2 calls take 10% longer.
CUDNN_ROW_HEADS_PER_CALL = 1 << 18


def cudnn_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, uniform_seqlen: int) -> bool:
    """Return True if cuDNN can take the sequences: 16 bit, K up to 128, aligned, sm_90 or later.

    q, k, v: (N, H, K), (N, G, K), (N, G, K).
    uniform_seqlen: rows of every sequence.

    Raises: ValueError if N is not a multiple of uniform_seqlen.
    """
    if uniform_seqlen <= 0 or len(q) % uniform_seqlen:
        raise ValueError(
            f"{len(q)} rows do not divide into sequences of uniform_seqlen {uniform_seqlen}"
        )
    if not q.is_cuda or not len(q) or uniform_seqlen == 1:
        return False
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] > CUDNN_MAX_HEAD_WIDTH:
        return False
    aligned = all(x.stride(0) % 8 == x.stride(1) % 8 == x.data_ptr() % 16 == 0 for x in (q, k, v))
    if not aligned or not torch.backends.cudnn.is_available():
        return False
    return torch.cuda.get_device_capability(q.device) >= (9, 0)


def kv_heads_at_once(rows: int, heads: int, kv_heads: int) -> int:
    """Return the key/value heads of a call: as few as keep a GPU busy, to save memory.

    rows: all rows N.
    heads: query heads H.
    kv_heads: key/value heads G.
    """
    return cdiv(kv_heads, max(rows * heads // CUDNN_ROW_HEADS_PER_CALL, 1))


def cudnn_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    uniform_seqlen: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out (N, H, K), lse (H, N) float32), causal within sequences of uniform_seqlen rows.

    q, k, v: tensors that `cudnn_supports`.
    out: destination; by default a new tensor.
    """
    N, H, K = q.shape
    out = q.new_empty((N, H, K)) if out is None else out
    lse = q.new_empty((H, N), dtype=torch.float32)
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    for heads, kv_heads in _parts(q, k):
        inputs = [_batch(x, uniform_seqlen) for x in (q[:, heads], k[:, kv_heads], v[:, kv_heads])]
        result, sums = forward(*inputs, None, True, 0.0, True, False, scale=scale)[:2]
        _batch(out[:, heads], uniform_seqlen).copy_(result)
        sums = sums.view(-1, result.shape[1], uniform_seqlen)
        lse[heads].unflatten(1, (-1, uniform_seqlen)).copy_(sums.transpose(0, 1))
        del result  # frees its memory before the next part allocates as much
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
    """Return (dq, dk, dv) with the shapes of q, k and v.

    dout: gradient of out (N, H, K).
    out, lse: results of `cudnn_attention` or of attention.py.
    dq, dk, dv: destinations; by default new tensors.
    """
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.empty_like(k) if dk is None else dk
    dv = torch.empty_like(v) if dv is None else dv
    for heads, kv_heads in _parts(q, k):
        inputs = [
            *(dout[:, heads], q[:, heads], k[:, kv_heads], v[:, kv_heads]),
            *(out[:, heads], lse[heads]),
        ]
        gradients = dq[:, heads], dk[:, kv_heads], dv[:, kv_heads]
        _backward_(*inputs, uniform_seqlen, scale, gradients)
    return dq, dk, dv


def _backward_(dout, q, k, v, out, lse, uniform_seqlen, scale, gradients) -> None:
    """Write the gradients of some heads; on return the workspace is free for the next heads."""
    dout, out = dout.contiguous(), out.contiguous()
    tensors = [_batch(x, uniform_seqlen) for x in (dout, q, k, v, out)]
    # (N / L, H, L, 1)
    lse = lse.unflatten(1, (-1, uniform_seqlen)).transpose(0, 1).contiguous().unsqueeze(-1)
    random_state = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout: unused
    results = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *tensors,
        lse,
        random_state,
        random_state,
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
    """Yield the heads of q (N, H, K) and of k (N, G, K) that each call takes."""
    (N, H, _), G = q.shape, k.shape[1]
    step = kv_heads_at_once(N, H, G)
    for first in range(0, G, step):
        last = min(first + step, G)
        yield slice(first * H // G, last * H // G), slice(first, last)


def _batch(x: torch.Tensor, uniform_seqlen: int) -> torch.Tensor:
    """Return (N, heads, K) as (N / L, heads, L, K)."""
    return x.unflatten(0, (-1, uniform_seqlen)).transpose(1, 2)

"""Attention through cuDNN, for packed samples that all have one length L: they lie there as (N / L, heads, L, K).

Results are those of attention.py: out, and lse (H, N) in the natural logarithm, so that forward and backward can be
mixed. k and v are not expanded. PyTorch's operators allocate what they return, so a buffer of the caller's is filled by
a copy. cuDNN's backward is not promised to repeat bit for bit, and PyTorch has no switch that would make it. The first
call with a new shape has cuDNN plan for it.

PyTorch keeps cuDNN's compiled graphs by the shapes and strides of q, k and v alone. A later call whose out, dout or lse
lay differently in memory would silently be computed wrong, so these are always made dense here.
"""

import torch

from .launch import into, require

# From this length on it is worth it: on an H200 in November 2026 (32 heads, 8 of keys, K = 128, bf16), forward and
# backward, 3.77 ms at 8192 rows against 4.45 of attention.py; at 2048 no difference, and below that it is slower.
WORTHWHILE = 4096


def cudnn_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> bool:
    """Whether cuDNN can take q (N, H, K), k, v (N, G, K) as samples of `length` rows: 16 bit, sm_90 or later.

    ValueError where N is no multiple of `length`.
    """
    require(length > 0 and len(q) % length == 0, f"{len(q)} rows are no whole number of samples of {length}")
    if not q.is_cuda or len(q) == 0 or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] > 128:
        return False
    aligned = all(x.stride(0) % 8 == x.stride(1) % 8 == x.data_ptr() % 16 == 0 for x in (q, k, v))
    capable = torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(q.device) >= (9, 0)
    return aligned and capable and length > 1


def cudnn_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, scale: float, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (N, H, K), lse (H, N) float32), causal within samples of `length` rows; into `out` if it is given."""
    (N, H, K) = q.shape
    inputs = [_batch(x, length) for x in (q, k, v)]
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    result, lse = forward(*inputs, None, True, 0.0, True, False, scale=scale)[:2]
    result = result.transpose(1, 2).reshape(N, H, K)
    lse = lse.view(-1, H, length).transpose(0, 1).reshape(H, N)
    return into(out, result), lse


def cudnn_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    length: int,
    scale: float,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) for dout (N, H, K), from what the forward took and returned; into the buffers that are given."""
    dout, q4, k4, v4, out = (_batch(x, length) for x in (dout.contiguous(), q, k, v, out.contiguous()))
    lse = lse.view(len(lse), -1, length).transpose(0, 1).contiguous().unsqueeze(-1)  # (N / L, H, L, 1)
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the random state of a dropout that is not there
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    results = backward(
        dout, q4, k4, v4, out, lse, unused, unused, None, None, None, length, length, 0.0, True, scale=scale
    )
    results = [result.transpose(1, 2).reshape(x.shape) for result, x in zip(results, (q, k, v), strict=False)]
    return tuple(into(buffer, result) for buffer, result in zip((dq, dk, dv), results, strict=True))


def _batch(x: torch.Tensor, length: int) -> torch.Tensor:
    """(N, heads, K) seen as (N / L, heads, L, K)."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)

"""SwiGLU, the gated activation of the MLP.

    forward     out = silu(gate) * up              silu(g) = g * sigmoid(g)
    backward    dgate = dout * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
                dup   = dout * silu(gate)

All tensors are (N, F) in one dtype; arithmetic is in float32. Rows may be strided, because gate and
up are usually the two halves of one matmul's output. Only the inputs are saved. Forward moves 3
tensors, backward 6. Backward also writes `out`, which the LoRA gradient of down_proj needs: one
more write instead of a second launch that reads gate and up again. The results may overwrite the
inputs, so backward needs no further memory of this width.
"""

import torch

from . import backend
from .backend import (
    accumulator,
    cdiv,
    check_rows,
    empty_contiguous_like,
    load_row,
    power_of_two,
    row_stride,
    store_row,
    tl,
    triton,
)

PROFILE_GROUP = "elementwise"


def swiglu_reference(gate, up):
    """Return silu(gate) * up in PyTorch."""
    acc_dtype = accumulator(gate.dtype)
    return (torch.nn.functional.silu(gate.to(acc_dtype)) * up.to(acc_dtype)).to(gate.dtype)


def swiglu_backward_reference(dout, gate, up):
    """Return (dgate, dup, out) in PyTorch."""
    dtype, acc_dtype = gate.dtype, accumulator(gate.dtype)
    dout, gate, up = dout.to(acc_dtype), gate.to(acc_dtype), up.to(acc_dtype)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1 - sigmoid))
    return dgate.to(dtype), (dout * silu).to(dtype), (silu * up).to(dtype)


@triton.jit
def _swiglu_fwd(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_row_stride,
    up_row_stride,
    out_row_stride,
    F,
    BLOCK_F: tl.constexpr,
):
    """Compute BLOCK_F elements of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    gate = load_row(gate_ptr, row, gate_row_stride, columns, mask)
    up = load_row(up_ptr, row, up_row_stride, columns, mask)
    silu = gate * (1.0 / (1.0 + tl.exp(-gate)))
    store_row(out_ptr, row, out_row_stride, columns, silu * up, mask)


@triton.jit
def _swiglu_bwd(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    out_ptr,
    dout_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    out_row_stride,
    F,
    BLOCK_F: tl.constexpr,
):
    """Compute BLOCK_F elements of one row per program; out_ptr may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    dout = load_row(dout_ptr, row, dout_row_stride, columns, mask)
    gate = load_row(gate_ptr, row, gate_row_stride, columns, mask)
    up = load_row(up_ptr, row, up_row_stride, columns, mask)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1.0 - sigmoid))
    store_row(dgate_ptr, row, dgate_row_stride, columns, dgate, mask)
    store_row(dup_ptr, row, dup_row_stride, columns, dout * silu, mask)
    if out_ptr is not None:
        store_row(out_ptr, row, out_row_stride, columns, silu * up, mask)


def _blocks(F: int) -> dict[str, int]:
    """Return the block size: 1024 elements a program, or 512 if that wastes less (F = 1536).

    A thread then holds 8 elements of each tensor: 16-byte accesses in 16 bit.
    """
    return {"BLOCK_F": min(1024 if F % 1024 == 0 else 512, power_of_two(F)), "num_warps": 4}


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) * up (N, F).

    gate, up: (N, F) in one dtype.
    out: destination (N, F); by default a new tensor.

    Raises: ValueError if shapes, dtypes or devices differ, or a row is not contiguous.
    """
    if gate.dim() != 2:
        raise ValueError(f"gate is {tuple(gate.shape)}; expected (rows, width)")
    check_rows(gate, (gate.dtype,), gate=gate, up=up, out=out)
    out = empty_contiguous_like(gate) if out is None else out
    if not backend.use_triton(gate):
        return out.copy_(swiglu_reference(gate, up))
    N, F = gate.shape
    if out.numel():
        blocks = _blocks(F)
        strides = map(row_stride, (gate, up, out))
        _swiglu_fwd[(N, cdiv(F, blocks["BLOCK_F"]))](gate, up, out, *strides, F, **blocks)
    return out


def swiglu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dgate, dup), each (N, F).

    dout: gradient of the output (N, F).
    gate, up: inputs of the forward (N, F).
    dgate, dup: destinations (N, F), each possibly one of the inputs; by default new tensors.
    out: buffer (N, F) to fill with swiglu(gate, up), possibly one of the inputs; by default not
        computed.

    Raises: ValueError if shapes, dtypes or devices differ, or a row is not contiguous.
    """
    if gate.dim() != 2:
        raise ValueError(f"gate is {tuple(gate.shape)}; expected (rows, width)")
    check_rows(gate, (gate.dtype,), dout=dout, gate=gate, up=up, dgate=dgate, dup=dup, out=out)
    dgate = empty_contiguous_like(gate) if dgate is None else dgate
    dup = empty_contiguous_like(gate) if dup is None else dup
    if not backend.use_triton(gate):
        results = swiglu_backward_reference(dout, gate, up)
        for buffer, result in zip((dgate, dup, out), results, strict=True):
            if buffer is not None:
                buffer.copy_(result)
        return dgate, dup
    N, F = gate.shape
    if gate.numel():
        blocks = _blocks(F)
        tensors = dout, gate, up, dgate, dup, out
        strides = map(row_stride, tensors)
        _swiglu_bwd[(N, cdiv(F, blocks["BLOCK_F"]))](*tensors, *strides, F, **blocks)
    return dgate, dup

"""SwiGLU, the gated activation of the MLP.

    forward     out = silu(gate) * up              silu(g) = g * sigmoid(g)
    backward    dgate = dout * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
                dup = dout * silu(gate)

All (N, F), rows may be strided: gate and up are as a rule the two halves of one matmul's output. Nothing is saved but
the inputs. The backward writes `out` again in the same pass, for the LoRA gradient of down_proj needs it: one write
instead of a second launch that reads gate and up once more. Its results may take the place of its inputs, so that a
backward pass needs no further memory of this width. Forward moves 3 tensors, backward 6, in float32 in between.
"""

import torch

from . import backend
from .backend import accumulator, cdiv, power_of_two, require, tl, triton


def swiglu_reference(gate, up):
    wide = accumulator(gate.dtype)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_backward_reference(dout, gate, up):
    dtype, wide = gate.dtype, accumulator(gate.dtype)
    dout, gate, up = dout.to(wide), gate.to(wide), up.to(wide)
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
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    live = at < F
    gate = tl.load(gate_ptr + row * gate_row_stride + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row_stride + at, mask=live, other=0.0).to(tl.float32)
    silu = gate * (1.0 / (1.0 + tl.exp(-gate)))
    tl.store(
        out_ptr + row * out_row_stride + at, (silu * up).to(out_ptr.dtype.element_ty), mask=live
    )


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
    OUT: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    live = at < F
    dout = tl.load(dout_ptr + row * dout_row_stride + at, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row_stride + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row_stride + at, mask=live, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = dgate_ptr.dtype.element_ty
    tl.store(
        dgate_ptr + row * dgate_row_stride + at,
        (dout * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype),
        mask=live,
    )
    tl.store(dup_ptr + row * dup_row_stride + at, (dout * silu).to(dtype), mask=live)
    if OUT:
        tl.store(out_ptr + row * out_row_stride + at, (silu * up).to(dtype), mask=live)


def _blocks(F: int) -> dict:
    """1024 elements a program, 8 a thread: 16-byte accesses at 16 bit. 512 where that wastes less (F = 1536)."""
    return {"BLOCK_F": min(1024 if F % 1024 == 0 else 512, power_of_two(F)), "num_warps": 4}


def _check(**tensors):
    gate = tensors["gate"]
    require(gate.dim() == 2, f"gate is {tuple(gate.shape)}; expected (rows, width)")
    for name, x in tensors.items():
        same = x.shape == gate.shape and x.dtype == gate.dtype
        require(
            same, f"{name} is {tuple(x.shape)} {x.dtype}; gate is {tuple(gate.shape)} {gate.dtype}"
        )
        require(
            x.stride(1) == 1,
            f"the rows of {name} have stride {x.stride(1)}; expected contiguous rows",
        )


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up, (N, F) in their dtype, into `out` where that is given.

    ValueError where shapes differ or a row is not contiguous.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    _check(gate=gate, up=up, out=out)
    if not backend.use_triton(gate):
        return out.copy_(swiglu_reference(gate, up))
    N, F = gate.shape
    if out.numel():
        blocks = _blocks(F)
        grid = (N, cdiv(F, blocks["BLOCK_F"]))
        _swiglu_fwd[grid](gate, up, out, gate.stride(0), up.stride(0), out.stride(0), F, **blocks)
    return out


def swiglu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup), each (N, F): the gradients for dout, into the tensors that are given.

    `out`, where given, is filled with swiglu(gate, up) in the same pass. Each of the three may be one of the inputs.
    """
    dgate, dup = (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if x is None else x
        for x in (dgate, dup)
    )
    results = {"dgate": dgate, "dup": dup} | ({} if out is None else {"out": out})
    _check(gate=gate, up=up, dout=dout, **results)
    if not backend.use_triton(gate):
        for result, value in zip(
            results.values(), swiglu_backward_reference(dout, gate, up), strict=False
        ):
            result.copy_(value)
        return dgate, dup
    N, F = gate.shape
    if gate.numel():
        blocks = _blocks(F)
        _swiglu_bwd[(N, cdiv(F, blocks["BLOCK_F"]))](
            dout,
            gate,
            up,
            dgate,
            dup,
            out,
            dout.stride(0),
            gate.stride(0),
            up.stride(0),
            dgate.stride(0),
            dup.stride(0),
            0 if out is None else out.stride(0),
            F,
            OUT=out is not None,
            **blocks,
        )
    return dgate, dup

"""The gated activation of the MLP: SwiGLU, or GeGLU with the tanh approximation of GELU.

    forward     s = sigmoid(w(gate))
                act = gate * s
                out = act * up
    backward    dgate = dout * up * (s + act * (1 - s) * w'(gate))
                dup   = dout * act

    silu        w(g) = g
    gelu_tanh   w(g) = 2 sqrt(2 / pi) (g + 0.044715 g^3)

The second w makes act the usual form of GELU, g / 2 (1 + tanh(w(g) / 2)), and keeps the digits of
large negative gates, because nothing is added to 1.

All tensors are (N, F) in one dtype; arithmetic is in float32. Rows may be strided, because gate and
up are usually the two halves of one matmul's output. Only the inputs are saved. Forward moves 3
tensors, backward 6. Backward also writes `out`, which the LoRA gradient of down_proj needs: one
more write instead of a second launch that reads gate and up again. The results may overwrite the
inputs, so backward needs no further memory of this width.
"""

import math

import torch
from torch.nn import functional

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


ACTIVATIONS = ("silu", "gelu_tanh")


def gated_activation_reference(gate, up, activation="silu"):
    """Return act(gate) * up in PyTorch."""
    acc_dtype = accumulator(gate.dtype)
    x = gate.to(acc_dtype)
    act = functional.silu(x) if activation == "silu" else functional.gelu(x, approximate="tanh")
    return (act * up.to(acc_dtype)).to(gate.dtype)


def gated_activation_backward_reference(dout, gate, up, activation="silu"):
    """Return (dgate, dup, out) in PyTorch."""
    dtype, acc_dtype = gate.dtype, accumulator(gate.dtype)
    dout, gate, up = dout.to(acc_dtype), gate.to(acc_dtype), up.to(acc_dtype)
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        act = gate * sigmoid
        dact = sigmoid + act * (1 - sigmoid)
    else:
        factor = 2 * math.sqrt(2 / math.pi)
        sigmoid = torch.sigmoid(factor * (gate + 0.044715 * gate**3))
        act = gate * sigmoid
        dact = sigmoid + act * (1 - sigmoid) * factor * (1 + 3 * 0.044715 * gate.square())
    dgate = dout * up * dact
    return dgate.to(dtype), (dout * act).to(dtype), (act * up).to(dtype)


@triton.jit
def _sigmoid_and_slope(gate, ACTIVATION: tl.constexpr):
    """Return sigmoid(w(gate)) and the derivative of w."""
    w = gate
    slope = 1.0
    if ACTIVATION == "gelu_tanh":
        FACTOR: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
        CUBIC: tl.constexpr = 0.044715
        square = gate * gate
        w = FACTOR * (gate + CUBIC * gate * square)
        slope = FACTOR * (1.0 + 3 * CUBIC * square)
    return 1.0 / (1.0 + tl.exp(-w)), slope


@triton.jit
def _gated_activation_fwd(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_row_stride,
    up_row_stride,
    out_row_stride,
    F,
    ACTIVATION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Compute BLOCK_F elements of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    gate = load_row(gate_ptr, row, gate_row_stride, columns, mask)
    up = load_row(up_ptr, row, up_row_stride, columns, mask)
    sigmoid, _ = _sigmoid_and_slope(gate, ACTIVATION)
    store_row(out_ptr, row, out_row_stride, columns, gate * sigmoid * up, mask)


@triton.jit
def _gated_activation_bwd(
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
    ACTIVATION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Compute BLOCK_F elements of one row per program; out_ptr may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    dout = load_row(dout_ptr, row, dout_row_stride, columns, mask)
    gate = load_row(gate_ptr, row, gate_row_stride, columns, mask)
    up = load_row(up_ptr, row, up_row_stride, columns, mask)
    sigmoid, slope = _sigmoid_and_slope(gate, ACTIVATION)
    act = gate * sigmoid
    dgate = dout * up * (sigmoid + act * (1.0 - sigmoid) * slope)
    store_row(dgate_ptr, row, dgate_row_stride, columns, dgate, mask)
    store_row(dup_ptr, row, dup_row_stride, columns, dout * act, mask)
    if out_ptr is not None:
        store_row(out_ptr, row, out_row_stride, columns, act * up, mask)


def _blocks(F: int) -> dict[str, int]:
    """Return the block size: 1024 elements a program, or 512 if that wastes less (F = 1536).

    A thread then holds 8 elements of each tensor: 16-byte accesses in 16 bit.
    """
    return {"BLOCK_F": min(1024 if F % 1024 == 0 else 512, power_of_two(F)), "num_warps": 4}


def _check(gate, activation, **others) -> None:
    """Raise ValueError if the activation is unknown or a tensor does not fit the gate."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; expected {' or '.join(ACTIVATIONS)}")
    if gate.dim() != 2:
        raise ValueError(f"gate is {tuple(gate.shape)}; expected (rows, width)")
    check_rows(gate, (gate.dtype,), gate=gate, **others)


def gated_activation(
    gate: torch.Tensor,
    up: torch.Tensor,
    out: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Return act(gate) * up (N, F).

    gate, up: (N, F) in one dtype.
    out: destination (N, F); by default a new tensor.
    activation: "silu" or "gelu_tanh".

    Raises: ValueError if the activation is unknown, shapes, dtypes or devices differ, or a row is
        not contiguous.
    """
    _check(gate, activation, up=up, out=out)
    out = empty_contiguous_like(gate) if out is None else out
    if not backend.use_triton(gate):
        return out.copy_(gated_activation_reference(gate, up, activation))
    N, F = gate.shape
    if out.numel():
        blocks = _blocks(F)
        strides = map(row_stride, (gate, up, out))
        _gated_activation_fwd[(N, cdiv(F, blocks["BLOCK_F"]))](
            gate, up, out, *strides, F, ACTIVATION=activation, **blocks
        )
    return out


def gated_activation_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    activation: str = "silu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dgate, dup), each (N, F).

    dout: gradient of the output (N, F).
    gate, up: inputs of the forward (N, F).
    dgate, dup: destinations (N, F), each possibly one of the inputs; by default new tensors.
    out: buffer (N, F) to fill with the forward's output, possibly one of the inputs; by default
        not computed.
    activation: "silu" or "gelu_tanh".

    Raises: ValueError if the activation is unknown, shapes, dtypes or devices differ, or a row is
        not contiguous.
    """
    _check(gate, activation, dout=dout, up=up, dgate=dgate, dup=dup, out=out)
    dgate = empty_contiguous_like(gate) if dgate is None else dgate
    dup = empty_contiguous_like(gate) if dup is None else dup
    if not backend.use_triton(gate):
        results = gated_activation_backward_reference(dout, gate, up, activation)
        for buffer, result in zip((dgate, dup, out), results, strict=True):
            if buffer is not None:
                buffer.copy_(result)
        return dgate, dup
    N, F = gate.shape
    if gate.numel():
        blocks = _blocks(F)
        tensors = dout, gate, up, dgate, dup, out
        strides = map(row_stride, tensors)
        _gated_activation_bwd[(N, cdiv(F, blocks["BLOCK_F"]))](
            *tensors, *strides, F, ACTIVATION=activation, **blocks
        )
    return dgate, dup

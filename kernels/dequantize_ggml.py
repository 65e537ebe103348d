"""Dequantisation of the GGUF block types to 16 or 32 bit.

A row of a weight is a row of blocks of 32 or 256 values; ggml_reference.py has their layouts. The
values equal gguf-py's in float32 bit for bit, and are then rounded once. Product and sum are
rounded separately, so the kernels are compiled without fused multiply-add. There is no backward,
because the weight is frozen.

A parameter of Q4_K moves 144 / 256 bytes in and 2 bytes out in 16 bit, so the kernel should run at
the speed of a copy. A thread dequantises parts of eight neighbouring values, which are 16 bytes in
16 bit. It loads all that its parts need, so no value goes through shared memory. A byte with levels
of several parts is loaded several times, mostly from the L1 cache.

Weights of one type are dequantised in one launch, one below the other. The destination may be a
range of columns of a wider tensor that also holds a LoRA branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from . import backend
from .backend import cdiv, power_of_two, tl, triton
from .ggml_blocks import OFFSETS, block_values
from .ggml_reference import BLOCK_DEQUANTIZERS, BLOCK_SIZES, IQ4_VALUES

PROFILE_GROUP = "dequantisation"

# Values that the reference dequantises at a time. Their float32 values stay in the CPU's cache.
CHUNK_VALUES = 1 << 18
PART = 8  # values
ADDRESS_MULTIPLE = 8  # bytes; the longest load of a block
# Parts a program: the largest number that fits into one row of the weight. On an H100 in November
# 2026 the seven linears of an 8B layer take 0.185 (Q2_K) to 0.238 ms (Q8_0), 2.6 to 2.8 TB/s. A
# copy runs at 3.0. On an H200, whose copy runs at 4.2, they reach 0.74 to 0.91 of it.
PARTS_PER_PROGRAM = (256, 128, 64)
PARTS_PER_THREAD = 2


@dataclass
class GgmlStorage:
    """Storage of one weight (out_features, in_features) in blocks of a GGUF type.

    blocks: uint8 (out_features, bytes of a row), contiguous.
    type: name of the type, such as "Q4_K".
    shape: (out_features, in_features).
    """

    blocks: torch.Tensor
    type: str
    shape: tuple[int, int]

    def check(self) -> None:
        """Check that the blocks fit the type and the shape.

        Raises: ValueError if they do not.
        """
        if self.type not in BLOCK_SIZES:
            raise ValueError(f"type is {self.type}; expected one of {', '.join(BLOCK_SIZES)}")
        rows, in_features = self.shape
        width, block_bytes = BLOCK_SIZES[self.type]
        if in_features % width:
            raise ValueError(
                f"in_features is {in_features}; {self.type} needs a multiple of {width}"
            )
        blocks, shape = self.blocks, (rows, in_features // width * block_bytes)
        if blocks.dtype != torch.uint8 or blocks.shape != shape:
            raise ValueError(
                f"blocks are {tuple(blocks.shape)} {blocks.dtype}; "
                f"shape {self.shape} in {self.type} needs {shape} torch.uint8"
            )
        if not blocks.is_contiguous():
            raise ValueError(f"blocks have strides {blocks.stride()}; expected contiguous rows")


def dequantize_ggml_reference(weight, dtype):
    """Return the weight in PyTorch."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.blocks.device)
    width, block_bytes = BLOCK_SIZES[weight.type]
    blocks, values = weight.blocks.view(-1, block_bytes), out.view(-1, width)
    step = CHUNK_VALUES // width
    for chunk, target in zip(blocks.split(step), values.split(step), strict=True):
        target.copy_(BLOCK_DEQUANTIZERS[weight.type](chunk))
    return out


def embed_ggml_reference(ids, weight, dtype, multiplier=1.0):
    """Return the rows in PyTorch."""
    blocks = weight.blocks[ids.to(weight.blocks.device)]
    rows = GgmlStorage(blocks, weight.type, (len(ids), weight.shape[1]))
    values = dequantize_ggml_reference(rows, backend.accumulator(dtype))
    if multiplier != 1.0:
        values *= multiplier
    return values.to(ids.device, dtype)


@triton.jit
def _dequantize_ggml(
    blocks_ptrs,
    out_ptrs,
    counts,
    first_programs,
    table_ptr,
    row_parts,
    out_row_stride,
    WEIGHTS: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_ROWS: tl.constexpr,
):
    """Dequantise PARTS parts of one weight per program.

    Weight i has counts[i] parts, and the programs from first_programs[i] on.

    WHOLE: every program has all its parts.
    TWO_ROWS: a program's parts lie in one row or two.
    """
    pid = tl.program_id(0)
    blocks_ptr, out_ptr, count = blocks_ptrs[0], out_ptrs[0], counts[0]
    first_program = 0
    for i in tl.static_range(1, WEIGHTS):
        reached = pid >= first_programs[i]
        blocks_ptr = tl.where(reached, blocks_ptrs[i], blocks_ptr)
        out_ptr = tl.where(reached, out_ptrs[i], out_ptr)
        count = tl.where(reached, counts[i], count)
        first_program = tl.where(reached, first_programs[i], first_program)
    first = (pid - first_program) * PARTS
    part = tl.arange(0, PARTS)
    if not WHOLE:  # the last program writes the last part several times
        part = tl.minimum(part, count - 1 - first)

    blocks_ptr += (first // BLOCK_PARTS).to(tl.int64) * BLOCK_BYTES
    block_ptr = blocks_ptr + part // BLOCK_PARTS * BLOCK_BYTES
    value = block_values(block_ptr, part % BLOCK_PARTS, table_ptr, TYPE, OFFSET)

    row, column = first // row_parts, first % row_parts
    out_ptr += row.to(tl.int64) * out_row_stride + 8 * column
    if TWO_ROWS:
        rows_below = tl.where(part < row_parts - column, 0, 1)
    else:
        rows_below = (column + part) // row_parts
    gap = out_row_stride - 8 * row_parts  # elements of out between two rows
    to = (8 * part + rows_below * gap)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty))


@triton.jit
def _embed_ggml(
    ids_ptr,
    blocks_ptr,
    y_ptr,
    table_ptr,
    row_parts,
    MULTIPLIER: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Dequantise PARTS parts of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    if not WHOLE:  # the last program writes the last part several times
        part = tl.minimum(part, row_parts - 1)
    table_row = tl.load(ids_ptr + row).to(tl.int64)
    blocks_ptr += table_row * (row_parts // BLOCK_PARTS * BLOCK_BYTES)
    block_ptr = blocks_ptr + part // BLOCK_PARTS * BLOCK_BYTES
    value = block_values(block_ptr, part % BLOCK_PARTS, table_ptr, TYPE, OFFSET)
    if MULTIPLIER != 1.0:
        value *= MULTIPLIER
    to = 8 * part[:, None] + tl.arange(0, 8)[None, :]
    tl.store(y_ptr + row * row_parts * 8 + to, value.to(y_ptr.dtype.element_ty))


def _constants(kind: str) -> dict[str, int | str]:
    """Return the kernels' constants of a type."""
    width, block_bytes = BLOCK_SIZES[kind]
    return {
        "TYPE": kind,
        "BLOCK_PARTS": width // PART,
        "BLOCK_BYTES": block_bytes,
        "OFFSET": OFFSETS.get(kind, 0),
    }


@cache
def _table(kind: str, device: torch.device) -> torch.Tensor | None:
    """Return the values that a type's levels are indices of, float32 (16,), or None."""
    if kind not in ("IQ4_NL", "IQ4_XS"):
        return None
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)


def _options(parts: int) -> dict[str, int | bool]:
    """Return the options of a launch with this number of parts a program."""
    return {"num_warps": max(parts // (32 * PARTS_PER_THREAD), 1), "enable_fp_fusion": False}


def _check_address(weight) -> None:
    """Raise ValueError if the kernels cannot load the blocks from their address."""
    address = weight.blocks.data_ptr()
    if address % ADDRESS_MULTIPLE:
        raise ValueError(
            f"blocks begin at the address {address}; the kernels need a multiple of "
            f"{ADDRESS_MULTIPLE}, which blocks.clone() has"
        )


def _launch(weights, outs) -> None:
    """Dequantise weights of one type into outs, with one launch."""
    for weight in weights:
        _check_address(weight)
    row_parts = weights[0].shape[1] // PART
    fitting = (n for n in PARTS_PER_PROGRAM if n <= row_parts)
    parts = next(fitting, PARTS_PER_PROGRAM[-1])
    counts = [weight.shape[0] * row_parts for weight in weights]
    programs = [cdiv(count, parts) for count in counts]
    if not sum(programs):
        return
    _dequantize_ggml[(sum(programs),)](
        tuple(weight.blocks for weight in weights),
        tuple(outs),
        tuple(counts),
        tuple(accumulate(programs, initial=0))[:-1],
        _table(weights[0].type, outs[0].device),
        row_parts,
        outs[0].stride(0),
        WEIGHTS=len(weights),
        **_constants(weights[0].type),
        PARTS=parts,
        WHOLE=all(count % parts == 0 for count in counts),
        TWO_ROWS=parts <= row_parts,
        **_options(parts),
    )


def dequantize_ggml(
    weights: GgmlStorage | Sequence[GgmlStorage],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return weights of equal in_features one below the other, (sum of out_features, in_features).

    weights: one weight or several.
    dtype: float32, float16 or bfloat16.
    out: destination, possibly a range of columns of wider rows; by default a new tensor.

    Raises: ValueError if a size, a dtype or the address of blocks does not fit.
    """
    weights = [weights] if isinstance(weights, GgmlStorage) else list(weights)
    for weight in weights:
        weight.check()
    shapes = [weight.shape for weight in weights]
    out, outs = backend.rows_of_weights(shapes, dtype, weights[0].blocks.device, out)
    pairs = list(zip(weights, outs, strict=True))
    if not backend.use_triton(out):
        for weight, target in pairs:
            target.copy_(dequantize_ggml_reference(weight, dtype))
        return out
    for kind in dict.fromkeys(weight.type for weight in weights):
        _launch(*zip(*(pair for pair in pairs if pair[0].type == kind), strict=True))
    return out


def embed_ggml(
    ids: torch.Tensor, weight: GgmlStorage, dtype: torch.dtype, multiplier: float = 1.0
) -> torch.Tensor:
    """Return the weight's rows (N, D) times the multiplier in dtype, on the device of ids.

    ids: token ids (N,), integers in [0, V); not checked, because that would wait for the GPU.
    weight: (V, D), on the device of ids or in pinned host memory.
    multiplier: factor of every element, in float32 before the rounding to dtype.

    Raises: ValueError if a shape or the address of the blocks does not fit.
    """
    weight.check()
    if ids.dim() != 1:
        raise ValueError(f"ids {tuple(ids.shape)}; expected (rows,)")
    if not backend.use_triton(ids) or dtype == torch.float64:
        return embed_ggml_reference(ids, weight, dtype, multiplier)
    _check_address(weight)
    N, D = len(ids), weight.shape[1]
    y = torch.empty((N, D), dtype=dtype, device=ids.device)
    if y.numel():
        row_parts = D // PART
        parts = min(power_of_two(row_parts), PARTS_PER_PROGRAM[0])
        _embed_ggml[(N, cdiv(row_parts, parts))](
            ids,
            weight.blocks,
            y,
            _table(weight.type, ids.device),
            row_parts,
            MULTIPLIER=float(multiplier),
            **_constants(weight.type),
            PARTS=parts,
            WHOLE=row_parts % parts == 0,
            **_options(parts),
        )
    return y

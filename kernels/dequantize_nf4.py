"""Dequantisation of NF4 weights to 16 or 32 bit.

A byte holds two 4-bit codes, the even element in the high nibble. Blocks of 64 elements of the
flattened row-major weight share a scale:

    value[i] = dtype(code[nibble[i]] * scale[i // 64])      multiplied in float32
    scale[b] = absmax[b]                                    plain: absmax in float32
    scale[b] = nested_code[absmax[b]] * nested_absmax[b // 256] + nested_offset
                                                            nested: absmax in uint8

The values equal bitsandbytes' bit for bit. The product and the sum of a nested scale are rounded
separately, so the kernel is compiled without fused multiply-add. There is no backward, because the
weight is frozen.

A parameter moves 0.5 + 1/64 bytes in (nested) and 2 bytes out in 16 bit. The output is 80% of the
traffic, so the kernel should run at the speed of a copy. Looking codes up in registers gains
nothing, a tree of selects halves the speed, and a 64-bit division a block costs a fifth.

Small weights do not fill a GPU. Linears that are multiplied as one (q, k, v) are therefore
dequantised in one launch, one below the other. The destination may be a range of columns of a wider
tensor that also holds a LoRA branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from . import backend
from .backend import cdiv, tl, triton

PROFILE_GROUP = "dequantisation"

# Bytes that the reference unpacks at a time. The 2 MB of unpacked values stay in the CPU's cache.
CHUNK_BYTES = 1 << 18
# Quantisation blocks a program: the largest number whose blocks fit into one row of the weight. On
# an H200 in November 2026 the seven linears of an 8B layer take 0.149 ms, 3.7 TB/s. A copy runs at
# 4.25 TB/s, a fill at 3.3. With a division to find each block's row they took 0.158 ms.
BLOCKS_PER_PROGRAM = (64, 32, 8)


@dataclass
class NF4Storage:
    """Storage of one 4-bit weight (out_features, in_features).

    packed: uint8, two elements a byte.
    absmax: one scale a block: float32 if plain, uint8 codes if nested.
    code: the 16 values, float32.
    shape: (out_features, in_features).
    blocksize: elements that share a scale.
    nested_absmax: float32, one scale for every nested_blocksize scales; None if plain.
    nested_code: (256,) float32, the values of the scales' codes; None if plain.
    nested_offset: 0-dim float32, added to each scale; None if plain.
    nested_blocksize: scales that share a nested scale.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    nested_blocksize: int = 256

    def check(self) -> None:
        """Check that sizes and dtypes fit the shape.

        Raises: ValueError if one does not.
        """
        n, size = self.shape[0] * self.shape[1], self.blocksize
        if size < 2 or size & (size - 1):
            raise ValueError(f"blocksize is {size}; expected a power of two, usually 64")
        packed, absmax, code = self.packed, self.absmax, self.code
        if packed.dtype != torch.uint8:
            raise ValueError(f"packed is {packed.dtype}; expected torch.uint8")
        if packed.numel() != (n + 1) // 2:
            raise ValueError(
                f"packed holds {packed.numel()} bytes; shape {self.shape} needs {(n + 1) // 2}"
            )
        blocks = cdiv(n, size)
        if absmax.numel() != blocks:
            raise ValueError(
                f"absmax holds {absmax.numel()} scales; "
                f"{n} elements in blocks of {size} need {blocks}"
            )
        kind, dtype = (
            ("plain", torch.float32) if self.nested_absmax is None else ("nested", torch.uint8)
        )
        if absmax.dtype != dtype:
            raise ValueError(f"absmax is {absmax.dtype}; {kind} scales are {dtype}")
        if code.numel() != 16 or code.dtype != torch.float32:
            raise ValueError(f"code is {tuple(code.shape)} {code.dtype}; expected 16 torch.float32")
        if self.nested_absmax is not None:
            self._check_nested(blocks)

    def _check_nested(self, blocks: int) -> None:
        found, needed = self.nested_absmax.numel(), cdiv(blocks, self.nested_blocksize)
        if found != needed:
            raise ValueError(
                f"nested_absmax holds {found} scales; "
                f"{blocks} blocks in groups of {self.nested_blocksize} need {needed}"
            )
        code, offset = self.nested_code, self.nested_offset
        if code is None or offset is None or code.numel() != 256:
            raise ValueError("nested scales need nested_code (256,) and nested_offset as well")


def dequantize_nf4_reference(weight, dtype):
    """Return the weight in PyTorch, through a table that turns a byte into two float32 values."""
    packed, absmax, blocksize = (
        weight.packed.reshape(-1),
        weight.absmax.reshape(-1),
        weight.blocksize,
    )
    if weight.nested_absmax is not None:
        nested = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: len(absmax)]
        absmax = weight.nested_code[absmax.int()] * nested + weight.nested_offset
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([weight.code[byte >> 4], weight.code[byte & 15]], dim=1)
    pairs = pairs.view(torch.int64).view(256)  # one 8-byte copy a pair
    out = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    flat = out.view(-1)
    step = max(CHUNK_BYTES // blocksize, 1) * blocksize  # bytes; a whole number of blocks
    for first in range(0, len(packed), step):
        values = pairs.index_select(0, packed[first : first + step].int()).view(torch.float32)
        scale = absmax[2 * first // blocksize :][: cdiv(len(values), blocksize)]
        target = flat[2 * first : 2 * first + len(values)]
        if len(flat) % blocksize:
            scale = scale.repeat_interleave(blocksize)
            torch.mul(values[: len(target)], scale[: len(target)], out=target)
        else:
            torch.mul(values.view(-1, blocksize), scale[:, None], out=target.view(-1, blocksize))
    return out


@triton.jit
def _dequantize_weight(
    pid,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    n,
    in_features,
    out_row_stride,
    WHOLE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Dequantise BLOCKS quantisation blocks of HALF bytes each, of one weight of n elements.

    WHOLE: every program has all its blocks, and they lie in one row or two.
    """
    first = pid.to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    mask = block < n // (2 * HALF) + (n % (2 * HALF) > 0) - first
    if NESTED_BLOCKSIZE:
        nested_ptr = nested_absmax_ptr + (first + block) // NESTED_BLOCKSIZE
        if WHOLE:
            code = tl.load(absmax_ptr + first + block)
            nested = tl.load(nested_ptr)
        else:
            code = tl.load(absmax_ptr + first + block, mask=mask, other=0)
            nested = tl.load(nested_ptr, mask=mask, other=0.0)
        scale = tl.load(nested_code_ptr + code.to(tl.int32)) * nested + tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + first + block, mask=mask, other=0.0)

    byte_at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    packed_ptr += first * HALF
    if WHOLE:
        byte = tl.load(packed_ptr + byte_at).to(tl.int32)
    else:
        byte_mask = (first * HALF + byte_at) * 2 < n
        byte = tl.load(packed_ptr + byte_at, mask=byte_mask, other=0).to(tl.int32)
    even = tl.load(code_ptr + (byte >> 4)) * scale[:, None]
    odd = tl.load(code_ptr + (byte & 15)) * scale[:, None]
    value = tl.reshape(tl.join(even, odd), (BLOCKS, 2 * HALF)).to(out_ptr.dtype.element_ty)
    if WHOLE:
        # One 32-bit division a program: the blocks lie in the first block's row or in the next.
        row_blocks = in_features // (2 * HALF)
        row = pid * BLOCKS // row_blocks
        gap = out_row_stride - in_features  # elements of out between two rows
        out_ptr += first * (2 * HALF) + row.to(tl.int64) * gap
        extra = tl.where(block < row_blocks - pid * BLOCKS % row_blocks, 0, gap)
        tl.store(out_ptr + (extra[:, None] + at), value)
    else:
        element = first * (2 * HALF) + at
        to = element + element // in_features * (out_row_stride - in_features)
        tl.store(out_ptr + to, value, mask=element < n)


@triton.jit
def _dequantize(
    packed_ptrs,
    absmax_ptrs,
    code_ptrs,
    nested_absmax_ptrs,
    nested_code_ptrs,
    nested_offset_ptrs,
    out_ptrs,
    sizes,
    first_programs,
    in_features,
    out_row_stride,
    WEIGHTS: tl.constexpr,
    WHOLE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Dequantise several weights: weight i by the programs from first_programs[i] to [i + 1]."""
    pid = tl.program_id(0)
    for i in tl.static_range(WEIGHTS):
        if (pid >= first_programs[i]) & (pid < first_programs[i + 1]):
            _dequantize_weight(
                pid - first_programs[i],
                packed_ptrs[i],
                absmax_ptrs[i],
                code_ptrs[i],
                nested_absmax_ptrs[i],
                nested_code_ptrs[i],
                nested_offset_ptrs[i],
                out_ptrs[i],
                sizes[i],
                in_features,
                out_row_stride,
                WHOLE,
                NESTED_BLOCKSIZE,
                HALF,
                BLOCKS,
            )


def _launch(weights, outs) -> None:
    """Dequantise weights that are stored in one way into outs, with one launch."""
    like, in_features = weights[0], weights[0].shape[1]
    blocksize = like.blocksize
    fitting = (n for n in BLOCKS_PER_PROGRAM if n * blocksize <= in_features)
    blocks = next(fitting, BLOCKS_PER_PROGRAM[-1])
    whole = in_features % blocksize == 0 and in_features >= blocks * blocksize
    programs = [cdiv(weight.absmax.numel(), blocks) for weight in weights]
    if not sum(programs):
        return
    tensors = [
        (w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code, w.nested_offset)
        for w in weights
    ]
    _dequantize[(sum(programs),)](
        *zip(*tensors, strict=True),
        tuple(outs),
        tuple(w.shape[0] * w.shape[1] for w in weights),
        (0, *accumulate(programs)),
        in_features,
        outs[0].stride(0),
        WEIGHTS=len(weights),
        WHOLE=whole and all(w.absmax.numel() % blocks == 0 for w in weights),
        NESTED_BLOCKSIZE=0 if like.nested_absmax is None else like.nested_blocksize,
        HALF=blocksize // 2,
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )


def dequantize_nf4(
    weights: NF4Storage | Sequence[NF4Storage],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return weights of equal in_features one below the other, (sum of out_features, in_features).

    weights: one weight or several. They take one launch if all are stored in one way (block sizes,
        nested or plain), otherwise one launch each.
    dtype: float32, float16 or bfloat16.
    out: destination, possibly a range of columns of wider rows; by default a new tensor.

    Raises: ValueError if a size or dtype does not fit.
    """
    weights = [weights] if isinstance(weights, NF4Storage) else list(weights)
    for weight in weights:
        weight.check()
    shapes = [weight.shape for weight in weights]
    out, outs = backend.rows_of_weights(shapes, dtype, weights[0].packed.device, out)
    storage = {(w.blocksize, w.nested_blocksize, w.nested_absmax is None) for w in weights}
    if not backend.use_triton(weights[0].packed):
        for weight, part in zip(weights, outs, strict=True):
            part.copy_(dequantize_nf4_reference(weight, dtype))
    elif len(storage) == 1:
        _launch(weights, outs)
    else:
        for weight, part in zip(weights, outs, strict=True):
            _launch([weight], [part])
    return out

"""NF4 weights back to 16 or 32 bit.

Two 4-bit codes a byte, the even element in the high nibble, in blocks of 64 along the flattened row-major weight:

    value[i] = dtype(code[nibble[i]] * scale[i // 64])                                   multiplied in float32
    scale[b] = absmax[b]                                                                 plain: float32
    scale[b] = nested_code[absmax[b]] * nested_absmax[b // 256] + nested_offset          nested: uint8, in float32

Bit for bit what bitsandbytes dequantises: the product and the sum of a nested scale are rounded one after the other,
so the kernel is compiled without fused multiply-add.

Moves 0.5 + 1/64 bytes in (nested) and 2 out a parameter at 16 bit: 80% of the traffic is the output, and the kernel
has nothing else to do, so it should run at the speed of a copy. Looking codes up through registers gains nothing; a
tree of selects halves the speed; a 64-bit division a block costs a fifth. Small weights don't fill a GPU, so linears
that are multiplied as one (q, k, v) are one launch; their values go below each other, into a range of columns of a
wider tensor where a LoRA branch needs that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import backend
from .backend import cdiv, require, tl, triton

CHUNK_BYTES = (
    1 << 18
)  # bytes that the reference unpacks at a time: the unpacked 2 MB stay in the CPU's cache
# Quantisation blocks a program, the first that a row has as many of. On an H200 in November 2026, the seven linears of
# an 8B layer: 0.149 ms, 3.7 TB/s; a copy runs at 4.25, a fill at 3.3. Dividing to find a block's row took 0.158 ms.
BLOCKS = (64, 32, 8)


def dequantize_nf4_reference(weight, dtype):
    """A table of the 256 pairs of values turns a byte into two floats with one 8-byte copy."""
    packed, absmax, blocksize = (
        weight.packed.reshape(-1),
        weight.absmax.reshape(-1),
        weight.blocksize,
    )
    if weight.nested_absmax is not None:
        coarse = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
        absmax = weight.nested_code[absmax.int()] * coarse + weight.nested_offset
    byte = torch.arange(256, device=packed.device)
    pairs = (
        torch.stack([weight.code[byte >> 4], weight.code[byte & 15]], dim=1)
        .view(torch.int64)
        .view(256)
    )
    out = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    flat, n = out.view(-1), out.numel()
    step = max(CHUNK_BYTES // blocksize, 1) * blocksize  # bytes; a whole number of blocks
    for first in range(0, packed.numel(), step):
        values = pairs.index_select(0, packed[first : first + step].int()).view(torch.float32)
        scale = absmax[2 * first // blocksize :][: cdiv(values.numel(), blocksize)]
        target = flat[2 * first : 2 * first + values.numel()]
        if n % blocksize:
            scale = scale.repeat_interleave(blocksize)
            torch.mul(values[: target.numel()], scale[: target.numel()], out=target)
        else:
            torch.mul(values.view(-1, blocksize), scale[:, None], out=target.view(-1, blocksize))
    return out


@triton.jit
def _dequantize_part(
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
    """BLOCKS quantisation blocks of HALF bytes each, of one weight. WHOLE: all are there, in one row or two."""
    first = pid.to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    live = block < n // (2 * HALF) + (n % (2 * HALF) > 0) - first
    if NESTED_BLOCKSIZE:
        code = (
            tl.load(absmax_ptr + first + block)
            if WHOLE
            else tl.load(absmax_ptr + first + block, mask=live, other=0)
        )
        coarse_ptr = nested_absmax_ptr + (first + block) // NESTED_BLOCKSIZE
        coarse = tl.load(coarse_ptr) if WHOLE else tl.load(coarse_ptr, mask=live, other=0.0)
        scale = tl.load(nested_code_ptr + code.to(tl.int32)) * coarse + tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + first + block, mask=live, other=0.0)

    byte_at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    packed_ptr += first * HALF
    if WHOLE:
        byte = tl.load(packed_ptr + byte_at).to(tl.int32)
    else:
        byte = tl.load(packed_ptr + byte_at, mask=(first * HALF + byte_at) * 2 < n, other=0).to(
            tl.int32
        )
    even = tl.load(code_ptr + (byte >> 4)) * scale[:, None]
    odd = tl.load(code_ptr + (byte & 15)) * scale[:, None]
    value = tl.reshape(tl.join(even, odd), (BLOCKS, 2 * HALF)).to(out_ptr.dtype.element_ty)
    if WHOLE:
        blocks = in_features // (2 * HALF)  # of a row
        row = pid * BLOCKS // blocks
        out_ptr += first * (2 * HALF) + row.to(tl.int64) * (out_row_stride - in_features)
        gap = tl.where(block < blocks - pid * BLOCKS % blocks, 0, out_row_stride - in_features)
        tl.store(out_ptr + (gap[:, None] + at), value)
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
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Weight i of PARTS belongs to the programs from first_programs[i] to first_programs[i + 1]."""
    pid = tl.program_id(0)
    for i in tl.static_range(PARTS):
        if (pid >= first_programs[i]) & (pid < first_programs[i + 1]):
            _dequantize_part(
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


@dataclass
class QuantizedWeight:
    """What a 4-bit weight (out_features, in_features) is stored as.

    packed: uint8, one byte for two elements. absmax: one scale a block, float32; or with nested_absmax (float32, one
    for every nested_blocksize blocks), nested_code (256,) and nested_offset (float32, 0-dim): uint8 codes.
    code: the 16 values.
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
        """ValueError where a size or dtype does not fit the shape."""
        n, size = self.shape[0] * self.shape[1], self.blocksize
        blocks, nested = cdiv(n, size), self.nested_absmax is not None
        power = size >= 2 and size & (size - 1) == 0
        require(power, f"blocksize is {size}; NF4 blocks are a power of two, 64 as a rule")
        packed, absmax, code = self.packed, self.absmax, self.code
        require(
            packed.dtype == torch.uint8, f"packed weights are {packed.dtype}; expected torch.uint8"
        )
        require(
            packed.numel() == (n + 1) // 2,
            f"{packed.numel()} packed bytes for shape {self.shape}: not {n} elements",
        )
        require(
            absmax.numel() == blocks,
            f"{absmax.numel()} scales; {n} elements in blocks of {size} have {blocks}",
        )
        wanted, kind = (torch.uint8, "nested") if nested else (torch.float32, "plain")
        require(absmax.dtype == wanted, f"{kind} scales are {absmax.dtype}; expected {wanted}")
        fits = code.numel() == 16 and code.dtype == torch.float32
        require(fits, f"the code is {tuple(code.shape)} {code.dtype}, not 16 float32")
        if nested:
            have, want = self.nested_absmax.numel(), cdiv(blocks, self.nested_blocksize)
            require(
                have == want,
                f"{have} nested scales; {blocks} blocks in groups of {self.nested_blocksize} have {want}",
            )
            missing = (
                self.nested_code is None
                or self.nested_offset is None
                or self.nested_code.numel() != 256
            )
            require(not missing, "nested scales need nested_code (256,) and nested_offset as well")


def dequantize_nf4(
    weights: QuantizedWeight | Sequence[QuantizedWeight],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights of one in_features below each other (sum of out_features, in_features), in dtype.

    They are written into `out` where that is given; its rows may be part of wider ones. One launch where all weights
    are stored in one way. ValueError where a size or dtype does not fit.
    """
    weights = [weights] if isinstance(weights, QuantizedWeight) else list(weights)
    for weight in weights:
        weight.check()
    first, in_features = weights[0], weights[0].shape[1]
    require(
        all(w.shape[1] == in_features for w in weights),
        f"shapes {[w.shape for w in weights]} differ in in_features",
    )
    shape = sum(w.shape[0] for w in weights), in_features
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=first.packed.device)
    fits = (
        tuple(out.shape) == shape and out.dtype == dtype and (out.stride(1) == 1 or not out.numel())
    )
    require(
        fits,
        f"out is {tuple(out.shape)} {out.dtype}; expected {shape} {dtype} with contiguous rows",
    )
    parts = out.split([w.shape[0] for w in weights])
    storage = {(w.blocksize, w.nested_blocksize, w.nested_absmax is None) for w in weights}
    if not backend.use_triton(first.packed):
        for weight, part in zip(weights, parts, strict=True):
            part.copy_(dequantize_nf4_reference(weight, dtype))
    elif len(storage) == 1:
        _launch(weights, parts)
    else:
        for weight, part in zip(weights, parts, strict=True):
            _launch([weight], [part])
    return out


def _launch(weights, parts):
    in_features, blocksize = weights[0].shape[1], weights[0].blocksize
    blocks = next((n for n in BLOCKS if n * blocksize <= in_features), BLOCKS[-1])
    whole = in_features % blocksize == 0 and in_features >= blocks * blocksize
    first_programs = [0]
    for weight in weights:
        first_programs.append(first_programs[-1] + cdiv(weight.absmax.numel(), blocks))
    if not first_programs[-1]:
        return
    tensors = [
        (w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code, w.nested_offset)
        for w in weights
    ]
    _dequantize[(first_programs[-1],)](
        *zip(*tensors, strict=True),
        tuple(parts),
        tuple(w.shape[0] * w.shape[1] for w in weights),
        tuple(first_programs),
        in_features,
        parts[0].stride(0),
        PARTS=len(weights),
        WHOLE=whole and all(w.absmax.numel() % blocks == 0 for w in weights),
        NESTED_BLOCKSIZE=0 if weights[0].nested_absmax is None else weights[0].nested_blocksize,
        HALF=blocksize // 2,
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )

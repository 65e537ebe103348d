"""NF4 weights back to 16 or 32 bit.

Two 4-bit codes a byte, the even element in the high nibble, in blocks of 64 along the flattened row-major weight:

    value[i] = dtype(code[nibble[i]] * scale[i // 64])                                   multiplied in float32
    scale[b] = absmax[b]                                                                 plain: float32
    scale[b] = nested_code[absmax[b]] * nested_absmax[b // 256] + nested_offset          nested: uint8, in float32

Bit for bit what bitsandbytes dequantises: the product and the sum of a nested scale are rounded one after the other,
so the kernel is compiled without fused multiply-add.

Moves 0.5 + 1/64 bytes in (nested) and 2 out a parameter at 16 bit: 80% of the traffic is the output, and the kernel
has nothing else to do, so it should run at the speed of a copy.
"""

import torch

from . import launch
from .launch import cdiv, require, tl, triton

CHUNK = 1 << 18  # bytes that the reference unpacks at a time: the unpacked 2 MB stay in the CPU's cache
BLOCKS = 64  # quantisation blocks a program: 2 KB in, 8 KB out at 16 bit


def dequantize_nf4_reference(packed, absmax, code, out, blocksize, nested_absmax, nested_code, nested_offset, nested):
    """Fills out. A table of the 256 pairs of values turns a byte into two floats with one 8-byte copy."""
    if nested_absmax is not None:
        coarse = nested_absmax.repeat_interleave(nested)[: absmax.numel()]
        absmax = nested_code[absmax.int()] * coarse + nested_offset
    byte = torch.arange(256, device=code.device)
    pairs = torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.int64).view(256)
    flat, n = out.view(-1), out.numel()
    step = max(CHUNK // blocksize, 1) * blocksize  # bytes; a whole number of blocks
    for first in range(0, packed.numel(), step):
        values = pairs.index_select(0, packed[first : first + step].int()).view(torch.float32)
        scale = absmax[2 * first // blocksize :][: cdiv(values.numel(), blocksize)]
        target = flat[2 * first : 2 * first + values.numel()]
        if n % blocksize:
            scale = scale.repeat_interleave(blocksize)
            torch.mul(values[: target.numel()], scale[: target.numel()], out=target)
        else:
            torch.mul(values.view(-1, blocksize), scale[:, None], out=target.view(-1, blocksize))


@triton.jit
def _dequantize(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    n,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: BLOCKS quantisation blocks of HALF bytes each."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block * (2 * HALF) < n
    if NESTED:
        fine = tl.load(nested_code_ptr + tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32))
        coarse = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=live, other=0.0)
        scale = fine * coarse + tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=live, other=0.0)

    byte_at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(packed_ptr + byte_at, mask=byte_at * 2 < n, other=0).to(tl.int32)
    even = tl.load(code_ptr + (byte >> 4)) * scale[:, None]
    odd = tl.load(code_ptr + (byte & 15)) * scale[:, None]
    value = tl.reshape(tl.join(even, odd), (BLOCKS, 2 * HALF))
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < n)


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    nested_blocksize: int = 256,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight of the given shape (out_features, in_features) in dtype, written into `out` where that is given.

    packed: uint8, one byte for two elements. absmax: one scale a block, float32; or with nested_absmax (float32, one
    for every nested_blocksize blocks), nested_code (256,) and nested_offset (float32, 0-dim): uint8 codes.
    code: the 16 values. ValueError where a size or dtype does not fit the shape.
    """
    n = shape[0] * shape[1]
    blocks, nested = cdiv(n, blocksize), nested_absmax is not None
    power = blocksize >= 2 and blocksize & (blocksize - 1) == 0
    require(power, f"blocksize is {blocksize}; NF4 blocks are a power of two, 64 as a rule")
    require(packed.dtype == torch.uint8, f"packed weights are {packed.dtype}; expected torch.uint8")
    require(packed.numel() == (n + 1) // 2, f"{packed.numel()} packed bytes for shape {tuple(shape)}: not {n} elements")
    require(absmax.numel() == blocks, f"{absmax.numel()} scales; {n} elements in blocks of {blocksize} have {blocks}")
    wanted = torch.uint8 if nested else torch.float32
    require(absmax.dtype == wanted, f"{'nested' if nested else 'plain'} scales are {absmax.dtype}; expected {wanted}")
    require(
        code.numel() == 16 and code.dtype == torch.float32,
        f"the code is {tuple(code.shape)} {code.dtype}, not 16 float32",
    )
    if nested:
        have, want = nested_absmax.numel(), cdiv(blocks, nested_blocksize)
        require(have == want, f"{have} nested scales; {blocks} blocks in groups of {nested_blocksize} have {want}")
        missing = nested_code is None or nested_offset is None or nested_code.numel() != 256
        require(not missing, "nested scales need nested_code (256,) and nested_offset as well")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    fits = tuple(out.shape) == tuple(shape) and out.dtype == dtype and out.is_contiguous()
    require(fits, f"out is {tuple(out.shape)} {out.dtype}; expected a contiguous {tuple(shape)} {dtype}")
    packed, absmax = packed.reshape(-1), absmax.reshape(-1)
    if not launch.use_triton(packed):
        dequantize_nf4_reference(
            packed, absmax, code, out, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize
        )
    elif n:
        _dequantize[(cdiv(blocks, BLOCKS),)](
            packed,
            absmax,
            code,
            nested_absmax,
            nested_code,
            nested_offset,
            out,
            n,
            NESTED=nested,
            NESTED_BLOCKSIZE=nested_blocksize,
            HALF=blocksize // 2,
            BLOCKS=BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out

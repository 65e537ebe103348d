"""Timed dequantisation of a layer's linears, from NF4 and from each GGUF type, beside a copy.

Linears that share an input go into one buffer, with columns for the LoRA rank, as in a step.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmark.kernel_cases import BF16, KernelCase, KernelSizes, direct
from minitune.kernels.dequantize_ggml import (
    GgmlStorage,
    dequantize_ggml,
    dequantize_ggml_reference,
)
from minitune.kernels.dequantize_nf4 import dequantize_nf4
from minitune.kernels.ggml_reference import BLOCK_SIZES
from minitune.kernels.lora_linear import padded_rank
from minitune.model.nf4 import BLOCKSIZE as NF4_BLOCKSIZE
from minitune.model.nf4 import NESTED_BLOCKSIZE, NF4, dynamic_map, nf4_code

FINITE = 0xBF  # cleared bits of a byte, without which no float16 is infinite or NaN

Groups = list[list[tuple[int, int]]]  # shapes of the linears that share an input


def nf4_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield a layer's linears in NF4 with nested scales."""
    groups = _groups(s)

    def reference(unpack: Callable, dtype: torch.dtype = BF16) -> Callable:
        return lambda weights: [_unpacked(w, unpack, dtype) for group in weights for w in group]

    yield KernelCase(
        kernel="dequantize_nf4",
        shape=_title(groups),
        inputs=lambda: ([[_random_nf4(x, device) for x in shapes] for shapes in groups],),
        exact=reference(_unpack, torch.float32),
        work=_values(groups) * (0.5 + 1 / NF4_BLOCKSIZE + BF16.itemsize),
        unit="copy",
        makers={
            "ours": direct(partial(_dequantize_groups, dequantize_nf4, s.R)),
            "eager": direct(reference(_unpack)),
            "compile": direct(reference(torch.compile(_unpack, dynamic=False))),
        },
    )


def ggml_cases(s: KernelSizes, device: str) -> Iterator[KernelCase]:
    """Yield a layer's linears in each GGUF type whose blocks divide their rows."""
    groups = _groups(s)
    for name, (width, size) in BLOCK_SIZES.items():
        if any(shape[1] % width for shapes in groups for shape in shapes):
            continue

        def inputs(name: str = name) -> tuple:
            return ([[_random_ggml(name, x, device) for x in shapes] for shapes in groups],)

        yield KernelCase(
            kernel=f"dequantize_ggml {name}",
            shape=_title(groups),
            inputs=inputs,
            exact=_ggml_values,
            work=_values(groups) * (size / width + BF16.itemsize),
            unit="copy",
            makers={"ours": direct(partial(_dequantize_groups, dequantize_ggml, s.R))},
        )


def _groups(s: KernelSizes) -> Groups:
    return [[(out, width) for out in outs] for outs, width in s.linears.values()]


def _values(groups: Groups) -> int:
    return sum(out * width for shapes in groups for out, width in shapes)


def _title(groups: Groups) -> str:
    return f"{sum(map(len, groups))} linears, {_values(groups) / 1e6:.0f} M"


def _dequantize_groups(
    dequantize: Callable, rank: int, weights: Sequence[Sequence[NF4 | GgmlStorage]]
) -> list[Tensor]:
    """Return all weights in bf16, those of a group in one buffer."""
    found = []
    for group in weights:
        rows, width = [w.shape[0] for w in group], group[0].shape[1]
        columns = width + padded_rank(rank * len(rows))
        buffer = torch.empty(sum(rows), columns, device=_device(group[0]), dtype=BF16)
        found += dequantize(group, BF16, out=buffer[:, :width]).split(rows)
    return found


def _device(weight: NF4 | GgmlStorage) -> torch.device:
    return (weight.blocks if isinstance(weight, GgmlStorage) else weight.packed).device


def _ggml_values(weights: list[list[GgmlStorage]]) -> list[Tensor]:
    return [dequantize_ggml_reference(w, torch.float32) for group in weights for w in group]


def _random_ggml(name: str, shape: tuple[int, int], device: str) -> GgmlStorage:
    width, size = BLOCK_SIZES[name]
    data = (shape[0], shape[1] // width * size)
    blocks = torch.randint(0, 256, data, dtype=torch.uint8, device=device)
    return GgmlStorage(blocks.bitwise_and_(FINITE), name, shape)


def _unpacked(w: NF4, unpack: Callable, dtype: torch.dtype) -> Tensor:
    parts = (w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code, w.nested_offset)
    return unpack(*parts, dtype).view(w.shape)


def _unpack(packed, absmax, code, nested_absmax, nested_code, nested_offset, dtype):
    coarse = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    scale = nested_code[absmax.int()] * coarse + nested_offset
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1, NF4_BLOCKSIZE)
    return (code[nibbles.int()] * scale[:, None]).to(dtype)


def _random_nf4(shape: tuple[int, int], device: str) -> NF4:
    count = shape[0] * shape[1]
    blocks = count // NF4_BLOCKSIZE
    return NF4(
        packed=torch.randint(0, 256, (count // 2,), dtype=torch.uint8, device=device),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        code=nf4_code(torch.device(device)),
        shape=shape,
        nested_absmax=torch.rand(-(-blocks // NESTED_BLOCKSIZE), device=device),
        nested_code=dynamic_map(torch.device(device)),
        nested_offset=torch.tensor(0.1, device=device),
    )


GROUPS = (nf4_cases, ggml_cases)

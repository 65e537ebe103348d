"""The door of the quantisers: rows of weights to the bytes of a GGUF type, and back.

Rows are converted in chunks, so the temporaries are bounded. On the CPU a chunk fits the cache, and
each thread converts chunks of its own: threads that share an eager operation would wait for each
other at its end. A GPU gets larger chunks, because each operation costs a launch.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.gguf.quantization import iq4, simple_blocks
from minitune.gguf.quantization.columns import column_sums
from minitune.gguf.quantization.k_quants import K_QUANTIZERS
from minitune.gguf.quantization.k_searches import EAGER_STEPS, Steps
from minitune.kernels.ggml_reference import BLOCK_DEQUANTIZERS

BLOCK_QUANTIZERS = {
    **simple_blocks.BLOCK_QUANTIZERS,
    **iq4.BLOCK_QUANTIZERS,
    **K_QUANTIZERS,
}
FLOAT_DTYPES = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}
CPU_CHUNK = 1 << 18  # values
GPU_CHUNK = 1 << 23  # values
ROW_GROUP = 32  # rows of a chunk are a multiple, with which column sums have ggml's order


def quantize(
    values: Tensor,
    kind: GGMLType,
    importance: Tensor | None = None,
    steps: Steps = EAGER_STEPS,
) -> Tensor:
    """Return the bytes of `values` stored as `kind`.

    values: weights (..., width) of any float dtype, on any device.
    kind: a GGUF type whose block width divides the width.
    importance: mean squares of the linear's inputs, float32 (width,), or None.
    steps: of the searches, from fusion.py.

    Returns: uint8 (..., bytes a row) on the device of `values`.

    Raises: ValueError if the width is no multiple of the block width, a value is not finite, or
        a value is beyond float16 and `kind` stores float16.
    """
    width = values.shape[-1]
    block_width, block_bytes = GGML_QUANT_SIZES[kind]
    if width % block_width:
        raise ValueError(
            f"rows of {width} values have no whole number of {kind.name} blocks; "
            f"choose a type whose block width divides {width}, not {block_width}"
        )
    rows = values.detach().reshape(-1, width)
    data = rows.new_empty((len(rows), width // block_width * block_bytes), dtype=torch.uint8)

    @torch.no_grad()
    def convert(part: Tensor, target: Tensor) -> None:
        """Write the bytes of some rows."""
        check_range(part, kind)
        if kind in FLOAT_DTYPES:
            target.view(FLOAT_DTYPES[kind]).copy_(part)
        else:
            target.copy_(_quantize_rows(part, kind, importance, steps).view(target.shape))

    # A compiled step keeps Python's lock and has threads of its own.
    in_threads = steps is EAGER_STEPS or kind not in K_QUANTIZERS
    _for_each_chunk(convert, rows, data, width, in_threads)
    return data.view(*values.shape[:-1], data.shape[1])


def _quantize_rows(rows: Tensor, kind: GGMLType, importance: Tensor | None, steps: Steps) -> Tensor:
    """Return the blocks (N, bytes of a block) of some rows."""
    rows = rows.float().contiguous()
    block_width = GGML_QUANT_SIZES[kind][0]
    blocks = rows.view(-1, block_width)
    if importance is None or kind == GGMLType.Q8_0:  # Q8_0 makes no choices
        return BLOCK_QUANTIZERS[kind](blocks, None, None, steps)
    width = rows.shape[1]
    weights = importance.expand_as(rows).reshape(-1, block_width)
    mean_squares = column_sums(rows.square().t().contiguous()).div_(rows.new_tensor(float(width)))
    of_blocks = mean_squares.repeat_interleave(width // block_width)
    return BLOCK_QUANTIZERS[kind](blocks, weights, of_blocks[:, None], steps)


def check_range(values: Tensor, kind: GGMLType) -> None:
    """Raise ValueError if a value is not finite, or too large for the floats of the type."""
    low, high = values.aminmax()
    magnitude = torch.maximum(high, -low).item()
    if not magnitude < math.inf:
        raise ValueError(f"a weight is {magnitude:g}; the weights must be finite")
    stored = FLOAT_DTYPES.get(kind, torch.float16)  # blocks have float16 scales
    if magnitude > torch.finfo(stored).max:
        name = str(stored).removeprefix("torch.")
        raise ValueError(f"{magnitude:g} does not fit into {name}; export as bf16")


def dequantize(data: Tensor, kind: GGMLType) -> Tensor:
    """Return the values of rows that are stored as `kind`.

    data: uint8 (..., bytes a row), on any device.

    Returns: float32 (..., width) on the device of `data`.
    """
    block_width, block_bytes = GGML_QUANT_SIZES[kind]
    width = data.shape[-1] // block_bytes * block_width
    rows = data.reshape(-1, data.shape[-1])
    values = rows.new_empty((len(rows), width), dtype=torch.float32)

    def convert(part: Tensor, target: Tensor) -> None:
        """Write the values of some rows."""
        if kind in FLOAT_DTYPES:
            target.copy_(part.contiguous().view(FLOAT_DTYPES[kind]))
        else:
            blocks = part.reshape(-1, block_bytes)
            target.copy_(BLOCK_DEQUANTIZERS[kind.name](blocks).view(target.shape))

    _for_each_chunk(convert, rows, values, width, in_threads=True)
    return values.view(*data.shape[:-1], width)


def _for_each_chunk(
    convert: Callable[[Tensor, Tensor], None],
    source: Tensor,
    target: Tensor,
    width: int,
    in_threads: bool,
) -> None:
    """Call `convert` with chunks of the rows of `source` and `target`.

    width: values of a row.
    in_threads: convert several chunks at a time on the CPU.
    """
    if not len(source) or not width:
        return
    on_cpu = source.device.type == "cpu"
    groups = (CPU_CHUNK if on_cpu else GPU_CHUNK) // (width * ROW_GROUP)
    rows = max(1, groups) * ROW_GROUP
    chunks = (source.split(rows), target.split(rows))
    threads = torch.get_num_threads()
    if not (on_cpu and in_threads) or threads == 1 or len(chunks[0]) == 1:
        for part in zip(*chunks, strict=True):
            convert(*part)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(convert, *chunks))
    finally:
        torch.set_num_threads(threads)  # for new threads, which inherit the workers' number

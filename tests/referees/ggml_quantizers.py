"""Compare the quantisers with ggml's, block by block, and write the golden data of the tests.

    python tests/referees/ggml_quantizers.py compare --library libggml-base.so [--model DIR]
        One row for each type and input: the share of identical blocks, and the quotient of our
        RMSE and ggml's, without and with an importance.

    python tests/referees/ggml_quantizers.py golden --library libggml-base.so
        Write tests/ggml_quantizers.npz: of each case the sha256 of ggml's bytes, a 16-bit digest
        of each 256 values, and ggml's RMSE.

    python tests/referees/ggml_quantizers.py rate [--library libggml-base.so] [--device cuda]
        Values a second of our quantisers and dequantisers, with all threads, beside gguf-py's
        dequantisers and ggml's quantisers, which use one thread.

--library defaults to the environment variable GGML_LIBRARY. `--types Q4_K,Q6_K` limits a table.

The seeded inputs are the same on every machine: PCG64's raw integers, and operations that IEEE 754
rounds exactly.
"""

import argparse
import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as GGMLType
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minitune.config.cli import CommandParser, run_command
from minitune.gguf.quantization.quantize import BLOCK_QUANTIZERS, dequantize, quantize
from referees.reporting import markdown_table

GOLDEN = Path(__file__).resolve().parents[1] / "ggml_quantizers.npz"
ROWS, WIDTH = 32, 1024
RUN = 256  # values of a digest
SIMPLE_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
SEARCHING_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
FLOAT_TYPES = ("F16", "BF16")
ALL_TYPES = (*FLOAT_TYPES, *SIMPLE_TYPES, *SEARCHING_TYPES)
REAL_ROWS = 256  # of each tensor of a model
RATE_ROWS = 2048  # of WIDTH values
REPEATS = 5  # of a measured call


class Ggml:
    """ggml's quantisers, called in its shared library."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]

    def quantize(
        self, values: np.ndarray, kind: GGMLType, importance: np.ndarray | None
    ) -> np.ndarray:
        """Return the bytes (rows, bytes a row) of values (rows, width), both C-contiguous."""
        rows, width = values.shape
        block_width, block_bytes = GGML_QUANT_SIZES[kind]
        data = np.zeros((rows, width // block_width * block_bytes), np.uint8)
        self.library.ggml_quantize_init(int(kind))
        written = self.library.ggml_quantize_chunk(
            int(kind),
            values.ctypes.data,
            data.ctypes.data,
            0,
            rows,
            width,
            None if importance is None else importance.ctypes.data,
        )
        assert written == data.nbytes, f"ggml wrote {written} bytes instead of {data.nbytes}"
        return data


class ExactRandom:
    """Random numbers that are the same on every machine."""

    def __init__(self, seed: int):
        self.integers = np.random.PCG64(seed)

    def normal(self, count: int) -> np.ndarray:
        """Return float64 values of mean 0 and variance 1: sums of 16 uniform integers."""
        raw = self.integers.random_raw(16 * count).reshape(16, count) >> np.uint64(32)
        # The variance of a sum of 16 integers below 2^32 is 2^64 16 / 12.
        centred = raw.sum(0).astype(np.float64) - 8.0 * (2.0**32 - 1)
        return centred / (2.0**32 * np.sqrt(16 / 12))

    def student(self, count: int) -> np.ndarray:
        """Return float64 values of Student's distribution with 3 degrees of freedom."""
        a, b, c = (self.normal(count) for _ in range(3))
        return self.normal(count) / np.sqrt((a * a + b * b + c * c) / 3)


def seeded_inputs() -> dict[str, np.ndarray]:
    """Return the named inputs (ROWS, WIDTH), float32."""
    random = ExactRandom(7)
    shape = (ROWS, WIDTH)
    outlier = 0.02 * random.normal(ROWS * WIDTH).reshape(shape)
    outlier[np.arange(ROWS), 31 * np.arange(ROWS)] = 3.0
    inputs = {
        "Gaussian": 0.02 * random.normal(ROWS * WIDTH).reshape(shape),
        "Student": 0.02 * random.student(ROWS * WIDTH).reshape(shape),
        "constant": np.repeat(0.02 * random.student(ROWS), WIDTH).reshape(shape),
        "zero": np.zeros(shape),
        "outlier": outlier,
        "edges": _edges(random.normal(ROWS * WIDTH).reshape(shape)),
    }
    return {name: values.astype(np.float32) for name, values in inputs.items()}


def _edges(values: np.ndarray) -> np.ndarray:
    """Return rows of tiny, subnormal, huge, tied, sparse and one-sided values."""
    values[0:4] *= 1e-30
    values[4:8] *= 1e-40
    values[8:12] *= 1e4
    values[12:14] = np.where(values[12:14] < 0, -0.0, 0.0)
    values[14:16] = np.where(values[14:16] < 0, -0.25, 0.25)  # the first of equals decides
    values[16:18] = np.round(values[16:18] * 8) / 16  # halves between two quantised values
    values[18:20, ::3] = -0.0
    values[20:24] = np.abs(values[20:24])
    values[24:28] = -np.abs(values[24:28])
    values[28:30] *= np.where(np.arange(WIDTH) % 64 < 32, 0.0, 1.0)  # every second block is zero
    values[30:32] *= 2e-6  # scales that are subnormal in float16
    return values


def seeded_importance() -> np.ndarray:
    """Return mean squares (WIDTH,), float32. Some are zero, as of inputs that never fired."""
    importance = ExactRandom(11).student(WIDTH) ** 2
    importance[32:64] = 0
    importance[100:110] = 0
    importance[512:768] = 0
    return importance.astype(np.float32)


def model_inputs(folder: Path) -> dict[str, np.ndarray]:
    """Return up to REAL_ROWS rows of a few matrices of a model."""
    inputs = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in (
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.15.self_attn.v_proj.weight",
            "model.embed_tokens.weight",
        ):
            values = file.get_slice(name)[:REAL_ROWS].float()
            width = values.shape[1] // RUN * RUN
            inputs[name.split(".")[-2]] = values[:, :width].contiguous().numpy()
    return inputs


@dataclass(frozen=True)
class Case:
    """One input, quantised to one type."""

    kind: GGMLType
    input_name: str
    values: np.ndarray
    importance: np.ndarray | None

    @property
    def name(self) -> str:
        """Return the name of the case in the golden data."""
        return f"{self.kind.name} {self.input_name} {'plain' if self.importance is None else 'imp'}"

    def ours(self) -> np.ndarray:
        """Return our bytes."""
        importance = None if self.importance is None else torch.from_numpy(self.importance)
        return quantize(torch.from_numpy(self.values), self.kind, importance).numpy()

    def rmse(self, data: np.ndarray) -> float:
        """Return the root mean square error of the bytes, weighted by the importance."""
        error = quants.dequantize(data, self.kind).astype(np.float64) - self.values
        weight = 1.0 if self.importance is None else self.importance.astype(np.float64)
        return float(np.sqrt(np.mean(weight * error * error)))

    def identical(self, data: np.ndarray, expected: np.ndarray) -> float:
        """Return the share of identical blocks."""
        block_bytes = GGML_QUANT_SIZES[self.kind][1]
        same = (data == expected).reshape(-1, block_bytes).all(1)
        return float(same.mean())

    def digests(self, data: np.ndarray) -> np.ndarray:
        """Return a 16-bit digest of the bytes of each RUN values."""
        block_width, block_bytes = GGML_QUANT_SIZES[self.kind]
        runs = data.reshape(-1, RUN // block_width * block_bytes)
        parts = b"".join(hashlib.sha256(run.tobytes()).digest()[:2] for run in runs)
        return np.frombuffer(parts, "<u2")


@dataclass(frozen=True)
class Golden:
    """ggml's results of one case: sha256 of the bytes, digest of each RUN values, RMSE."""

    sha256: bytes
    digests: np.ndarray
    error: float


def golden_data() -> dict[str, Golden]:
    """Return the golden data by the name of the case."""
    with np.load(GOLDEN) as file:
        columns = [file[name] for name in ("names", "hashes", "digests", "errors")]
    return {
        str(name): Golden(sha256.tobytes(), digests, float(error))
        for name, sha256, digests, error in zip(*columns, strict=True)
    }


def cases(inputs: dict[str, np.ndarray], types: tuple[str, ...]) -> Iterator[Case]:
    """Yield every input in every type, without and with an importance."""
    importance = seeded_importance()
    for kind in (GGMLType[name] for name in types):
        for input_name, values in inputs.items():
            yield Case(kind, input_name, values, None)
            if kind.name not in FLOAT_TYPES:
                tiled = np.resize(importance, values.shape[1])
                yield Case(kind, input_name, values, tiled)


def compare(args: argparse.Namespace) -> str:
    """Return the table of identical blocks and errors."""
    ggml = Ggml(args.library)
    inputs = seeded_inputs() | (model_inputs(args.model) if args.model else {})
    rows: dict[tuple[str, str], list[str]] = {}
    for case in cases(inputs, args.types):
        theirs = ggml.quantize(case.values, case.kind, case.importance)
        ours = case.ours()
        error, reference = case.rmse(ours), case.rmse(theirs)
        ratio = error / reference if reference else float(error == 0)
        cells = rows.setdefault((case.kind.name, case.input_name), [])
        cells += [f"{100 * case.identical(ours, theirs):.2f}%", f"{ratio:.5f}"]
    columns = ["type", "input", "identical", "RMSE ratio", "identical, imp.", "RMSE ratio, imp."]
    return markdown_table(columns, [[*key, *cells] for key, cells in rows.items()])


def rate(args: argparse.Namespace) -> str:
    """Return the table of rates, in million values a second."""
    ggml = Ggml(args.library) if args.library else None
    values = np.tile(seeded_inputs()["Gaussian"], (RATE_ROWS // ROWS, 1))
    few = values[: RATE_ROWS // 8]
    importance = seeded_importance()
    weights = torch.from_numpy(values).to(args.device)
    importance_there = torch.from_numpy(importance).to(args.device)
    rows = []
    for kind in (GGMLType[name] for name in args.types):
        data = quantize(weights, kind)
        host = data[: len(few)].cpu().numpy()
        cells = [
            mega(values.size, partial(quantize, weights, kind)),
            mega(values.size, partial(quantize, weights, kind, importance_there)),
            mega(values.size, partial(dequantize, data, kind)),
            mega(few.size, partial(quants.dequantize, host, kind)),
        ]
        if ggml:
            for theirs in (None, importance):
                cells.append(mega(few.size, partial(ggml.quantize, few, kind, theirs)))
        rows.append([kind.name, *cells])
    columns = ["type", "ours", "ours, imp.", "ours, back", "gguf-py, back"]
    return markdown_table(columns + ["ggml", "ggml, imp."] * bool(ggml), rows)


def mega(count: int, function: Callable[[], object]) -> str:
    """Return `count`, in millions, divided by the shortest of a few times of a function."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return f"{count / min(times) / 1e6:.0f}"


def golden(args: argparse.Namespace) -> str:
    """Write the golden data, and return one line about the file."""
    ggml = Ggml(args.library)
    names, hashes, digests, errors = [], [], [], []
    for case in cases(seeded_inputs(), args.types):
        data = ggml.quantize(case.values, case.kind, case.importance)
        names.append(case.name)
        hashes.append(np.frombuffer(hashlib.sha256(data.tobytes()).digest(), np.uint8))
        digests.append(case.digests(data))
        errors.append(case.rmse(data))
    np.savez_compressed(
        GOLDEN,
        names=np.array(names),
        hashes=np.stack(hashes),
        digests=np.stack(digests),
        errors=np.array(errors),
    )
    return f"{GOLDEN}: {len(names)} cases, {GOLDEN.stat().st_size:,} bytes"


def run(arguments: Sequence[str] | None) -> None:
    """Run the command line and print its result."""
    form = argparse.RawDescriptionHelpFormatter
    parser = CommandParser("ggml_quantizers.py", description=__doc__, formatter_class=form)
    parser.add_argument("command", choices=["compare", "golden", "rate"])
    library = os.environ.get("GGML_LIBRARY")
    parser.add_argument("--library", type=Path, default=library)
    parser.add_argument("--model", type=Path, help="folder with model.safetensors")
    parser.add_argument("--device", default="cpu", help="of the rates: cpu or cuda")
    parser.add_argument("--types", default=None, help="names, with commas between them")
    args = parser.parse_args(arguments)
    if args.library is None and args.command != "rate":
        raise ValueError(f"{args.command} needs --library, a libggml-base.so")
    known = (*FLOAT_TYPES, *(kind.name for kind in BLOCK_QUANTIZERS))
    default = ALL_TYPES if args.command == "golden" else known
    args.types = tuple(args.types.split(",")) if args.types else default
    print({"compare": compare, "golden": golden, "rate": rate}[args.command](args))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("ggml_quantizers.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())

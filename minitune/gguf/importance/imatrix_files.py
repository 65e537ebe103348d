"""Files of importance matrices, as llama.cpp's llama-imatrix writes and llama-quantize reads them.

The GGUF form holds two float32 tensors for each tensor NAME of the model. A model without experts
has one row in each:

    NAME.in_sum2   (experts, width)   sums of the squared inputs
    NAME.counts    (experts, 1)       tokens in these sums
    keys: general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size

The older form has no magic number. Its numbers are little-endian int32 and float32:

    entries x { name length, name, calls, values, sums[values] }, number of entries first
    chunks, dataset length, dataset       may be missing

The importance is sum / count in the first form and sum / calls in the second. llama-quantize takes
1 instead if the count is 0, and the sum itself if the calls are 0.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType

from minitune.atomic_files import atomic_file
from minitune.gguf.importance.importance import CHUNK_TOKENS, ImportanceMatrix
from minitune.gguf.reader import GgufReader
from minitune.gguf.writer import Content, TensorInfo, write_gguf
from minitune.read_files import require_regular_file

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = (
    "imatrix.datasets",
    "imatrix.chunk_count",
    "imatrix.chunk_size",
)


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Return the importance matrix of a file in one of llama.cpp's two forms.

    Raises: ValueError if the file is missing or damaged, or if a value is not finite or negative.
    """
    path = Path(path)
    require_regular_file(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        with np.errstate(all="ignore"):  # check_values refuses values that are not finite
            matrix = _read_gguf(path) if is_gguf else _read_legacy(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: could not be read ({error.strerror or error})") from None
    matrix.check_values()
    return matrix


def write_imatrix(matrix: ImportanceMatrix, path: str | Path) -> Path:
    """Write an importance matrix in the GGUF form and return the file's path.

    Raises: ValueError if the file exists or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: exists; remove it or choose another name")
    metadata = {
        "general.type": "imatrix",
        DATASETS: [matrix.dataset] if matrix.dataset else [],
        CHUNK_COUNT: matrix.chunks,
        CHUNK_SIZE: CHUNK_TOKENS,
    }
    tokens = max(matrix.tokens, 1)
    infos, tensors = [], []
    for name, values in sorted(matrix.values.items()):
        infos.append(TensorInfo(name + SUMS, (1, len(values)), GGMLType.F32))
        infos.append(TensorInfo(name + COUNTS, (1, 1), GGMLType.F32))
        tensors += [values[None] * tokens, torch.full((1, 1), float(tokens))]
    with atomic_file(path) as partial:
        write_gguf({partial: Content(metadata, infos)}, tensors)
    return path


# ---- the GGUF form


def _read_gguf(path: Path) -> ImportanceMatrix:
    reader = GgufReader(path)
    keys, tensors = reader.metadata, reader.tensors
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    if not names:
        kind = keys.get("general.type", "unknown")
        raise ValueError(f"{path}: holds no importance values, but general.type is {kind!r}")
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        if key not in keys:
            raise ValueError(f"{path}: has no key {key}; llama-imatrix writes it")
    for name in tensors:
        base = name.removesuffix(SUMS).removesuffix(COUNTS)
        if base + SUMS not in tensors or base + COUNTS not in tensors:
            raise ValueError(f"{path}: {base} needs the tensors {base + SUMS} and {base + COUNTS}")
        if tensors[name].type != GGMLType.F32:
            kind = tensors[name].type.name
            raise ValueError(f"{path}: {name} has the type {kind}, expected F32")
    values, tokens = {}, 0
    for name in names:
        sums = reader.load(name + SUMS).numpy()
        counts = reader.load(name + COUNTS).numpy().ravel()
        if not np.isfinite(counts).all() or (counts < 0).any() or sums.size % max(counts.size, 1):
            raise ValueError(
                f"{path}: {name} has {sums.size} sums and the counts {counts[:4]}; expected counts "
                "of at least 0 that divide the sums among them"
            )
        counts = np.rint(counts)[:, None]
        rows = sums.reshape(len(counts), -1)
        means = np.where(counts > 0, rows / np.maximum(counts, 1), np.float32(1))
        values[name] = torch.from_numpy(means.ravel().astype(np.float32))
        tokens = max(tokens, int(counts.max()))
    datasets, chunks = keys[DATASETS], keys[CHUNK_COUNT]
    if type(chunks) is not int or chunks < 0:
        raise ValueError(f"{path}: {CHUNK_COUNT} is {chunks!r:.60}; expected a whole number from 0")
    dataset = datasets[0] if isinstance(datasets, list) and datasets else datasets or ""
    return ImportanceMatrix(values, tokens, chunks, str(dataset), str(path))


# ---- the older form


class _Bytes:
    """The content of a file in the older form, read from its beginning."""

    def __init__(self, path: Path, content: bytes):
        self._path, self._content, self._position = path, content, 0

    @property
    def left(self) -> int:
        """Return the number of bytes that have not been read."""
        return len(self._content) - self._position

    def take(self, size: int, meaning: str) -> bytes:
        """Return the next `size` bytes.

        Raises: ValueError if the size is negative or the file is shorter.
        """
        if not 0 <= size <= self.left:
            raise ValueError(
                f"{self._path}: {meaning} would take {size} bytes, but the file has {self.left} "
                "left; the file is cut short, or no importance matrix"
            )
        self._position += size
        return self._content[self._position - size : self._position]

    def number(self, meaning: str) -> int:
        """Return the next int32."""
        return struct.unpack("<i", self.take(4, meaning))[0]

    def text(self, meaning: str) -> str:
        """Return the next text, which follows its length."""
        encoded = self.take(self.number(f"the length of {meaning}"), meaning)
        try:
            return encoded.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self._path}: {meaning} is no text: {encoded[:20]!r}") from None


def _read_legacy(path: Path, content: bytes) -> ImportanceMatrix:
    reader = _Bytes(path, content)
    entries = reader.number("the number of entries")
    if entries < 1:
        raise ValueError(f"{path}: holds {entries} entries, expected at least one")
    values = {}
    for index in range(entries):
        name = reader.text(f"the name of entry {index + 1}")
        if name in values:
            raise ValueError(f"{path}: holds {name} twice")
        calls = reader.number(f"the number of calls of {name}")
        size = reader.number(f"the number of values of {name}")
        if size < 1:
            raise ValueError(f"{path}: {name} has {size} values, expected at least one")
        data = reader.take(4 * size, f"the {size} values of {name}")
        sums = np.frombuffer(data, "<f4").astype(np.float32)
        values[name] = torch.from_numpy(sums / np.float32(calls) if calls > 0 else sums)
    chunks, dataset = 0, ""
    if reader.left:
        chunks = reader.number("the number of chunks")
    if reader.left:
        dataset = reader.text("the name of the dataset")
    if reader.left:
        raise ValueError(f"{path}: has {reader.left} bytes behind its end")
    return ImportanceMatrix(values, chunks=max(chunks, 0), dataset=dataset, file=str(path))

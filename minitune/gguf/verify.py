"""The check of GGUF files that were written, before they get their names.

    head         keys and tensors are those that were meant; norms are float32
    tensors      each tensor has at most the known error of its type to the merged weight
    tokenizer    texts become the same tokens as in training (tokenizer_check.py)
    llama.cpp    computes the same next tokens, if it can be imported (compare_llama_cpp.py)

The file is read anew, and its layout is undone by other code than the one that wrote it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.base.check_tensors import check_tensors
from minitune.gguf.compare_llama_cpp import compare_with_llama_cpp
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.model_metadata import additional_tensors
from minitune.gguf.quantization.quantize import FLOAT_DTYPES
from minitune.gguf.reader import GgufReader
from minitune.gguf.tokenizer.tokenizer_check import check_tokenizer
from minitune.gguf.type_errors import error_limit
from minitune.gguf.writer import Content, MetadataValue
from minitune.progress import ProgressBar

CHUNK = 1 << 24  # values compared at a time


def verify_files(
    files: Mapping[Path, Content],
    targets: Sequence[Path],
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    progress: bool | None = None,
) -> list[str]:
    """Check files that hold one model in different types, and return a sentence for each.

    files: where a file is now -> the content that it was to get.
    targets: the names that the files will get.
    tensors: (Hugging Face's name, merged tensor), all of the model's.
    device: where tensors are compared.
    progress: show a bar in bytes of the files, as in progress.py.

    Raises: ValueError that names the file and what is wrong with it.
    """
    weights = []
    for target, (path, content) in zip(targets, files.items(), strict=True):
        with named_target(target):
            reader = GgufReader(path)
            _check_head(reader, content.metadata, config)
            check_tokenizer(reader.metadata, tokenizer, warns=False)  # the plan has warned
            weights.append(FileWeights(reader, config))
    total = sum(stored.nbytes(name) for name in config.tensor_shapes() for stored in weights)
    with ProgressBar("verifying", total, show=progress) as bar:
        for name, tensor in tensors:
            values = tensor.to(device)
            for target, stored in zip(targets, weights, strict=True):
                with named_target(target):
                    _check_tensor(stored, name, values)
                bar.update(stored.nbytes(name))
    sentences = []
    for target, stored in zip(targets, weights, strict=True):
        with named_target(target):
            compared = compare_with_llama_cpp(stored, tokenizer, device)
        count = len(stored.reader.tensors)
        sentences.append(f"{target}: {count} tensors and the tokenizer; {compared}")
    return sentences


@contextlib.contextmanager
def named_target(target: Path) -> Iterator[None]:
    """Put the name of a file before the errors of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{target}: was not written, because a check failed: {error}") from None


def _check_head(
    reader: GgufReader, metadata: dict[str, MetadataValue], config: ModelConfig
) -> None:
    """Check the keys, the names, shapes and types of the tensors, and RoPE's divisors."""
    check_keys(reader.metadata, metadata)
    divisors = additional_tensors(config)
    check_tensors(reader, config, {name: tuple(x.shape) for name, x in divisors.items()})
    for name, tensor in divisors.items():
        if not torch.equal(reader.load(name), tensor.float()):
            raise ValueError(f"{name} is not the divisors of the model's RoPE")


def check_keys(found: Mapping[str, Any], meant: Mapping[str, MetadataValue]) -> None:
    """Raise ValueError if the keys of a file are not the ones that were to be written."""
    for key in {**meant, **found}:
        if key not in found or key not in meant or not _same(found[key], meant[key]):
            raise ValueError(f"the key {key} is not the one that was to be written")


def _same(found: Any, meant: Any) -> bool:
    """Return True if a key has the meant value; a float is compared as float32 stores it."""
    if isinstance(meant, float):
        return found == torch.tensor(meant).item()
    if isinstance(meant, list) and meant and isinstance(meant[0], float):
        return torch.equal(torch.tensor(found), torch.tensor(meant))
    return found == meant


def _check_tensor(file: FileWeights, name: str, tensor: Tensor) -> None:
    """Check one tensor against the merged one, which has Hugging Face's name and layout.

    A large matrix is checked in parts, so the memory is that of the part.

    Raises: ValueError if the error is above the one that the type has on these values.
    """
    if file.is_reordered(name) or tensor.dim() == 1:
        _check_values(file, name, file.load(name, tensor.device), tensor.float())
        return
    rows = max(1, CHUNK // tensor.shape[1])
    for start in range(0, len(tensor), rows):
        part = slice(start, start + rows)
        stored = file.load_rows(name, part, tensor.device)
        _check_values(file, name, stored, tensor[part].float())


def _check_values(file: FileWeights, name: str, stored: Tensor, merged: Tensor) -> None:
    """Check stored values against merged ones, float32 of one shape.

    Raises: as `_check_tensor`.
    """
    kind = file.type_of(name)
    if kind in FLOAT_DTYPES:
        # A norm's offset was added for the file and is subtracted again, which rounds twice.
        offset = file.config.architecture.norm_offset if merged.dim() == 1 else 0.0
        rounded = merged.to(FLOAT_DTYPES[kind]).float()
        tolerance = offset * 2**-22 * (1 + merged.abs())
        is_close = bool(((stored - rounded).abs() <= tolerance).all())
        allowed = "the same values"
    else:
        limit = error_limit(merged, kind)
        is_close = bool((stored - merged).square_().mean(dtype=torch.float64) <= limit)
        allowed = f"a mean square error of at most {limit.item():.3g}"
    if not is_close:
        raise ValueError(f"{name} is not the merged weight; expected {allowed} in {kind.name}")

"""The export of a model as GGUF files: every check first, and then all files in one pass.

content.py has the keys and the types of the tensors, writer.py the bytes, verify.py the checks of
the written files. Tensors go from the merge to the files one by one. The values are those of the
merged model, rounded to 16 bit and then to the file's type; a folder that is converted gives its
values as they are stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from minitune.atomic_files import atomic_files, require_space_together
from minitune.checkpoints.finite_check import FiniteCheck
from minitune.checkpoints.load_weights import check_all_known, open_model_folder
from minitune.checkpoints.merge import merged_dtype, merged_tensors
from minitune.checkpoints.safetensors_folder import TIED_HEAD, SafetensorsFolder
from minitune.config.model_config import EMBEDDING, ModelConfig
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.device import choose_device
from minitune.gguf.base.load import embedding_dtype, open_base
from minitune.gguf.base.model_files import model_files
from minitune.gguf.content import content_metadata, file_content
from minitune.gguf.general_metadata import (
    adapted_name,
    check_targets,
    file_name,
    name_of_file,
    organization_and_name,
    origin_metadata,
)
from minitune.gguf.importance.importance import ImportanceMatrix, unused_note
from minitune.gguf.mixtures import gguf_methods
from minitune.gguf.model_metadata import check_window
from minitune.gguf.ollama.modelfile import modelfiles
from minitune.gguf.tensor_layout import tensors_of_file
from minitune.gguf.verify import verify_files
from minitune.gguf.writer import Content, MetadataValue, write_gguf
from minitune.model.causal_lm import CausalLM
from minitune.progress import is_shown, labelled, print_line, warn


@dataclass(frozen=True)
class GGUFExport:
    """GGUF files of one model that passed every check and can be written.

    targets: the files.
    contents: keys and tensors of each file.
    tensors: function that returns a new iterator of (Hugging Face's name, tensor), in the order of
        `config.tensor_shapes()`.
    device: the device that quantises.
    importance: the importance matrix that the quantisers use, or None.
    modelfiles: path -> content, of the Modelfiles that are written with the files.
    """

    targets: list[Path]
    contents: list[Content]
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    device: torch.device
    importance: ImportanceMatrix | None = None
    modelfiles: dict[Path, str] = field(default_factory=dict)

    def with_modelfiles(self) -> "GGUFExport":
        """Return an export that writes a Modelfile for Ollama beside each file too.

        Raises: ValueError if a Modelfile exists, or cannot express the chat template.
        """
        adds_bos = self.contents[0].metadata["tokenizer.ggml.add_bos_token"]
        return replace(self, modelfiles=modelfiles(self.targets, self.tokenizer, adds_bos))

    def write(self, progress: bool | None = None, verify: bool = True) -> list[Path]:
        """Write all files in one pass and return the paths of the GGUF files.

        No file gets its name before all are complete and verified.

        progress: show bars in bytes, and say what was verified; as in progress.py.
        verify: check the files as verify.py does.

        Raises: ValueError if the disk has no room, a file cannot be written, a weight does not fit
            its type, or a check of a file fails.
        """
        self.check_space()
        with atomic_files([*self.targets, *self.modelfiles]) as partials:
            count = len(self.targets)
            files = dict(zip(partials[:count], self.contents, strict=True))
            values = self.importance.values if self.importance else None
            write_gguf(files, self.gguf_tensors(), values, progress, self.device)
            for partial, text in zip(partials[count:], self.modelfiles.values(), strict=True):
                partial.write_text(text, encoding="utf-8")
            if verify:
                found = verify_files(
                    files,
                    self.targets,
                    self.config,
                    self.tokenizer,
                    self.tensors(),
                    self.device,
                    progress,
                )
                for sentence in found if is_shown(progress) else ():
                    print_line(labelled("verified", sentence))
        return self.targets

    def check_space(self, others: Mapping[Path, int] | None = None) -> None:
        """Raise ValueError if the disk has no room for all files together.

        others: path -> bytes of other files that will be written.
        """
        path = self.targets[0] if len(self.targets) == 1 else self.targets[0].parent
        nbytes = sum(content.nbytes for content in self.contents)
        require_space_together({path: nbytes, **(others or {})})

    def gguf_tensors(self) -> Iterator[Tensor]:
        """Return an iterator over the tensors in the files' order and layout, on the device."""
        return tensors_of_file(self.config, self.tensors(), self.device)


# ---- the exports


def export_gguf(
    model: CausalLM,
    path: str | Path,
    tokenizer: Tokenizer,
    quantization_method: str | Sequence[str] = "q8_0",
    merge_base: str = "auto",
    overwrite: bool = False,
    importance: ImportanceMatrix | None = None,
    progress: bool | None = None,
    verify: bool = True,
    ollama: bool = False,
) -> Path | list[Path]:
    """Write the merged model as GGUF files of one or several types, in one pass.

    path: a folder for files named after the base model; or, for one type, a file name that ends in
        .gguf.
    quantization_method: a type of config/training_config.py, or a list of types.
    merge_base: weights to merge onto, as in checkpoints/merge.py.
    overwrite: replace existing files once the new ones are complete.
    importance: the importance matrix that the quantisers use.
    progress: show bars in bytes, and say what was verified; as in progress.py.
    verify: check the files before they get their names (verify.py).
    ollama: write a Modelfile beside each file too.

    Returns: the path of the file, or a list of paths if `quantization_method` is a list.

    Raises: ValueError if a file exists (unless `overwrite`), if the disk has no room, or if GGUF
        cannot express the model or the tokenizer.
    """
    plan = plan_export(
        model, path, tokenizer, quantization_method, merge_base, overwrite, importance
    )
    paths = (plan.with_modelfiles() if ollama else plan).write(progress, verify)
    return paths[0] if isinstance(quantization_method, str) else paths


def plan_export(
    model: CausalLM,
    path: str | Path,
    tokenizer: Tokenizer,
    quantization_method: str | Sequence[str] = "q8_0",
    merge_base: str = "auto",
    overwrite: bool = False,
    importance: ImportanceMatrix | None = None,
    device: torch.device | None = None,
) -> GGUFExport:
    """Check an export as `export_gguf` does, without writing, and return the files to write.

    device: the device that quantises; None takes the model's.
    """
    organization, base = organization_and_name(model.name, model.gguf or model.folder)
    methods = gguf_methods(quantization_method, merged_dtype(model) == torch.float16)
    name = adapted_name(base) if model.lora else base
    targets = check_targets(path, name, methods, overwrite, model.gguf)
    check_window(model.config, model.max_trained_seqlen)
    merged_tensors(model, merge_base)  # refuses before the first tensor
    return _plan(
        dict(zip(methods, targets, strict=True)),
        origin_metadata(organization, base),
        model.config,
        tokenizer,
        lambda: merged_tensors(model, merge_base),
        model.device if device is None else device,
        importance,
    )


def convert_folder(
    folder: str | Path,
    path: str | Path,
    quantization_method: str | Sequence[str] = "q8_0",
    importance: ImportanceMatrix | None = None,
    progress: bool | None = None,
    verify: bool = True,
) -> Path | list[Path]:
    """Write the weights of a model folder as GGUF files, on a GPU if there is one.

    The weights have 16 or 32 bits, or are FP8 and dequantised.

    path, quantization_method, importance, progress, verify: as in `export_gguf`.

    Returns: as `export_gguf`.

    Raises: ValueError as `export_gguf`, and if the folder holds 4-bit or unknown weights.
    """
    paths = plan_conversion(folder, path, quantization_method, importance).write(progress, verify)
    return paths[0] if isinstance(quantization_method, str) else paths


def plan_conversion(
    folder: str | Path,
    path: str | Path,
    quantization_method: str | Sequence[str] = "q8_0",
    importance: ImportanceMatrix | None = None,
) -> GGUFExport:
    """Check a conversion as `convert_folder` does, without writing, and return the files."""
    folder = Path(folder)
    config, stored = open_model_folder(folder)
    if stored.prequantized:
        raise ValueError(f"{folder}: holds 4-bit weights; load it as a model and export that")
    methods = gguf_methods(quantization_method, stored.dtype(EMBEDDING) == torch.float16)
    targets = check_targets(path, folder.resolve().name, methods)
    shapes = config.tensor_shapes()
    check_all_known(stored, {*shapes, TIED_HEAD})
    return _plan(
        dict(zip(methods, targets, strict=True)),
        {},
        config,
        Tokenizer.from_folder(folder),
        lambda: _stored_tensors(stored, shapes),
        choose_device(),
        importance,
    )


def _stored_tensors(
    stored: SafetensorsFolder, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a folder, with the pages of two tensors in memory at most.

    Raises: ValueError that names the file and the tensor if a value is NaN or infinite.
    """
    for name, shape in shapes.items():
        tensor, finite = stored.load(name, shape), FiniteCheck()
        finite.add(name, tensor)
        finite.require(stored.error, "get the file again, or another model")
        yield name, tensor
        stored.remap(name)


def check_gguf(name: str, base: Path, methods: Sequence[str]) -> list[Content]:
    """Check that an adapter on a base model can become GGUF files, before there is an adapter.

    name: the base model as it was asked for. base: its folder or GGUF file.
    methods: names of types, as quantization_method of `export_gguf`.

    Returns: the content that the file of each type will have.

    Raises: ValueError if GGUF cannot express the model or the tokenizer.
    """
    config, stored = open_base(base)
    organization, base_name = organization_and_name(name, base)
    origin, general_name = origin_metadata(organization, base_name), adapted_name(base_name)
    metadata = content_metadata(config, Tokenizer.from_folder(model_files(base)), general_name)
    return [
        file_content(config, method, general_name, origin, metadata, None)
        for method in gguf_methods(methods, embedding_dtype(stored) == torch.float16)
    ]


def gguf_file_names(name: str, base: Path, methods: Sequence[str]) -> list[str]:
    """Return the names of the files that `export_gguf` writes for an adapter on a base model.

    name: the base model as it was asked for. base: its folder or GGUF file.
    methods: names of types, as quantization_method of `export_gguf`.

    Raises: ValueError if a type is unknown.
    """
    is_float16 = embedding_dtype(open_base(base)[1]) == torch.float16
    stem = adapted_name(organization_and_name(name, base)[1])
    return [file_name(stem, method) for method in gguf_methods(methods, is_float16)]


# ---- the content of the files


def _plan(
    targets: dict[str, Path],
    origin: dict[str, MetadataValue],
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    device: torch.device,
    importance: ImportanceMatrix | None,
) -> GGUFExport:
    """Return the files to write.

    targets: type -> file.
    origin: the keys that name the base model.

    Raises: ValueError if GGUF cannot express the model or the tokenizer, the importance matrix is
        another model's, or the disk has no room.
    """
    notes = importance.check_model(config) if importance else []
    names = {method: name_of_file(path, method) for method, path in targets.items()}
    metadata = {
        name: content_metadata(config, tokenizer, name) for name in dict.fromkeys(names.values())
    }
    contents = [
        file_content(config, method, name, origin, metadata[name], importance)
        for method, name in names.items()
    ]
    for method, content in zip(names, contents, strict=True):
        if importance:
            notes += unused_note((info.type for info in content.infos), method)
    for note in notes:
        warn(note, stacklevel=3)
    plan = GGUFExport(
        list(targets.values()), contents, config, tokenizer, tensors, device, importance
    )
    plan.check_space()
    return plan

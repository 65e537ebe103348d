"""A LoRA adapter as a GGUF file, which llama.cpp adds to a base's GGUF file while it runs.

    llama-server -m base.gguf --lora adapter.gguf

Base and adapter together are the trained model: nothing is merged, and nothing is quantised again.

    keys       general.type "adapter", general.architecture, adapter.type "lora", and
               adapter.lora.alpha: llama.cpp computes W x + alpha / r B A x
    tensors    blk.N.attn_q.weight.lora_a    A (r, in_features), float32
               blk.N.attn_q.weight.lora_b    B (out_features, r), float32

A adapts the input of a weight, which GGUF leaves as it is. B adapts its rows, so B's rows have the
order of the weight's rows (tensor_layout.py). llama.cpp finds the weights by name, and checks the
architecture and the shapes. It does not check that the base is the one of the training; the key
general.base_model.0.name tells a person.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.atomic_files import atomic_files, require_space
from minitune.checkpoints.adapter import (
    BASE_16BIT,
    BASE_TEXTS,
    GGUF_BASE,
    NF4_BASE,
    base_form,
)
from minitune.checkpoints.resolve_model import is_gguf
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.data.templates.chat_template import DEFAULT
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.general_metadata import (
    adapted_name,
    check_targets,
    organization_and_name,
    origin_metadata,
)
from minitune.gguf.mixtures import QUANTIZATION_METHODS
from minitune.gguf.model_metadata import check_expressible, check_window, gguf_name
from minitune.gguf.ollama.modelfile import adapter_modelfile
from minitune.gguf.reader import GgufReader
from minitune.gguf.tensor_layout import (
    interleave_rope_rows,
    interleaved_heads,
    separate_rope_rows,
)
from minitune.gguf.tokenizer.tokenizer_metadata import adds_bos
from minitune.gguf.verify import check_keys, named_target
from minitune.gguf.writer import Content, MetadataValue, TensorInfo, write_gguf
from minitune.model.causal_lm import CausalLM
from minitune.progress import is_shown, labelled, print_line, warn

TYPE = "f32"  # of the tensors
FILE_TYPE = f"{TYPE}-lora"  # at the end of a file's name
TEMPLATE_SUFFIX = ".jinja"
# Form of the weights that an adapter was trained on -> the way to the answers of the training
OTHER_BASES = {
    NF4_BASE: 'an export of the merged model with merge_base="nf4" answers as in training',
    BASE_16BIT: "take the 16-bit weights as a GGUF file",
    GGUF_BASE: "take the file of the training",
}
# PEFT's ending of a parameter's name -> llama.cpp's
FACTORS = {".lora_A.weight": ".weight.lora_a", ".lora_B.weight": ".weight.lora_b"}


@dataclass(frozen=True)
class AdapterExport:
    """An adapter that passed every check and can be written as a GGUF file.

    target: the file.
    base: the GGUF file or the folder of the base model.
    content: keys and tensors of the file.
    parameters: the adapter's parameters under PEFT's names, in the order of the file.
    texts: path -> content, of the text files that are written with it.
    """

    target: Path
    base: Path
    content: Content
    config: ModelConfig
    parameters: dict[str, Tensor]
    texts: dict[Path, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """Return the paths of all files."""
        return [self.target, *self.texts]

    def write(self, progress: bool | None = None, verify: bool = True) -> list[Path]:
        """Write all files and return `paths`. None gets its name before all are complete.

        progress: say what was verified, as in progress.py.
        verify: read the file back, and compare each key and each value.

        Raises: ValueError if a file cannot be written, a value is not finite, or the check fails.
        """
        with atomic_files(self.paths) as (partial, *partial_texts):
            write_gguf({partial: self.content}, self.gguf_tensors(), progress=False)
            for path, text in zip(partial_texts, self.texts.values(), strict=True):
                path.write_text(text, encoding="utf-8")
            if verify:
                self._verify(partial)
        if verify and is_shown(progress):
            count = len(self.parameters)
            sentence = f"{self.target}: {count} tensors, which equal the trained ones"
            print_line(labelled("verified", sentence))
        return self.paths

    def gguf_tensors(self) -> Iterator[Tensor]:
        """Return an iterator over the tensors in the file's order and layout, on the CPU."""
        for name, parameter in self.parameters.items():
            tensor, heads = parameter.detach().cpu(), self._interleaved_heads(name)
            yield tensor if heads is None else interleave_rope_rows(tensor, heads)

    def _interleaved_heads(self, name: str) -> int | None:
        """Return the heads of a B whose rows are interleaved in the file, otherwise None."""
        linear, factor, _ = name.rsplit(".", 2)
        if factor != "lora_B":
            return None
        return interleaved_heads(self.config).get(linear.rpartition(".")[2])

    def _verify(self, path: Path) -> None:
        """Check that a written file holds the keys and the parameters, bit for bit.

        Raises: ValueError that names the target.
        """
        with named_target(self.target):
            reader = GgufReader(path)
            check_keys(reader.metadata, self.content.metadata)
            names = [info.name for info in self.content.infos]
            if list(reader.tensors) != names:
                raise ValueError("its tensors are not the ones that were to be written")
            for name, (key, parameter) in zip(names, self.parameters.items(), strict=True):
                stored, heads = reader.load(name), self._interleaved_heads(key)
                if heads is not None:
                    stored = separate_rope_rows(stored, heads)
                if not torch.equal(stored, parameter.detach().cpu()):
                    raise ValueError(f"{name} has other values than the trained adapter")


def save_gguf_adapter(
    model: CausalLM,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    verify: bool = True,
    ollama: bool = False,
) -> Path:
    """Write the model's adapter as a GGUF file and return the file.

    A chat template that was assigned to the tokenizer is missing in the base's GGUF file. It is
    written beside the adapter as NAME.jinja, for llama-server's --chat-template-file.

    path: a file name that ends in .gguf, or a folder for a file named after the base model.
    tokenizer: the tokenizer of the training; None takes the base's.
    overwrite: replace existing files once the new ones are complete.
    progress: say what was verified, as in progress.py.
    verify: read the file back, and compare each key and each value.
    ollama: write a Modelfile beside the file too.

    Raises: ValueError if the model has no adapter, a file exists (unless `overwrite`), or llama.cpp
        cannot run the model. With `ollama`, also if the base is no GGUF file or Ollama's templates
        cannot express the chat template.
    """
    plan = plan_gguf_adapter(model, path, tokenizer, overwrite, ollama)
    return plan.write(progress, verify)[0]


def plan_gguf_adapter(
    model: CausalLM,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    ollama: bool = False,
) -> AdapterExport:
    """Check an export as `save_gguf_adapter` does, without writing, and return its files."""
    if model.lora is None:
        raise ValueError(
            "the model has no adapter to write as a GGUF file; attach one with "
            "FastLanguageModel.get_peft_model, or load one with model.load_adapter(folder)"
        )
    check_expressible(model.config)
    check_window(model.config, model.max_trained_seqlen)
    base = model.gguf or model.folder
    name = adapted_name(organization_and_name(model.name, base)[1])
    (target,) = check_targets(path, name, [FILE_TYPE], overwrite, model.gguf)
    tokenizer = tokenizer or Tokenizer.from_folder(model.folder)
    texts = _template_file(target, tokenizer)
    if ollama:
        texts |= _modelfile(target, base, model.config, tokenizer)
    for text in texts:
        if text.exists() and not overwrite:
            raise ValueError(f"{text}: exists; remove it or choose another name")
    content = adapter_content(model)
    require_space(target, content.nbytes)
    _warn_of_other_base(model)
    parameters = dict(model.adapter_parameters())
    return AdapterExport(target, base, content, model.config, parameters, texts)


def adapter_content(model: CausalLM) -> Content:
    """Return the keys and the tensors of the file of a model's adapter."""
    organization, base_name = organization_and_name(model.name, model.gguf or model.folder)
    origin = origin_metadata(organization, base_name)
    metadata = adapter_metadata(model.config, model.lora, adapted_name(base_name), origin)
    infos = [
        TensorInfo(adapter_name(key, model.config), tuple(p.shape), GGMLType.F32)
        for key, p in model.adapter_parameters()
    ]
    return Content(metadata, infos)


def _warn_of_other_base(model: CausalLM) -> None:
    """Warn if a GGUF file as the base would not be the weights that the adapter was trained on."""
    form = model.lora_base or base_form(model)
    if form == NF4_BASE or (form == GGUF_BASE) != (model.gguf is not None):
        warn(
            f"the adapter was trained on {BASE_TEXTS[form]}; with other weights in the base's GGUF "
            f"file it answers differently; {OTHER_BASES[form]}",
            stacklevel=4,
        )


def _template_file(target: Path, tokenizer: Tokenizer) -> dict[Path, str]:
    """Return path -> content of the chat template, if the base's GGUF file has another one."""
    if not tokenizer.template_was_assigned or tokenizer.chat_template is None:
        return {}
    templates = tokenizer.chat_template
    text = templates if isinstance(templates, str) else templates[DEFAULT]
    return {target.with_suffix(TEMPLATE_SUFFIX): text}


def _modelfile(
    target: Path, base: Path, config: ModelConfig, tokenizer: Tokenizer
) -> dict[Path, str]:
    """Return path -> content of the Modelfile.

    Raises: ValueError if the base is no GGUF file or Ollama's templates cannot express the chat
        template.
    """
    if not is_gguf(base):
        raise ValueError(
            f"a Modelfile begins with the GGUF file of the base, and {base} is none; export the "
            "base without the adapter as a GGUF file, load that file with this adapter, and write "
            "the adapter with ollama=True then"
        )
    architecture = config.architecture.gguf.name
    return adapter_modelfile(target, base, architecture, tokenizer, adds_bos(tokenizer))


def adapter_metadata(
    config: ModelConfig, lora: LoraConfig, name: str, origin: Mapping[str, MetadataValue]
) -> dict[str, MetadataValue]:
    """Return the keys of an adapter's file.

    name: general.name.
    origin: the keys that name the base model.
    """
    # llama.cpp divides alpha by r; rsLoRA divides it by the root of r.
    alpha = lora.lora_alpha * (lora.r**0.5 if lora.use_rslora else 1)
    return {
        "general.architecture": config.architecture.gguf.name,
        "general.type": "adapter",
        "general.name": name,
        **origin,
        "general.file_type": int(QUANTIZATION_METHODS[TYPE]),
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }


def adapter_name(parameter: str, config: ModelConfig) -> str:
    """Return llama.cpp's name of a parameter of an adapter.

    parameter: PEFT's name, such as model.layers.3.self_attn.q_proj.lora_A.weight; it becomes
        blk.3.attn_q.weight.lora_a.
    """
    ending = next(filter(parameter.endswith, FACTORS))
    weight = gguf_name(parameter.removesuffix(ending) + ".weight", config.architecture)
    return weight.removesuffix(".weight") + FACTORS[ending]

"""Adapters in PEFT's file format.

    adapter/
      adapter_config.json         rank, scaling and target modules
      adapter_model.safetensors   "base_model.model." + parameter name -> float32 tensor

Parameters are saved in float32, as they are trained, so a loaded adapter has the same bits.

The text model of a multimodal wrapper is saved under the names that it has in the wrapper, so that
PEFT finds its modules there. It loads onto the wrapper and onto a plain text model.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.atomic_files import atomic_folder, write_json
from minitune.checkpoints.adapter_config import CONFIG, WEIGHTS, read_adapter_config
from minitune.checkpoints.finite_check import FiniteCheck
from minitune.checkpoints.resolve_model import is_hub_id
from minitune.checkpoints.safetensors_folder import (
    read_metadata,
    read_safetensors,
    text_name,
)
from minitune.checkpoints.safetensors_writer import TensorSpec, write_safetensors
from minitune.config.architectures import ALL_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.model.adapter_switch import Adapter, new_branch, remove_lora_
from minitune.model.causal_lm import CausalLM
from minitune.progress import warn

PREFIX = "base_model.model."
REMEDY = "take another adapter, or an earlier checkpoint of the run"
BASE_FORM = "minitune.base"  # in the metadata: the weights that it was trained on
NF4_BASE, GGUF_BASE, BASE_16BIT = "nf4", "gguf", "16bit"
BASE_TEXTS = {
    NF4_BASE: "NF4 weights",
    BASE_16BIT: "16-bit weights",
    GGUF_BASE: "the weights of a GGUF file",
}
FACTORS = (".lora_A.weight", ".lora_B.weight")
# Wrapper -> the name of the text model's module in it, in transformers 5
TEXT_MODULES = {"idefics2": "text_model", "idefics3": "text_model", "smolvlm": "text_model"}
DEFAULT_TEXT_MODULE = "language_model"


def save_adapter(model: CausalLM, folder: str | Path) -> None:
    """Write the adapter into `folder`, replacing an earlier one.

    Raises: ValueError if the model has no adapter or the folder cannot be written.
    """
    with atomic_folder(folder) as partial:
        write_adapter_files(model, partial)


def write_adapter_files(model: CausalLM, folder: Path) -> None:
    """Write the two files of an adapter into an existing folder.

    Raises: ValueError if the model has no adapter, or `check_parameters` refuses it.
    """
    if model.lora is None:
        raise ValueError(
            "the model has no adapter to save; attach one with FastLanguageModel.get_peft_model"
        )
    check_parameters(model)
    decoder = _decoder_name(model.config)
    base = model.name
    if not is_hub_id(model.name, model.folder):
        # A GGUF file keeps its name: in Hugging Face's cache it is a link to a file without suffix.
        base = str(model.gguf or model.folder.resolve())
    write_json(folder / CONFIG, _peft_config(base, model.lora, decoder))
    tensors = {
        PREFIX + decoder + name.removeprefix("model"): p.detach().cpu().contiguous()
        for name, p in model.adapter_parameters()
    }
    metadata = {"format": "pt", BASE_FORM: base_form(model)}
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_safetensors(folder / WEIGHTS, specs, iter(tensors.items()), metadata)


def check_parameters(model: CausalLM) -> None:
    """Check that each LoRA matrix of a model is a parameter of its own, of floating-point numbers.

    Raises: ValueError that names the first matrix that is not.
    """
    found = dict(model.adapter_parameters())
    for name in adapter_shapes(model.config, model.lora):
        if name not in found:
            raise ValueError(
                f"{name} is no parameter of its own: it was removed, or is another matrix under a "
                "second name; give it a parameter that no other linear has"
            )
        if not found[name].is_floating_point():
            raise ValueError(
                f"{name} is {found[name].dtype}; LoRA matrices are floating-point numbers"
            )


def base_form(model: CausalLM) -> str:
    """Return the form of the model's weights, on which an adapter is trained."""
    if model.gguf is not None:
        return GGUF_BASE
    return NF4_BASE if model.is_nf4 else BASE_16BIT


def load_adapter(model: CausalLM, folder: str | Path) -> None:
    """Attach the adapter of `folder`, instead of the present one if there is one.

    `model.lora_dropout` becomes the dropout that the adapter was trained with; it is not applied.

    Raises: ValueError if PEFT options are not supported, or if a tensor is missing, unknown or of a
        wrong shape. The model is then unchanged.
    """
    _load_adapter(model, folder, may_replace=True)


def read_adapter(model: CausalLM, folder: str | Path) -> Adapter:
    """Return the adapter of `folder` for the linears of a model, which stays as it is.

    Raises: ValueError as `load_adapter`.
    """
    lora, tensors, peft_config = _read_adapter(model.config, folder)
    _warn_of_other_file(model, folder, peft_config.get("base_model_name_or_path"))
    adapter = {}
    for name, linear in model.linears():
        if f"{name}.lora_A.weight" in tensors:
            values = [tensors[f"{name}{factor}"] for factor in FACTORS]
            A, B = (value.to(model.device, torch.float32) for value in values)
            adapter[linear] = new_branch(A, B, lora.scaling)
    return adapter


def load_adapter_values(model: CausalLM, folder: str | Path) -> None:
    """Copy the values of the adapter in `folder` into the present adapter, in place.

    Raises: ValueError as `load_adapter`, or if a setting differs from the model's adapter.
    """
    _load_adapter(model, folder, may_replace=False)


def check_adapter(config: ModelConfig, folder: str | Path) -> LoraConfig:
    """Return the settings of the adapter in `folder`, which must fit a model.

    The model's weights need not be loaded.

    Raises: ValueError as `load_adapter`.
    """
    return _read_adapter(config, folder)[0]


def _load_adapter(model: CausalLM, folder: str | Path, may_replace: bool) -> None:
    lora, tensors, peft_config = _read_adapter(model.config, folder)
    difference = None if model.lora is None else _difference(model.lora, lora)
    if difference and not may_replace:
        raise ValueError(f"{folder}: {difference}")
    if difference:
        remove_lora_(model)
    if model.lora is None:
        model.add_lora(lora)
    _warn_of_other_file(model, folder, peft_config.get("base_model_name_or_path"))
    with torch.no_grad():
        for name, p in model.adapter_parameters():
            p.copy_(tensors[name])
    model.lora_dropout = peft_config.get("lora_dropout") or 0.0
    model.lora_base = read_base_form(folder)


def read_base_form(folder: str | Path) -> str | None:
    """Return the form of the weights that an adapter was trained on, as `base_form`.

    None if the file does not say, because another program wrote the adapter.
    """
    return read_metadata(Path(folder) / WEIGHTS).get(BASE_FORM)


def _warn_of_other_file(model: CausalLM, folder: str | Path, base: Any) -> None:
    """Warn if the model is a GGUF file, and the adapter was trained on something of another name.

    base: the base that the adapter names.
    """
    if model.gguf is not None and Path(str(base)).name != model.gguf.name:
        warn(
            f"{folder}: the adapter was trained on {base}, and the model is {model.gguf}, whose "
            "weights are rounded otherwise or may hold the adapter already",
            stacklevel=2,
        )


def _read_adapter(
    config: ModelConfig, folder: str | Path
) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's settings, its tensors by parameter name, and its adapter_config.json."""
    peft_config = read_adapter_config(folder)
    tensors = _read_tensors(Path(folder) / WEIGHTS)
    lora = _lora_config(peft_config, tensors, Path(folder) / CONFIG)
    _check_shapes(adapter_shapes(config, lora), tensors, Path(folder) / WEIGHTS)
    return lora, tensors, peft_config


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Return parameter name -> shape of an adapter: A (R, in_features), B (out_features, R)."""
    shapes = {}
    for layer in range(config.num_hidden_layers):
        for linear in config.linears():
            if linear.target in lora.target_modules:
                name = f"model.layers.{layer}.{linear.name}"
                shapes[f"{name}.lora_A.weight"] = (lora.r, linear.in_features)
                shapes[f"{name}.lora_B.weight"] = (linear.out_features, lora.r)
    return shapes


def _decoder_name(config: ModelConfig) -> str:
    """Return the name of the decoder in the model that transformers loads from the base folder."""
    if not config.wrapper:
        return "model"
    return f"model.{TEXT_MODULES.get(config.wrapper, DEFAULT_TEXT_MODULE)}"


def _peft_config(base: str, lora: LoraConfig, decoder: str) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    base: the base model's folder as an absolute path, or org/name.
    decoder: name of the decoder in that model. If it is inside a wrapper, target_modules is a
        pattern, because the encoders have linears of the same names.
    """
    targets: list[str] | str = sorted(lora.target_modules)
    if decoder != "model":
        targets = rf"{re.escape(decoder)}\..*\.({'|'.join(targets)})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "auto_mapping": None,
        "revision": None,
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the LoRA matrices of an adapter file by parameter name."""
    stored = read_safetensors(path)
    # names out of a PEFT model in memory hold the adapter's name, "default"
    names = {name: name.removeprefix(PREFIX).replace(".default.", ".") for name in stored}
    stored_names: dict[str, str] = {}  # parameter name -> name in the file
    for name in stored:
        parameter = text_name(names[name]) or names[name]
        if parameter in stored_names:
            raise ValueError(
                f"{path}: holds the same matrix under two names, {stored_names[parameter]} and "
                f"{name}; save the adapter again"
            )
        stored_names[parameter] = name
    tensors = {parameter: stored[name] for parameter, name in stored_names.items()}
    if wrong := [name for name in tensors if not name.endswith(FACTORS)]:
        raise ValueError(f"{path}: holds {wrong[0]}, which is not a LoRA matrix")
    targets = {_target(name) for name in tensors}
    if unknown := sorted(targets - set(ALL_TARGETS)):
        raise ValueError(f"{path}: adapts {unknown[0]}; supported are {', '.join(ALL_TARGETS)}")
    if not targets:
        raise ValueError(f"{path}: holds no LoRA matrix")
    _check_values(tensors, path)
    return tensors


def _check_values(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless all values are floating-point numbers that float32 holds."""
    finite = FiniteCheck()
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(
                f"{path}: {PREFIX}{name} is {value.dtype}; LoRA matrices are floating-point numbers"
            )
        if value.numel():
            finite.add(name, value.float())
    finite.require(lambda name, text: ValueError(f"{path}: {PREFIX}{name} {text}"), REMEDY)


def _target(parameter: str) -> str:
    """Return the linear's short name: "q_proj" of "...self_attn.q_proj.lora_A.weight"."""
    return parameter.split(".")[-3]


def _lora_config(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> LoraConfig:
    """Return an adapter's settings.

    The target modules come from the tensors, because PEFT's target_modules may be a pattern.
    path: the file that the errors name.
    """
    targets = {_target(name) for name in tensors}
    try:
        return LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules=tuple(name for name in ALL_TARGETS if name in targets),
            use_rslora=config.get("use_rslora", False),
        )
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _difference(present: LoraConfig, loaded: LoraConfig) -> str | None:
    """Return the first setting in which a loaded adapter differs from the model's, or None."""
    for name in ("r", "lora_alpha", "target_modules", "use_rslora"):
        have, want = getattr(present, name), getattr(loaded, name)
        same = set(have) == set(want) if name == "target_modules" else have == want
        if not same:
            return f"{name} is {want}, but the model's adapter has {have}"
    return None


def _check_shapes(
    shapes: dict[str, tuple[int, int]], tensors: dict[str, Tensor], path: Path
) -> None:
    """Raise ValueError unless the tensors have exactly these names and shapes."""
    if missing := sorted(shapes.keys() - tensors.keys()):
        count = f"{len(missing)} of {len(shapes)} tensors are missing"
        raise ValueError(f"{path}: lacks {PREFIX}{missing[0]} ({count})")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"{path}: holds {PREFIX}{extra[0]}, which has no place in the model")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise ValueError(
                f"{path}: {PREFIX}{name} has shape {found}, but rank and model need {shape}"
            )

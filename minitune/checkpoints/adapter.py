"""Adapters in PEFT's file format, and checkpoints that continue a run exactly where it was.

    adapter/                          checkpoint-N/            after N optimizer steps
      adapter_config.json               the two adapter files, and
      adapter_model.safetensors         optimizer.safetensors  AdamW's moments, float32 or 8-bit
                                        state.json             step, place in the data, losses not yet logged, settings

An adapter file's keys are "base_model.model." + the parameter's name. Parameters are stored in float32, as they are
trained: a resumed run continues from the same bits. A folder is written beside its place and renamed when it is whole
and on disk, so an interruption or a full disk leaves whatever was there before.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minitune.atomic_files import atomic_folder
from minitune.config.architectures import LORA_TARGETS
from minitune.config.training_config import LoraConfig
from minitune.model.causal_lm import CausalLM

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT options that change what an adapter computes, and are not computed here; refused when set.
UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern",
    "alpha_pattern", "layer_replication", "layers_to_transform", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
PLAIN_INITS = (
    True,
    False,
    None,
    "gaussian",
    "orthogonal",
    "eva",
)  # the others, such as pissa, alter the base as well


def _write_adapter(model: CausalLM, folder: Path) -> None:
    if model.lora is None:
        raise ValueError(
            "the model has no adapter to save; attach one with FastLanguageModel.get_peft_model"
        )
    lora = model.lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(lora.target_modules),
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
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        PREFIX + name: p.detach().cpu().contiguous() for name, p in model.trainable_parameters()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def save_adapter(model: CausalLM, folder: str | Path) -> None:
    """Write the adapter into `folder` in PEFT's format, in place of what is there. ValueError where that fails."""
    with atomic_folder(folder) as partial:
        _write_adapter(model, partial)


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """FOLDER/adapter_config.json. ValueError for a missing file, and for PEFT options that are not supported."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise ValueError(
            f"{path}: not found; an adapter folder holds {CONFIG} and {WEIGHTS}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: holds a {type(config).__name__}; expected an object with the adapter's settings"
        )
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only LORA adapters are supported")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(
            f"{path}: bias is {bias!r}; only adapters without trained biases ('none') are supported"
        )
    for name in UNSUPPORTED:
        if value := config.get(name):
            raise ValueError(
                f"{path}: {name} is {value!r}, which is not supported; export a plain LoRA adapter instead"
            )
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights {init!r} altered the base weights too; only adapters are read here"
        )
    return config


def _read_adapter(
    folder: str | Path, config: dict[str, Any]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """An adapter's configuration, and its tensors by parameter name. Which linears it has is read from the tensors."""
    path = Path(folder) / WEIGHTS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: not found, truncated, or not a safetensors file ({error})"
        ) from None
    tensors = {
        name.removeprefix(PREFIX).replace(".default.", "."): value for name, value in stored.items()
    }
    if wrong := [
        name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))
    ]:
        raise ValueError(f"{path}: holds {wrong[0]}, which is not a LoRA matrix")
    targets = {name.split(".")[-3] for name in tensors}
    if unknown := sorted(targets - set(LORA_TARGETS)):
        raise ValueError(f"{path}: adapts {unknown[0]}; supported are {', '.join(LORA_TARGETS)}")
    if not targets:
        raise ValueError(f"{path}: holds no LoRA matrix")
    try:
        lora = LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules=tuple(name for name in LORA_TARGETS if name in targets),
            use_rslora=config.get("use_rslora", False),
        )
    except KeyError as error:
        raise ValueError(f"{Path(folder) / CONFIG}: lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG}: {error}") from None
    return lora, tensors


def load_adapter(model: CausalLM, folder: str | Path) -> None:
    """Attach the adapter of `folder` to a model, or copy its values into an adapter of the same make.

    `model.lora_dropout` becomes the dropout that it was trained with: nothing here applies it.
    Raises ValueError for options that are not supported, where the model has an adapter of another make, and for a
    tensor that is missing, too many, or of a wrong shape; the model's values are then unchanged.
    """
    config = read_adapter_config(folder)
    lora, tensors = _read_adapter(folder, config)
    attach = model.lora is None
    if not attach:
        for name in ("r", "lora_alpha", "target_modules", "use_rslora"):
            have, want = getattr(model.lora, name), getattr(lora, name)
            if (set(have) != set(want)) if name == "target_modules" else (have != want):
                raise ValueError(f"{folder}: {name} is {want}, but the model's adapter has {have}")
    _check_tensors(model, lora, tensors, Path(folder) / WEIGHTS)
    if attach:
        model.add_lora(lora)
    with torch.no_grad():
        for name, p in model.trainable_parameters():
            p.copy_(tensors[name])
    model.lora_dropout = config.get("lora_dropout") or 0.0


def _check_tensors(
    model: CausalLM, lora: LoraConfig, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    shapes = {}
    for name, linear in model.linears():
        if name.rsplit(".", 1)[1] in lora.target_modules:
            shapes[f"{name}.lora_A.weight"] = (lora.r, linear.in_features)
            shapes[f"{name}.lora_B.weight"] = (linear.out_features, lora.r)
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(
            f"{path}: lacks {PREFIX}{missing[0]} ({len(missing)} of {len(shapes)} tensors are missing)"
        )
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"{path}: holds {PREFIX}{extra[0]}, which the model has no place for")
    for name, shape in shapes.items():
        if (found := tuple(tensors[name].shape)) != shape:
            raise ValueError(
                f"{path}: {PREFIX}{name} has shape {found}; rank and model ask for {shape}"
            )

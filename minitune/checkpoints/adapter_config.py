"""The adapter_config.json of an adapter in PEFT's file format, with what is refused in it."""

from pathlib import Path
from typing import Any

from minitune.config.numbers import check_number, number, shown
from minitune.read_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DROPOUTS = number(0, 1)

# PEFT options that change the result of an adapter and are not implemented; refused if set.
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "layers_to_transform",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Values of init_lora_weights that leave the base as it is. Others, such as pissa, alter it.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Return FOLDER/adapter_config.json.

    Raises: ValueError if the file is missing, or sets PEFT options that are not supported.
    """
    path = Path(folder) / CONFIG
    config = read_json(path, hint=f"an adapter folder holds {CONFIG} and {WEIGHTS}")
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{path}: peft_type is {shown(kind)}; only LORA adapters are supported")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(
            f"{path}: bias is {shown(bias)}; only adapters without trained biases ('none') are "
            "supported"
        )
    for name in UNSUPPORTED:
        if value := config.get(name):
            raise ValueError(
                f"{path}: {name} is {shown(value)}, which is not supported; "
                "export a plain LoRA adapter instead"
            )
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise ValueError(
            f"{path}: init_lora_weights {shown(init)} altered the base weights too; "
            "only the adapter is read here"
        )
    _check_unused(config, path)
    return config


def _check_unused(config: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a value that decides nothing here is not one that PEFT writes."""
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [targets or ""]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{path}: target_modules is {shown(targets)}; expected names of linears, or a pattern"
        )
    if (dropout := config.get("lora_dropout")) is not None:
        check_number(f"{path}: lora_dropout", dropout, DROPOUTS)

"""What a run is made of, as frozen dataclasses: the model's shape (from config.json), the adapter, the training.

Every field is checked when the object is made, so that the rest of the code can rely on it. A field that a user may set
carries its help text and its range (`setting`); command-line flags and TOML keys are built from these (flags.py).
"""

import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = ("llama", "mistral")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")
INTERVALS = ("no", "steps", "epoch")
GGUF_METHODS = ("q8_0", "f16", "bf16", "f32")


def setting(default: Any, help: str, *, choices=None, **limits) -> Any:
    """A dataclass field with its help text and what its values must satisfy: least, above, below, most, choices."""
    return field(default=default, metadata={"help": help, "choices": choices, "limits": limits})


def check_settings(settings) -> None:
    """ValueError where a value of the dataclass is not of its field's type, or outside its range or choices."""
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        name, value, kinds = item.name, getattr(settings, item.name), get_args(hints[item.name]) or (hints[item.name],)
        if get_origin(hints[item.name]) is tuple:
            if not (isinstance(value, tuple) and all(isinstance(part, str) for part in value)):
                raise ValueError(f"{name} is {value!r}; expected a list of names")
            if wrong := [
                part for part in value if item.metadata.get("choices") and part not in item.metadata["choices"]
            ]:
                raise ValueError(f"{name} names {wrong[0]!r}; choose from {', '.join(item.metadata['choices'])}")
            continue
        if value is None and NoneType in kinds:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = bool in kinds if isinstance(value, bool) else isinstance(value, kinds) or (float in kinds and number)
        if not fits:
            raise ValueError(f"{name} is {value!r}; expected {' or '.join(WORDS.get(k, k.__name__) for k in kinds)}")
        if number and not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; expected a finite number")
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")
        for bound, limit in item.metadata.get("limits", {}).items():
            holds, words = LIMITS[bound]
            if not holds(value, limit):
                raise ValueError(f"{name} is {value!r}; expected {words} {limit}")


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", NoneType: "none"}
LIMITS = {
    "least": (lambda value, limit: value >= limit, "at least"),
    "above": (lambda value, limit: value > limit, "more than"),
    "below": (lambda value, limit: value < limit, "less than"),
    "most": (lambda value, limit: value <= limit, "at most"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family model. `raw` is config.json as it was read, for what is written beside a merge."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # None, {"rope_type": "linear", ...} or {"rope_type": "llama3", ...}
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    raw: dict

    def __post_init__(self):
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise ValueError(f"num_attention_heads {H} is not a multiple of num_key_value_heads {G}")
        if self.head_dim % 8 or self.head_dim > 256:
            raise ValueError(f"head_dim {self.head_dim} is not supported; attention takes multiples of 8 up to 256")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read FOLDER/config.json. ValueError names the field where the model is not one that this code runs."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            if path.with_name("adapter_config.json").is_file():
                raise ValueError(f"{folder}: is an adapter; load the model it was trained on, and the adapter onto it")
            raise ValueError(f"{path}: not found; a model folder holds config.json, *.safetensors and a tokenizer")
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        if not isinstance(raw, dict):
            raise ValueError(f"holds a {type(raw).__name__}, not an object")
        if (family := raw.get("model_type")) not in FAMILIES:
            raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
        if (act := raw.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act {act!r} is not supported; Llama-family models use 'silu'")
        if (window := raw.get("sliding_window")) is not None:
            raise ValueError(f"sliding_window {window} is not supported: attention here sees the whole sample")
        hidden, heads = _value(raw, "hidden_size", int), _value(raw, "num_attention_heads", int)
        theta, scaling = _rope(raw)
        return cls(
            vocab_size=_value(raw, "vocab_size", int),
            hidden_size=hidden,
            intermediate_size=_value(raw, "intermediate_size", int),
            num_hidden_layers=_value(raw, "num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=_value(raw, "num_key_value_heads", int, heads),
            head_dim=_value(raw, "head_dim", int, hidden // heads),
            max_position_embeddings=_value(raw, "max_position_embeddings", int, 2048),
            rms_norm_eps=_value(raw, "rms_norm_eps", float, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_value(raw, "tie_word_embeddings", bool, False),
            attention_bias=_value(raw, "attention_bias", bool, False),
            mlp_bias=_value(raw, "mlp_bias", bool, False),
            raw=raw,
        )


def _value(raw: dict, name: str, kind: type, default: Any = None) -> Any:
    """A field of config.json, or the default where it is missing or null; numbers are positive."""
    if (value := raw.get(name)) is None:
        if default is None:
            raise ValueError(f"{name} is missing; is this the config.json of a Llama-family model?")
        return default
    numeric = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, bool) if kind is bool else numeric and 0 < value < math.inf):
        expected = {bool: "true or false", int: "a whole number above 0", float: "a number above 0"}[kind]
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return value


def _rope(raw: dict) -> tuple[float, dict | None]:
    """(theta, scaling) from either layout: rope_theta + rope_scaling, or the rope_parameters of transformers >= 5."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_scaling is {parameters!r}; expected an object")
    theta = float(_value(parameters, "rope_theta", float, _value(raw, "rope_theta", float, 10000.0)))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    keys = {
        "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    }
    if kind not in keys:
        raise ValueError(f"rope scaling {kind!r} is not supported; supported are default, {', '.join(keys)}")
    return theta, {"rope_type": kind, **{key: float(_value(parameters, key, float)) for key in keys[kind]}}


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: W x + s B A x on the named linears, with s = lora_alpha / r (or / sqrt(r) with use_rslora)."""

    r: int = setting(16, "rank of the adapter", least=1)
    lora_alpha: float = setting(16, "scale of the adapter: lora_alpha / r times B A x", above=0)
    target_modules: tuple[str, ...] = setting(LINEARS, "linears that get an adapter")
    use_rslora: bool = setting(False, "divide lora_alpha by the root of r instead")

    def __post_init__(self):
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        check_settings(self)
        if not self.target_modules:
            raise ValueError(f"target_modules is empty; choose from {', '.join(LINEARS)}")
        for name in self.target_modules:
            if name not in LINEARS:
                raise ValueError(f"target module {name!r} does not exist; choose from {', '.join(LINEARS)}")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def bytes_of(size: str) -> int:
    """Bytes of a size like 24GiB, 500MiB or 8GB. ValueError for anything else."""
    units = {"B": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}
    if not (found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|MB|GB|MiB|GiB)", size)):
        raise ValueError(f"{size!r} is not a size; write it as 24GiB or 800MB")
    return int(float(found[1]) * units[found[2]])


@dataclass(frozen=True)
class SFTConfig:
    """A training run. Names mean what they mean in TRL and transformers; one that is not here is a TypeError.

    An optimizer step is per_device_train_batch_size * gradient_accumulation_steps samples (with packing: rows of
    max_length tokens), moved unpadded, in as few forward/backward passes as `micro_step_tokens` allows, and the loss
    is divided once by the number of trained-on tokens of the whole step: the split changes the speed, not the result.
    """

    output_dir: str | None = setting(None, "run folder; without it a new numbered folder under runs/")
    per_device_train_batch_size: int = setting(8, "samples (with packing: rows) of an optimizer step ...", least=1)
    gradient_accumulation_steps: int = setting(1, "... times this", least=1)
    num_train_epochs: float = setting(3.0, "times through the data", above=0)
    max_steps: int = setting(-1, "optimizer steps; when positive it replaces num_train_epochs")
    learning_rate: float = setting(2e-5, "peak learning rate; adapters usually want about 2e-4", least=0)
    lr_scheduler_type: str = setting("linear", "how the rate falls after warm-up", choices=SCHEDULES)
    warmup_steps: float = setting(0, "steps of linear warm-up; below 1 a share of all steps", least=0)
    warmup_ratio: float = setting(0.0, "warm-up as a share of all steps, where warmup_steps is 0", least=0, most=1)
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", least=0)
    adam_beta1: float = setting(0.9, "decay of the first moment", least=0, below=1)
    adam_beta2: float = setting(0.999, "decay of the second moment", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "added to the root of the second moment", least=0)
    optim: str = setting(
        "adamw_torch_fused", "AdamW on one flat buffer; moments in float32, or with adamw_8bit in 8", choices=OPTIMIZERS
    )
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm; 0 turns clipping off", least=0)
    max_length: int | None = setting(
        None, "longer samples are cut to this many tokens; default max_seq_length", least=2
    )
    packing: bool = setting(False, "count rows of max_length, filled with whole samples, instead of samples")
    assistant_only_loss: bool | None = setting(None, "train on assistant turns only; default: yes for conversations")
    completion_only_loss: bool | None = setting(None, "train on completions only; default: yes for prompt/completion")
    dataset_text_field: str = setting("text", "key of plain-text records")
    logging_steps: int = setting(10, "optimizer steps a metrics line", least=1)
    logging_first_step: bool = setting(False, "a metrics line for the first step too")
    save_strategy: str = setting("steps", "when to write checkpoint-N", choices=INTERVALS)
    save_steps: int = setting(500, "optimizer steps a checkpoint, with save_strategy steps", least=1)
    save_total_limit: int | None = setting(None, "checkpoints kept, the newest; default: all", least=1)
    eval_strategy: str = setting("no", "when to compute the loss of the evaluation data", choices=INTERVALS)
    eval_steps: int | None = setting(None, "steps between evaluations; default logging_steps", least=1)
    seed: int = setting(42, "the order of the samples is a function of this and the epoch", least=0, most=2**64 - 1)
    report_to: str = setting("none", "nothing is reported anywhere; metrics.jsonl holds everything", choices=("none",))
    micro_step_tokens: int | None = setting(None, "tokens of one forward/backward; default by device", least=1)
    memory_budget: str | None = setting(
        None,
        "GPU memory to plan with, as 24GiB, with use_gradient_checkpointing 'unsloth'; default: what is free",
    )
    host_memory: str | None = setting(
        None, "host memory that activations may wait in; default: half of what is available"
    )
    cuda_graphs: bool = setting(True, "on a GPU, capture a micro-step of each size and replay it")
    overwrite: bool = setting(False, "replace the run that output_dir holds")
    resume: bool = setting(False, "continue from output_dir's newest checkpoint, or start where there is none")

    def __post_init__(self):
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        check_settings(self)
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}; expected at least 1, or -1 for num_train_epochs")
        for size in (self.memory_budget, self.host_memory):
            if size is not None:
                bytes_of(size)
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume exclude each other: one drops the old run, the other continues it")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected whole steps, or a share below 1")
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError("lr_scheduler_type 'constant' has no warm-up; choose 'constant_with_warmup'")

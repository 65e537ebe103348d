"""The settings of an adapter and of a command, and the words that settings choose from."""

import re
from dataclasses import dataclass
from typing import Any

from minitune.config.architectures import ALL_TARGETS, LORA_TARGETS
from minitune.config.fields import check_settings, setting
from minitune.config.foreign_arguments import foreign_arguments
from minitune.config.loading_arguments import LORA
from minitune.config.numbers import Bounds, shown

SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "inverse_sqrt"),
    *("constant", "constant_with_warmup"),
)
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")
INTERVALS = ("no", "steps", "epoch")
SAVE_STRATEGIES = (*INTERVALS, "best")
REPORTS = ("none", "tensorboard")
SCORES = ("exact_match", "contains")  # of answers, built in
DTYPES = ("float32", "bfloat16", "float16")
PATHS = ("data", "eval_data")  # lists of paths, which may hold a comma
GGUF_METHODS = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
NOT_QUANTIZED = "not_quantized"
# Unsloth's and llama.cpp's names -> the type; not_quantized depends on the model's dtype
GGUF_ALIASES = {
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "quantized": "q4_k_m",
    "fast_quantized": "q8_0",
    NOT_QUANTIZED: "f16 or bf16",
}
GGUF_WORDS = (*GGUF_METHODS, *GGUF_ALIASES)
DROPPED_TEXT = ("error", "warn")
MERGE_BASES = ("auto", "original", "nf4")
# With these the planner chooses which activations are saved, recomputed or offloaded.
PLANNED_CHECKPOINTING = ("unsloth", "auto")
# use_gradient_checkpointing as a word on the command line -> the argument of get_peft_model.
GRADIENT_CHECKPOINTING: dict[str, bool | str] = {
    **{word: word for word in PLANNED_CHECKPOINTING},
    "true": True,
    "false": False,
}
MAX_SEQ_LENGTH = 1 << 24  # tokens; the longest published context has 10,485,760
MAX_RANK = 1 << 16
SEEDS = Bounds(int, -(2**63), 2**64 - 1)  # of torch's generators
MAX_BYTES = 1 << 60
SIZE_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_bytes(size: str) -> int:
    """Return the bytes of a size such as 24GiB, 500MiB or 8GB.

    Raises: ValueError if the text is not a size.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|MB|GB|MiB|GiB)", size)
    if not found:
        raise ValueError(f"{shown(size)} is not a size; write it as 24GiB or 800MB")
    nbytes = float(found[1]) * SIZE_UNITS[found[2]]
    if nbytes > MAX_BYTES:
        raise ValueError(f"{shown(size)} is more than any machine has; write it as 24GiB or 800MB")
    return int(nbytes)


FROZEN_MODULES = ("embed_tokens", "lm_head")  # that other libraries can train


@foreign_arguments(**LORA)
@dataclass(frozen=True)
class LoraConfig:
    """An adapter: W x + s B A x on the named linears, s = lora_alpha / r (or / sqrt(r), rslora).

    The names are PEFT's and the defaults Unsloth's. `target_modules` may be a list, "all-linear" or
    None for all linears.
    """

    r: int = setting(16, "rank of the adapter", minimum=1, maximum=MAX_RANK)
    lora_alpha: float = setting(
        16, "scale of the adapter: lora_alpha / r times B A x", greater_than=0
    )
    target_modules: tuple[str, ...] = setting(LORA_TARGETS, "linears that get an adapter")
    use_rslora: bool = setting(False, "divide lora_alpha by the root of r instead")

    def __post_init__(self):
        object.__setattr__(self, "target_modules", _targets(self.target_modules))
        check_settings(self)
        if not self.target_modules:
            raise ValueError(f"target_modules is empty; choose from {', '.join(LORA_TARGETS)}")
        for name in self.target_modules:
            if name in FROZEN_MODULES:
                raise ValueError(
                    f"target module {name!r} is not supported: the embedding and the head stay "
                    "frozen; leave it out, and use a larger r"
                )
            if name not in ALL_TARGETS:
                raise ValueError(
                    f"target module {name!r} does not exist; choose from {', '.join(ALL_TARGETS)}"
                )

    @property
    def scaling(self) -> float:
        """Return s, the factor of B A x."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def _targets(target_modules: Any) -> Any:
    """Return target_modules as a tuple of names, or the value itself if it is no such thing."""
    if target_modules in (None, "all-linear"):
        return LORA_TARGETS
    if isinstance(target_modules, set | frozenset):
        return tuple(sorted(target_modules))
    return tuple(target_modules) if isinstance(target_modules, list) else target_modules


@dataclass(frozen=True)
class RunConfig:
    """The settings of a command beside SFTConfig and LoraConfig: model, data, and final outputs."""

    model: str | None = setting(
        None,
        "model folder, GGUF file, or an org/name id in the local Hugging Face cache; or the folder "
        "of a run or an adapter, which is then trained further",
    )
    adapter: str | None = setting(
        None, "folder of a run or an adapter to train further, if the model is its base"
    )
    data: tuple[str, ...] = setting(
        (), "training data: JSONL, JSON, CSV, text or Parquet files, or a folder of `datasets`"
    )
    eval_data: tuple[str, ...] = setting((), "evaluation data, in the same formats")
    max_seq_length: int | None = setting(
        None,
        "tokens of the longest sample; default: 2048, or the model's limit if less",
        minimum=2,
        maximum=MAX_SEQ_LENGTH,
    )
    load_in_4bit: bool = setting(
        True,
        "hold the frozen linears in NF4 (QLoRA), not in 16 bit; a GGUF file keeps its own types",
    )
    dtype: str | None = setting(None, "compute dtype; default by device", choices=DTYPES)
    offload_embedding: bool = setting(
        False, "hold the embedding in host memory; a GPU reads its rows from there"
    )
    use_gradient_checkpointing: str = setting(
        "unsloth", "what backward recomputes", choices=tuple(GRADIENT_CHECKPOINTING)
    )
    random_state: int | None = setting(
        None,
        "seed of the adapter's initial values; default: seed",
        minimum=SEEDS.minimum,
        maximum=SEEDS.maximum,
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    merge: bool = setting(False, "write the merged 16-bit model to OUTPUT_DIR/merged at the end")
    merge_base: str = setting(
        "auto", "weights that the adapter is merged into", choices=MERGE_BASES
    )
    gguf: tuple[str, ...] = setting(
        (), "write GGUF files at the end, of these types", choices=GGUF_WORDS
    )
    report: bool = setting(
        False, "write the report of the run to OUTPUT_DIR/report.html at the end"
    )

    show: int = setting(
        0, "before training, print this many samples with their trained-on tokens", minimum=0
    )
    check_base: bool = setting(
        False, "before training, measure on a few samples the difference that NF4 makes to the base"
    )

    def __post_init__(self):
        for name in PATHS:  # a TOML file may name a single path as a string
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if isinstance(self.gguf, tuple) and all(isinstance(word, str) for word in self.gguf):
            object.__setattr__(self, "gguf", tuple(word.lower() for word in self.gguf))
        check_settings(self)
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(
                f"device is {self.device!r}; expected cpu, cuda, or a numbered GPU such as cuda:1"
            )

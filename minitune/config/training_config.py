"""TODO docstring."""

import os
import re
from dataclasses import dataclass

from minitune.config.architectures import LORA_TARGETS
from minitune.config.fields import check_settings, setting

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")


INTERVALS = ("no", "steps", "epoch")


GGUF_METHODS = ("q8_0", "f16", "bf16", "f32")


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: W x + s B A x on the named linears, with s = lora_alpha / r (or / sqrt(r) with use_rslora)."""

    r: int = setting(16, "rank of the adapter", least=1)
    lora_alpha: float = setting(16, "scale of the adapter: lora_alpha / r times B A x", above=0)
    target_modules: tuple[str, ...] = setting(LORA_TARGETS, "linears that get an adapter")
    use_rslora: bool = setting(False, "divide lora_alpha by the root of r instead")

    def __post_init__(self):
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        check_settings(self)
        if not self.target_modules:
            raise ValueError(f"target_modules is empty; choose from {', '.join(LORA_TARGETS)}")
        for name in self.target_modules:
            if name not in LORA_TARGETS:
                raise ValueError(
                    f"target module {name!r} does not exist; choose from {', '.join(LORA_TARGETS)}"
                )

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def parse_bytes(size: str) -> int:
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

    output_dir: str | None = setting(
        None, "run folder; without it a new numbered folder under runs/"
    )
    per_device_train_batch_size: int = setting(
        8, "samples (with packing: rows) of an optimizer step ...", least=1
    )
    gradient_accumulation_steps: int = setting(1, "... times this", least=1)
    num_train_epochs: float = setting(3.0, "times through the data", above=0)
    max_steps: int = setting(-1, "optimizer steps; when positive it replaces num_train_epochs")
    learning_rate: float = setting(
        2e-5, "peak learning rate; adapters usually want about 2e-4", least=0
    )
    lr_scheduler_type: str = setting(
        "linear", "how the rate falls after warm-up", choices=SCHEDULES
    )
    warmup_steps: float = setting(
        0, "steps of linear warm-up; below 1 a share of all steps", least=0
    )
    warmup_ratio: float = setting(
        0.0, "warm-up as a share of all steps, where warmup_steps is 0", least=0, most=1
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", least=0)
    adam_beta1: float = setting(0.9, "decay of the first moment", least=0, below=1)
    adam_beta2: float = setting(0.999, "decay of the second moment", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "added to the root of the second moment", least=0)
    optim: str = setting(
        "adamw_torch_fused",
        "AdamW on one flat buffer; moments in float32, or with adamw_8bit in 8",
        choices=OPTIMIZERS,
    )
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this global norm; 0 turns clipping off", least=0
    )
    max_length: int | None = setting(
        None, "longer samples are cut to this many tokens; default max_seq_length", least=2
    )
    packing: bool = setting(
        False, "count rows of max_length, filled with whole samples, instead of samples"
    )
    assistant_only_loss: bool | None = setting(
        None, "train on assistant turns only; default: yes for conversations"
    )
    completion_only_loss: bool | None = setting(
        None, "train on completions only; default: yes for prompt/completion"
    )
    dataset_text_field: str = setting("text", "key of plain-text records")
    logging_steps: int = setting(10, "optimizer steps a metrics line", least=1)
    logging_first_step: bool = setting(False, "a metrics line for the first step too")
    save_strategy: str = setting("steps", "when to write checkpoint-N", choices=INTERVALS)
    save_steps: int = setting(
        500, "optimizer steps a checkpoint, with save_strategy steps", least=1
    )
    save_total_limit: int | None = setting(
        None, "checkpoints kept, the newest; default: all", least=1
    )
    eval_strategy: str = setting(
        "no", "when to compute the loss of the evaluation data", choices=INTERVALS
    )
    eval_steps: int | None = setting(
        None, "steps between evaluations; default logging_steps", least=1
    )
    seed: int = setting(
        42, "the order of the samples is a function of this and the epoch", least=0, most=2**64 - 1
    )
    report_to: str = setting(
        "none", "nothing is reported anywhere; metrics.jsonl holds everything", choices=("none",)
    )
    micro_step_tokens: int | None = setting(
        None, "tokens of one forward/backward; default by device", least=1
    )
    memory_budget: str | None = setting(
        None,
        "GPU memory to plan with, as 24GiB, with use_gradient_checkpointing 'unsloth'; default: what is free",
    )
    host_memory: str | None = setting(
        None, "host memory that activations may wait in; default: half of what is available"
    )
    cuda_graphs: bool = setting(True, "on a GPU, capture a micro-step of each size and replay it")
    overwrite: bool = setting(False, "replace the run that output_dir holds")
    resume: bool = setting(
        False, "continue from output_dir's newest checkpoint, or start where there is none"
    )

    def __post_init__(self):
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        check_settings(self)
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps is {self.max_steps}; expected at least 1, or -1 for num_train_epochs"
            )
        for size in (self.memory_budget, self.host_memory):
            if size is not None:
                parse_bytes(size)
        if self.overwrite and self.resume:
            raise ValueError(
                "overwrite and resume exclude each other: one drops the old run, the other continues it"
            )
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; expected whole steps, or a share below 1"
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ValueError(
                "lr_scheduler_type 'constant' has no warm-up; choose 'constant_with_warmup'"
            )

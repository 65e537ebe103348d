"""The system unsloth. It patches torch and transformers, so it is imported before transformers."""

from unsloth import FastLanguageModel  # isort: skip

from pathlib import Path

import torch
from torch import Tensor

from minitune.config.architectures import LORA_TARGETS
from referees.system_peft import nf4_of_bitsandbytes, peft_system
from referees.systems import ALPHA, R, System, overwrite_nf4


def load(name: str, folder: str | Path, tensors: dict[str, Tensor], max_tokens: int) -> System:
    """Return the system with the NF4 tensors."""
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=max_tokens, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(LORA_TARGETS),
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    system = peft_system(model, nf4_of_bitsandbytes(model), autocast=True)
    overwrite_nf4(system.nf4, tensors)
    return system

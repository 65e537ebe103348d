"""The benchmark's peer Unsloth, which patches torch and transformers: its import comes first."""

from unsloth import FastLanguageModel  # isort: skip

import argparse
from typing import Any

import torch

from referees.peers import TARGETS


def load(a: argparse.Namespace) -> tuple[Any, Any]:
    """Return Unsloth's model with an adapter, and its tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=a.model, max_seq_length=a.tokens, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=a.r,
        lora_alpha=a.r if a.short else 2 * a.r,
        lora_dropout=0,
        bias="none",
        target_modules=list(TARGETS[a.targets]),
        use_gradient_checkpointing="unsloth" if a.checkpointing == "default" else False,
        random_state=3407,
    )
    return model, tokenizer

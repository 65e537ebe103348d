"""The benchmark's peer hf: transformers + PEFT + bitsandbytes."""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from referees.peers import TARGETS


def load(a: argparse.Namespace) -> tuple[Any, None]:
    """Return the model with an adapter, and no tokenizer."""
    model = load_nf4(a.model)
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=a.checkpointing == "default",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return with_adapter(model, a), None


def load_for_generation(a: argparse.Namespace) -> tuple[Any, None]:
    """Return the model with an adapter, in the dtypes that it was loaded in, and no tokenizer."""
    return with_adapter(load_nf4(a.model), a), None


def with_adapter(model: Any, a: argparse.Namespace) -> Any:
    """Return the model with a new adapter on the targets of the flags."""
    lora = LoraConfig(
        r=a.r,
        lora_alpha=2 * a.r,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(TARGETS[a.targets]),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def load_nf4(folder: str | Path) -> Any:
    """Return transformers' model of a 16-bit folder with bitsandbytes' linears.

    The linears are NF4 with double quantisation and compute in bf16.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
    )

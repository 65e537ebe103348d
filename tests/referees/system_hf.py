"""The systems hf and reference: transformers + PEFT, on bitsandbytes' linears or in float32."""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from minitune.config.architectures import LORA_TARGETS
from referees.peer_hf import load_nf4
from referees.system_peft import DEVICE, nf4_of_bitsandbytes, peft_system
from referees.systems import ALPHA, R, System, overwrite_nf4


def load(name: str, folder: str | Path, tensors: dict[str, Tensor], max_tokens: int) -> System:
    """Return the system `name` with the NF4 tensors."""
    logging.disable_progress_bar()
    model = load_nf4(folder)
    nf4 = nf4_of_bitsandbytes(model)
    overwrite_nf4(nf4, tensors)
    exact = name == "reference"
    if exact:
        model = _float32_model(folder, model)
    lora = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(LORA_TARGETS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return peft_system(get_peft_model(model, lora), nf4, autocast=not exact)


def _float32_model(folder: str | Path, quantised: Any) -> Any:
    """Return the model in float32, its linears dequantised from those of `quantised`."""
    torch.set_float32_matmul_precision("highest")
    linears = dict(quantised.named_modules())
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.to(DEVICE)
    for name, linear in model.named_modules():
        if name.rpartition(".")[2] in LORA_TARGETS:
            w = linears[name].weight
            w.quant_state.dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
            linear.weight.data = dequantize_4bit(w.data, w.quant_state).float()
    return model

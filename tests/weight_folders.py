"""Model folders for the tests of loading: written by bitsandbytes, or edited."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitune import FastLanguageModel

SKIPPED = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")


def load(folder, **kwargs):
    """Return the model of a folder, in float32 on the CPU."""
    return FastLanguageModel.from_pretrained(
        folder, max_seq_length=64, dtype=torch.float32, device="cpu", **kwargs
    )[0]


def write_bitsandbytes(source, folder, double_quant=True, skip=None, quant_type="nf4", **options):
    """Quantise and write `source` with transformers and bitsandbytes; return their model.

    options: further arguments of BitsAndBytesConfig.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
        **options,
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=config,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="eager",
    )
    hf.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    return hf


def edit_json(path, **changes):
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    """Rewrite model.safetensors after `change` was applied to the dictionary of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")

"""Tiny random multimodal models around a text model, written by transformers."""

import json

import torch
import transformers
from family_configs import COMMON, VISION, WRAPPERS
from tiny import GENERATION_CONFIG, draw, write_tokenizer


def make_wrapper(folder, case):
    """Write a random multimodal model in float32 as transformers saves it; return its model."""
    model_type, text, outer = WRAPPERS[case]
    config = transformers.AutoConfig.for_model(
        model_type, **({"vision_config": VISION} | outer), text_config=COMMON | text
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = name.replace("language_model.", "").replace("text_model.", "")
            # As in bfloat16, which a merge keeps.
            parameter.copy_(draw(plain, tuple(parameter.shape), generator).bfloat16())
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    write_tokenizer(folder, "llama3" if "qwen" in text["model_type"] else "spm")
    return model.eval()

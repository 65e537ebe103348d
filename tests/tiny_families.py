"""Tiny random models of each family, written by transformers with tiny.py's weights and tokenizer.

transformers decides the names and shapes of the tensors and the keys of config.json.
"""

import json
from pathlib import Path

import torch
import transformers
from family_configs import COMMON, FAMILIES
from tiny import GENERATION_CONFIG, draw, write_tokenizer


def make_tiny_family(folder: Path, case: str, seed: int = 0, **changes) -> Path:
    """Write a random model of FAMILIES[case] in float32, and return its folder.

    changes: values of config.json.
    """
    model_type, values = FAMILIES[case]
    config = transformers.AutoConfig.for_model(model_type, **(COMMON | values | changes))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    state = {
        # The head is as small as an embedding: float16 errors of llama.cpp grow with the logits.
        name: draw(name.replace("lm_head", "head"), tuple(tensor.shape), generator)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    if model_type.startswith("gemma"):  # its norms multiply by 1 + weight
        state |= {name: t - 1 for name, t in state.items() if name.endswith("norm.weight")}
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    write_tokenizer(folder, "llama3" if model_type.startswith("qwen") else "spm")
    return folder

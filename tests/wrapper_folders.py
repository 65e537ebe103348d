"""Tiny random multimodal models around a text model, written by transformers."""

import json

import torch
import transformers
from tiny import GENERATION_CONFIG, draw, write_tokenizer
from tiny_families import COMMON

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}
# name of the case -> (model_type of the wrapper, text_config, values of the wrapper)
WRAPPERS = {
    "llava": ("llava", {"model_type": "llama"}, {"image_token_index": 5}),
    "llava with scaled RoPE": (
        "llava",
        {"model_type": "llama", "rope_parameters": LINEAR, "tie_word_embeddings": True},
        {"image_token_index": 5, "tie_word_embeddings": True},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"tie_word_embeddings": False},
    ),
    "mistral3 tied by the wrapper": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"tie_word_embeddings": True},
    ),
    "ministral3 in mistral3": (
        "mistral3",
        {"model_type": "ministral3", "head_dim": 32, "rope_parameters": GROWING},
        {"tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3",
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "head_dim": 32,
            "sliding_window": 20,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "full_attention": LINEAR | {"factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
        {"mm_tokens_per_image": 4, "tie_word_embeddings": True},
    ),
    "granite in llava": (
        "llava",
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        {"image_token_index": 5},
    ),
    "idefics3": ("idefics3", {"model_type": "llama", "pad_token_id": 2}, {}),
    "internvl": ("internvl", {"model_type": "qwen2"}, {}),
    "qwen2.5 with sections": (
        "qwen2_5_vl",
        {"model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
        {"vision_config": QWEN_VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]}},
    ),
    "qwen3 with sections": (
        "qwen3_vl",
        {
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "rope_parameters": MROPE | {"mrope_interleaved": True},
        },
        {"vision_config": QWEN_VISION | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}},
    ),
}


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

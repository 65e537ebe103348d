"""A small Llama with random weights and a tokenizer, for a machine that is checked without a model.

The weights are drawn so that activations keep their size from layer to layer. The tokenizer is
byte-level BPE with SmolLM2's pre-tokenizer, which GGUF files can name.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minitune.atomic_files import write_json
from minitune.checkpoints.safetensors_folder import WHOLE
from minitune.checkpoints.safetensors_writer import specs_of_dtype, write_safetensors
from minitune.config.model_config import EMBEDDING, ModelConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 768,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    "Two trains leave the station at noon, and the slower one arrives before the faster one.",
    "She'd counted 31 boxes; they're in the cellar, beneath 4 sheets of paper.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
TOKENS = 400  # fewer than rows of the embedding, as in many models
MATRIX_GAIN = 1.5  # keeps the logits several units apart


def write_random_model(folder: Path) -> Path:
    """Write config.json, weights and tokenizer into a new folder, and return the folder."""
    folder.mkdir()
    config = ModelConfig.from_dict(CONFIG)
    specs = specs_of_dtype(config.tensor_shapes(), torch.bfloat16)
    write_safetensors(folder / WHOLE, specs, _random_tensors(config), {"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    _write_tokenizer(folder)
    return folder


def _random_tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in config.tensor_shapes().items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 1 + 0.2 * values
        elif name != EMBEDDING:
            values *= MATRIX_GAIN * shape[1] ** -0.5
        yield name, values.to(torch.bfloat16)


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    end, begin, turn_end = SPECIAL
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": turn_end,
        "pad_token": end,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)

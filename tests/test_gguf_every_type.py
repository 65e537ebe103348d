"""A file of each type computes in llama.cpp what this project computes from the same bytes."""

import pytest
import torch
from gguf_files import LLAMA3_ROPE
from referees.llama_cpp import LlamaCpp
from tiny import make_tiny_model
from tiny_families import make_tiny_family

from minitune.checkpoints.load_weights import open_model_folder
from minitune.config.training_config import GGUF_METHODS
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.reader import GgufReader
from minitune.gguf.streamed_logits import next_token_log_probabilities

# Rows of 256 values, so that no type falls back to another. Heads have not D / H columns.
LLAMA = {"hidden": 256, "ffn": 512, "heads": 8, "head_dim": 64, "tie": False, "tokenizer": "llama3"}
QWEN = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
TEXT = (
    "The lighthouse stood at the end of the pier. Every evening its keeper climbed the stairs, lit "
    "the lamp and wrote down the names of the ships that passed. In winter there were few of them, "
    "and he read books about distant countries instead."
)
# llama.cpp rounds activations to 8 bit before a product with quantised weights, and to 16 bit
# before one with float16 or bfloat16.
LIMITS = {"f32": 1e-4, "f16": 1e-3, "bf16": 2e-3}
QUANTIZED_LIMIT = 0.02


def divergences(path, folder, prompts):
    """Return the KL divergence of llama.cpp's next tokens from ours, after each prompt."""
    config, _ = open_model_folder(folder)
    weights = FileWeights(GgufReader(path), config)
    ours = next_token_log_probabilities(weights, prompts, torch.device("cpu")).double()
    llama_cpp = LlamaCpp(path)
    vocab = config.vocab_size
    theirs = torch.stack([llama_cpp.next_log_probabilities(p, vocab) for p in prompts]).double()
    theirs = theirs.log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(1)


def random_prompts():
    ids = torch.randint(3, 400, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    return [ids[:length] for length in (1, 7, 40)]


def check_types(folder, output, prompts, methods=tuple(GGUF_METHODS)):
    paths = convert_folder(folder, output, list(methods), verify=False)
    for method, path in zip(methods, paths, strict=True):
        found = divergences(path, folder, prompts).mean().item()
        assert found < LIMITS.get(method, QUANTIZED_LIMIT), (method, found)


def test_llama_3_with_rope_scaling_and_a_head_of_its_own(tmp_path):
    folder = make_tiny_model(tmp_path / "base", rope_scaling=LLAMA3_ROPE, **LLAMA)
    check_types(folder, tmp_path, random_prompts())


@pytest.mark.parametrize("case", ["qwen3", "qwen3 tied"])
def test_qwen3(tmp_path, case):
    folder = make_tiny_family(tmp_path / "base", case, **QWEN)
    check_types(folder, tmp_path, random_prompts())


@pytest.mark.slow
def test_smollm2(tmp_path, smollm2):
    # A text: on random tokens the rounding of activations alone makes 0.03. The rows of 576 values
    # let the K types fall back to others.
    prompts = [Tokenizer.from_folder(smollm2).encode(TEXT)]
    check_types(smollm2, tmp_path, prompts, ("f16", "q8_0", "q4_0", "q5_1", "q3_k_m", "q4_k_m"))

"""A comparison of the next-token distributions that llama.cpp and this project compute from a file.

Both read the same values, so they differ only by their rounding: llama.cpp rounds activations to 8
bits before a product with quantised weights. A fault of the layout, such as an order of rows that
llama.cpp does not expect, changes the distributions by far more.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.device import free_memory
from minitune.gguf import llama_cpp_probe
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.model_metadata import ignored_window
from minitune.gguf.streamed_logits import next_token_log_probabilities
from minitune.read_files import parse_json, read_text
from minitune.system_folders import temporary_folder

TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4, 5, 6,",
    "Once upon a time there was a small house at the edge of the forest. In it",
)
MAX_PROMPT = 64  # tokens
WHOLE_WORD = "a"
FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
# Largest mean KL divergence in nats. SmolLM2 135M has 0.005 in Q8_0, and 2 with q's and k's rows in
# a wrong order.
MAX_KL_FLOATS, MAX_KL_QUANTIZED = 0.02, 0.2
TIMEOUT = 3600  # seconds
SMALLEST = 1e-12  # probability that is told from 0


def compare_with_llama_cpp(weights: FileWeights, tokenizer: Tokenizer, device: torch.device) -> str:
    """Compare the distributions after a few prompts and return what was found, in a few words.

    Without a package for llama.cpp, the memory that it needs, or a Python interpreter to run it,
    nothing is compared.

    Raises: ValueError if llama.cpp does not load the file, or computes other distributions.
    """
    path, package = weights.reader.path, llama_cpp_probe.installed_package()
    if package is None:
        return "not run in llama.cpp, because neither llama_cpp nor xllamacpp is installed"
    if not sys.executable or getattr(sys, "frozen", False):  # a program that embeds Python
        return "not run in llama.cpp, because this program is no Python interpreter"
    if weights.reader.size > free_memory(torch.device("cpu")):
        return "not run in llama.cpp, because the file is larger than the free memory"
    longest = min(MAX_PROMPT, ignored_window(weights.config) or MAX_PROMPT)
    prompts = [tokenizer.encode(text)[:longest] for text in TEXTS]
    question = {
        "prompts": prompts,
        "whole": tokenizer.encode(WHOLE_WORD, add_special_tokens=False)[-1],
    }
    theirs = _ask_llama_cpp(path, question, package)
    ours = next_token_log_probabilities(weights, prompts, device).double()
    divergence = sum(map(_divergence, theirs, ours)) / len(prompts)
    in_floats = all(tensor.type in FLOATS for tensor in weights.reader.tensors.values())
    limit = MAX_KL_FLOATS if in_floats else MAX_KL_QUANTIZED
    if not divergence <= limit:
        raise ValueError(
            f"llama.cpp ({package}) computes other next tokens from the file than this "
            f"model does: mean KL divergence {divergence:.3g}, expected at most {limit}; update "
            f"{package}, or leave the check out with verify=False"
        )
    return f"next tokens in llama.cpp: KL divergence {divergence:.2g}"


def _divergence(theirs: list[tuple[int, float | None]], ours: Tensor) -> float:
    """Return the KL divergence of our distribution from llama.cpp's, in nats.

    Tokens beyond llama.cpp's likeliest count as one token, which makes the divergence smaller.

    theirs: (id, log probability) of the likeliest tokens, with None for NaN.
    ours: log probabilities (V,).
    """
    ids = torch.tensor([id for id, _ in theirs])
    logs = [math.nan if log is None else log for _, log in theirs]
    p = torch.tensor(logs, dtype=torch.float64).exp()
    q = ours[ids].exp()
    p, q = (torch.cat([x, (1 - x.sum())[None]]).clamp(min=SMALLEST) for x in (p, q))
    return (p * (p / q).log()).sum().item()


def _ask_llama_cpp(path: Path, question: dict, package: str) -> list[list[tuple[int, float]]]:
    """Return llama.cpp's likeliest next tokens after each prompt, with log probabilities.

    Raises: ValueError if llama.cpp fails.
    """
    with tempfile.TemporaryDirectory(prefix="minitune-", dir=temporary_folder()) as folder:
        asked, answered = Path(folder, "question.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(question), encoding="utf-8")
        command = [sys.executable, "-P", llama_cpp_probe.__file__, path, asked, answered]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ValueError(f"llama.cpp ({package}) took over {TIMEOUT} s") from None
        if run.returncode or not answered.is_file():
            raise ValueError(
                f"llama.cpp ({package}) does not run the file: {_reason(run.stderr)}; update "
                f"{package}, or leave the check out with verify=False"
            )
        return parse_json(read_text(answered), str(answered))


def _reason(log: str) -> str:
    """Return the line of llama.cpp's log that says why it ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it left no message"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])

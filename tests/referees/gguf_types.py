"""Compare the types of a GGUF file's tensors with llama-quantize's, for every file type.

    python tests/referees/gguf_types.py LLAMA_QUANTIZE [--write]

LLAMA_QUANTIZE is the path of that program. --write records its choices in tests/gguf_types.json,
against which CI tests ours. Each case is a small model in F16, for which llama-quantize prints the
types without quantising.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minitune.atomic_files import write_json
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import GGUF_METHODS
from minitune.gguf.content import file_content
from minitune.gguf.importance.imatrix_files import write_imatrix
from minitune.gguf.importance.importance import ImportanceMatrix
from minitune.gguf.model_metadata import model_metadata
from minitune.gguf.writer import write_gguf

GOLDEN = Path(__file__).resolve().parents[1] / "gguf_types.json"
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 19,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
LLAMA = SMALL | {"model_type": "llama"}
# 80 layers and fewer key and value heads than query heads: llama.cpp's size 70B
LLAMA_70B = LLAMA | {"num_hidden_layers": 80, "num_key_value_heads": 1, "intermediate_size": 256}
CASES = {
    "llama, 4 query heads a group": LLAMA,
    "llama, 8 query heads a group, tied": LLAMA
    | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, 2 query heads a group": LLAMA | {"num_key_value_heads": 4},
    "llama, 6 layers": LLAMA | {"num_hidden_layers": 6},
    "llama, 70B": LLAMA_70B,
    "llama, 65B": LLAMA_70B | {"num_key_value_heads": 8},
    "llama, widths of 32 k": LLAMA
    | {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama, widths of 32 k, tied": LLAMA
    | {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"tie_word_embeddings": True},
    "llama, widths of 16 k": LLAMA
    | {"hidden_size": 272, "num_attention_heads": 17, "num_key_value_heads": 1, "head_dim": 16}
    | {"intermediate_size": 304},
    "mistral3, 80 layers": LLAMA_70B | {"model_type": "ministral3"},
    "qwen2, 80 layers": LLAMA_70B | {"model_type": "qwen2"},
    "qwen3": SMALL | {"model_type": "qwen3"},
    "qwen3, tied": SMALL | {"model_type": "qwen3", "tie_word_embeddings": True},
    "phi3": SMALL | {"model_type": "phi3"},
    "phi3, widths of 32 k": SMALL
    | {"model_type": "phi3", "hidden_size": 288, "num_attention_heads": 9}
    | {"num_key_value_heads": 9, "intermediate_size": 544},
    "gemma3": SMALL | {"model_type": "gemma3_text", "num_hidden_layers": 20},
    "olmo2": SMALL | {"model_type": "olmo2", "num_key_value_heads": 8},
}
LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\w+), size = +[\d.]+ MiB(?: -> .*\((\w+)\))?$",
    re.MULTILINE,
)


def case_config(case: str) -> ModelConfig:
    """Return the config of a case."""
    values = {"tie_word_embeddings": False, "pad_token_id": 0} | CASES[case]
    return ModelConfig.from_dict(values)


def golden_key(method: str, has_importance: bool) -> str:
    """Return the key of a file in the golden data of a case."""
    return f"{method} with importance" if has_importance else method


def summary(types: dict[str, str]) -> str:
    """Return the number of tensors of each type, and a hash of all names and types."""
    counts = Counter(types.values())
    digest = hashlib.sha256(json.dumps(sorted(types.items())).encode()).hexdigest()[:16]
    return " ".join(f"{counts[kind]}x{kind}" for kind in sorted(counts)) + f" {digest}"


def our_types(config: ModelConfig, method: str, has_importance: bool) -> dict[str, str]:
    """Return the type of each tensor that `export_gguf` chooses."""
    importance = matrix(config) if has_importance else None
    content = file_content(config, method, "x", {}, {}, importance)
    return {info.name: info.type.name for info in content.infos}


def matrix(config: ModelConfig) -> ImportanceMatrix:
    """Return an importance matrix with one tensor of a model."""
    return ImportanceMatrix({"blk.0.ffn_down.weight": torch.ones(config.intermediate_size)}, 1)


class LlamaQuantize:
    """llama-quantize on the F16 file of one case."""

    def __init__(self, program: str, config: ModelConfig, folder: Path):
        self.program, self.model, self.matrix = program, folder / "m.gguf", folder / "m.imatrix"
        content = file_content(config, "f16", "x", {}, model_metadata(config), None)
        self.names = [info.name for info in content.infos]
        write_gguf({self.model: content}, (torch.zeros(info.shape) for info in content.infos))
        write_imatrix(matrix(config), self.matrix)

    def types(self, method: str, has_importance: bool) -> dict[str, str]:
        """Return the type of each tensor that llama-quantize chooses."""
        options = ["--imatrix", self.matrix] if has_importance else []
        result = subprocess.run(
            [self.program, "--dry-run", *options, self.model, method.upper()],
            capture_output=True,
            text=True,
            check=False,
        )
        found = LINE.findall(result.stdout + result.stderr)
        types = {name: (target or source).upper() for name, source, target in found}
        if sorted(types) != sorted(self.names):
            raise SystemExit(f"{method}: not understood:\n{result.stdout}{result.stderr}")
        return types


def main() -> int:
    """Print each difference, and return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--write", action="store_true", help=f"write {GOLDEN.name}")
    arguments = parser.parse_args()
    golden: dict[str, dict[str, str]] = {}
    differences = count = 0
    for case in CASES:
        config = case_config(case)
        with tempfile.TemporaryDirectory() as folder:
            theirs = LlamaQuantize(arguments.program, config, Path(folder))
            for method in GGUF_METHODS:
                for has_importance in (False, True):
                    expected = theirs.types(method, has_importance)
                    ours = our_types(config, method, has_importance)
                    key = golden_key(method, has_importance)
                    golden.setdefault(case, {})[key] = summary(expected)
                    count += 1
                    for name in (name for name in expected if ours[name] != expected[name]):
                        differences += 1
                        print(f"{case}, {key}: {name} is {ours[name]}, not {expected[name]}")
    print(f"{count} files, {differences} tensors of another type than llama-quantize's")
    if arguments.write:
        write_json(GOLDEN, golden)
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())

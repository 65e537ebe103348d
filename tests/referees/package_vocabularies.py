"""Compare exported vocabularies with the ids that llama.cpp's source package expects.

    python tests/referees/package_vocabularies.py MODELS [--only NAME]

MODELS is the folder `models` of llama.cpp's source package. It holds vocabularies
(ggml-vocab-*.gguf), texts (.inp) and their ids (.out). Each vocabulary becomes a model folder
again, as its publisher ships it, and that folder becomes a GGUF file of a tiny random Llama.

A row of the table is a vocabulary. Its columns are

    name            llama.cpp's name for the word rule, from our file
    package         the name in the package
    here            texts that the rebuilt tokenizer cuts otherwise than expected, of all texts
    from GGUF       texts that llama.cpp cuts otherwise than expected with our file
    not NFC         those of `here` that are not in NFC form, which llama.cpp does not make
"""

import argparse
import json
import re
import struct
import sys
import tempfile
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import make_tiny_model  # noqa: E402

from minitune.data.tokenization.tokenizer import Tokenizer  # noqa: E402
from minitune.gguf.export import convert_folder  # noqa: E402
from minitune.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PUBLISHED_VOCABULARIES  # noqa: E402
from minitune.gguf.tokenizer.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED  # noqa: E402
from referees.gguf_reading import read_gguf  # noqa: E402
from referees.llama_cpp import LlamaCpp  # noqa: E402
from referees.reporting import markdown_table  # noqa: E402

VOCABULARIES = (
    "llama-bpe",
    "llama-spm",
    "qwen2",
    "qwen35",
    "phi-3",
    "deepseek-llm",
    "deepseek-coder",
    "gpt-2",
    "mpt",
    "command-r",
    "starcoder",
    "refact",
)
NORMALIZED = ("qwen2", "qwen35", "command-r", "mpt")  # their tokenizer.json has NFC
WITH_BOS = ("llama-bpe", "command-r", "deepseek-llm", "deepseek-coder")
SEPARATOR = "\n__ggml_vocab_test__\n"
PHI_WITHOUT_RSTRIP = ("<unk>", "<s>", "<|endoftext|>")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@cache
def read_vocabulary(models: Path, name: str) -> dict[str, Any]:
    """Return the keys of a vocabulary below `tokenizer`, without `ggml`."""
    keys = read_gguf(models / f"ggml-vocab-{name}.gguf").keys
    return {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value.content
        for key, value in keys.items()
        if key.startswith("tokenizer.")
    }


def write_tokenizer_files(models: Path, name: str, folder: Path, as_json: bool = False) -> int:
    """Write the tokenizer files of a vocabulary, and return the number of its rows.

    as_json: write SentencePiece's pieces as tokenizer.json instead of tokenizer.model.
    """
    keys = read_vocabulary(models, name)
    tokens, types = keys["tokens"], keys["token_type"]
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    if keys["model"] == "llama":
        names["unk"] = "unknown"
    config = {
        f"{special}_token": tokens[keys[f"{key}_token_id"]]
        for special, key in names.items()
        if f"{key}_token_id" in keys
    }
    if "chat_template" in keys:
        config["chat_template"] = keys["chat_template"]
    used = [i for i, t in enumerate(types) if t != UNUSED]
    added = [i for i in used if types[i] in (CONTROL, USER_DEFINED)]
    if name in ("llama-spm", "phi-3"):
        added = sorted({0, 1, 2, *added})
    entries = [
        {
            **FLAGS,
            "id": i,
            "content": tokens[i],
            "special": types[i] != USER_DEFINED,
            "rstrip": name == "phi-3" and tokens[i] not in PHI_WITHOUT_RSTRIP,
        }
        for i in added
    ]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if keys["model"] == "llama" and not as_json:
        config["tokenizer_class"] = "LlamaTokenizer"
        config |= {"add_bos_token": True, "add_eos_token": False}
        config["added_tokens_decoder"] = {
            str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries
        }
        pieces = [i for i in used if i < 32000] if name == "phi-3" else used
        (folder / "tokenizer.model").write_bytes(sentencepiece_file(keys, pieces))
    else:
        content = tokenizer_json(keys, name, entries)
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(tokens)


def tokenizer_json(keys: dict[str, Any], name: str, added: list[dict]) -> dict[str, Any]:
    """Return the content of a tokenizer.json.

    keys: the vocabulary. added: its added tokens.
    """
    tokens = keys["tokens"]
    vocab = {
        token: id
        for id, (token, type) in enumerate(zip(tokens, keys["token_type"], strict=True))
        if not re.fullmatch(r"\[PAD\d+\]", token) or type == NORMAL
    }
    model = {"type": "BPE", "vocab": vocab, "unk_token": None, "byte_fallback": False}
    if keys["model"] == "gpt2":
        model["merges"] = [merge.split(" ", 1) for merge in keys["merges"]]
        splits, model["ignore_merges"] = word_rule(keys["pre"])
        parts = {"normalizer": {"type": "NFC"} if name in NORMALIZED else None}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        plain = level | {"use_regex": False}
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, plain]}
        parts["decoder"] = level | {"add_prefix_space": True, "use_regex": True}
        parts["post_processor"] = parts["decoder"]
    else:
        model |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
        pairs = keys.get("merges") or merges_of_scores(keys, vocab)
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs]
        parts = sentencepiece_parts()
    if name in WITH_BOS or keys["model"] == "llama":
        bos = keys["bos_token_id"]
        first = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        special = {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}}
        template = {"type": "TemplateProcessing", "single": [first, text], "pair": [text, second]}
        parts["post_processor"] = template | {"special_tokens": special}
    return {"version": "1.0", "added_tokens": added, **parts, "model": model}


def word_rule(pre: str) -> tuple[list[dict], bool]:
    """Return the Splits of a word rule, and ignore_merges."""
    rule = next(
        (rule for rule, names in PUBLISHED_VOCABULARIES.items() if pre in names.values()), pre
    )
    regexes, ignore_merges = next(key for key, name in PRE_TOKENIZERS.items() if name == rule)
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in regexes
    ]
    return splits, ignore_merges


def sentencepiece_parts() -> dict[str, Any]:
    """Return the parts of a tokenizer.json that make SentencePiece's pieces, as Llama 2's."""
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    unmark = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [unmark, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}, mark]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def merges_of_scores(keys: dict[str, Any], vocab: dict[str, int]) -> list[list[str]]:
    """Return every pair of pieces that SentencePiece may merge, those of the best score first."""
    scores, types = keys["scores"], keys["token_type"]
    found = [
        (-scores[id], [piece[:cut], piece[cut:]])
        for piece, id in vocab.items()
        if types[id] == NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


# ---- SentencePiece's model file, a protobuf message


def sentencepiece_file(keys: dict[str, Any], pieces: list[int]) -> bytes:
    """Return a tokenizer.model of some pieces: BPE with bytes, nothing normalised."""
    message = b"".join(
        field(1, field(1, keys["tokens"][i].encode()) + field(2, float(keys["scores"][i]))
              + field(3, 2 if i == 0 else 3 if i < 3 else keys["token_type"][i]))
        for i in pieces
    )  # fmt: skip
    model_type, byte_fallback, unk_id, bos_id, eos_id, pad_id = 3, 35, 40, 41, 42, 43
    settings = {model_type: 2, byte_fallback: 1, unk_id: 0, bos_id: 1, eos_id: 2, pad_id: -1}
    trainer = b"".join(field(number, value) for number, value in settings.items())
    add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces = 3, 4, 5
    normalizer = field(1, b"identity") + field(add_dummy_prefix, 1)
    normalizer += field(remove_extra_whitespaces, 0) + field(escape_whitespaces, 1)
    return message + field(2, trainer) + field(3, normalizer)


def field(number: int, value: int | float | bytes) -> bytes:
    """Return a field of a protobuf message."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first."""
    value %= 1 << 64
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


# ---- the comparison


def row_of(models: Path, name: str) -> dict[str, str]:
    """Return the row of a vocabulary."""
    path = models / f"ggml-vocab-{name}.gguf.inp"
    texts = path.read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = path.with_suffix(".out").read_text().splitlines()
    expected = [[int(id) for id in line.split()] for line in lines]
    package = read_vocabulary(models, name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_tiny_model(
            Path(temporary) / name, hidden=32, heads=2, kv_heads=1, vocab=len(package["tokens"])
        )
        for file in ("tokenizer.json", "tokenizer.model", "generation_config.json"):
            (folder / file).unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in config.items() if not key.endswith("_token_id")}
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer_files(models, name, folder)
        tokenizer = Tokenizer.from_folder(folder)
        here = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        try:
            exported = convert_folder(folder, Path(temporary) / f"{name}.gguf", "f16")
        except ValueError as error:
            return {"vocabulary": name, "name": f"refused: {str(error).split(': ', 1)[1][:60]}"}
        keys = read_gguf(exported).keys
        pre = keys.get("tokenizer.ggml.pre") or keys["tokenizer.ggml.model"]
        llama_cpp = LlamaCpp(exported)
        there = [llama_cpp.tokenize(text, add_special=False) for text in texts]
    wrong, wrong_here = (
        [text for text, ids, right in zip(texts, found, expected, strict=True) if ids != right]
        for found in (there, here)
    )
    for text in wrong:
        print(f"{name}: {text!r}")
    return {
        "vocabulary": name,
        "name": pre.content,
        "package": package.get("pre", package["model"]),
        "here": f"{len(wrong_here)} of {len(texts)}",
        "from GGUF": f"{len(wrong)} of {len(texts)}",
        "not NFC": str(sum(not unicodedata.is_normalized("NFC", text) for text in wrong_here)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path, help="folder `models` of llama.cpp's sources")
    parser.add_argument("--only", choices=VOCABULARIES)
    options = parser.parse_args()
    names = [options.only] if options.only else VOCABULARIES
    columns = ["vocabulary", "name", "package", "here", "from GGUF", "not NFC"]
    rows = []
    for name in names:
        row = row_of(options.models, name)
        rows.append([row.get(column, "-") for column in columns])
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()

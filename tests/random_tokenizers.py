"""Model folders with random tokenizer files, and random texts, for comparisons with transformers.

random_json_folder(rng, folder)     tokenizer.json and the files beside it
random_model_folder(rng, folder)    tokenizer.model, and the same tokenizer as tokenizer.json
random_text(rng, tokens)            mixed scripts, white space and tokens in every position
"""

import json
from pathlib import Path
from random import Random

import sentencepiece
from tokenizer_files import sentencepiece_bytes, write_json, write_json_tokenizer

WORDS = [
    "the",
    "quick",
    "café",
    "Mölln",
    "đêm",
    "日本語",
    "🦙",
    "12",
    "345",
    "▁",
    "a",
    "_b",
    "ответ",
]
SPACES = [" ", "  ", "\n", "\t", "\n\n ", "", "", ""]
TOKENS = ["<|x|>", "Mölln", "đêm", "naïve", "<tool>", "<tool>!", "topos", " wide ", "the"]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def random_text(rng: Random, tokens: list[str]) -> str:
    """Return a text of words and tokens with white space between some of them."""
    parts = []
    for _ in range(rng.randrange(1, 9)):
        parts += [rng.choice([*WORDS, *tokens, *tokens]), rng.choice(SPACES)]
    return "".join(parts)


def _entry(rng: Random, text: str) -> dict:
    return {"content": text, **{flag: rng.random() < 0.3 for flag in FLAGS}}


def random_json_folder(rng: Random, folder: Path) -> tuple[Path, list[str]]:
    """Write a folder whose tokens stand in random files, and return it with the tokens' texts."""
    write_json_tokenizer(folder, tokenizer_class="PreTrainedTokenizerFast")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    texts = rng.sample(TOKENS, rng.randrange(1, 6))
    in_file = texts[: rng.randrange(len(texts) + 1)]
    beside = texts[len(in_file) :]
    size = len(content["model"]["vocab"])
    for text in in_file:
        index = content["model"]["vocab"].get(text)
        if index is None:
            index, size = size, size + 1
        content["added_tokens"].append({"id": index, **_entry(rng, text)})
    content["added_tokens"].sort(key=lambda entry: entry["id"])
    write_json(folder / "tokenizer.json", content)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["eos_token"] = "<|end|>"
    named_again = [entry for entry in content["added_tokens"][4:] if rng.random() < 0.5]
    ids = {entry["content"]: entry["id"] for entry in named_again}
    for text in beside:
        ids[text] = content["model"]["vocab"].get(text, size)
        size += ids[text] == size
    _write_beside(rng, folder, config, ids)
    return folder, ["<|end|>", "<|start|>", *texts]


def _write_beside(rng: Random, folder: Path, config: dict, ids: dict[str, int]) -> None:
    """Write the tokens into one of the files beside the vocabulary."""
    place = rng.choice(["decoder", "added", "extra", "additional", "map", "named"])
    if place == "decoder":
        entries = {str(index): _entry(rng, text) for text, index in ids.items()}
        config["added_tokens_decoder"] = entries
    elif place == "added":
        write_json(folder / "added_tokens.json", ids)
    elif place in ("extra", "additional"):
        key = {"extra": "extra_special_tokens", "additional": "additional_special_tokens"}[place]
        config[key] = list(ids)
    elif place == "map":
        names = ("unk_token", "sep_token", "cls_token", "mask_token", "user_token")
        write_json(folder / "special_tokens_map.json", dict(zip(names, ids, strict=False)))
    else:
        names = ("unk_token", "sep_token", "cls_token", "image_token", "user_token")
        config |= dict(zip(names, ids, strict=False))
    write_json(folder / "tokenizer_config.json", config)


def random_model_folder(rng: Random, folder: Path) -> tuple[Path, Path, list[str]]:
    """Write tokenizer.model with random added tokens, and the same tokenizer as tokenizer.json.

    Returns both folders and the tokens' texts.
    """
    target, referee = folder / "model", folder / "json"
    target.mkdir(parents=True)
    referee.mkdir()
    (target / "tokenizer.model").write_bytes(sentencepiece_bytes())
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_bytes())
    size = library.get_piece_size()
    texts = rng.sample(TOKENS[:-1], rng.randrange(1, 6))
    entries = {str(size + i): _entry(rng, text) for i, text in enumerate(texts)}
    for entry in entries.values():
        entry["normalized"] = False  # transformers looks for them in the text as it is written
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": entries,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "legacy": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        config["add_prefix_space"] = False
    write_json(target / "tokenizer_config.json", config)
    scheme = "always" if config["legacy"] else "first"
    scheme = "never" if "add_prefix_space" in config else scheme
    write_json(referee / "tokenizer.json", _as_json(library, entries, scheme))
    plain = {key: value for key, value in config.items() if key != "add_prefix_space"}
    write_json(referee / "tokenizer_config.json", plain)
    return target, referee, ["<s>", "</s>", *texts]


def _as_json(library: sentencepiece.SentencePieceProcessor, entries: dict, scheme: str) -> dict:
    """Return a sentencepiece model as a tokenizer.json.

    scheme: the stretches that get a dummy space, "always", "first" or "never".
    """
    vocabulary = {library.id_to_piece(i): i for i in range(library.get_piece_size())}
    special = [0, 1, 2]
    normal = {
        piece: (-library.get_score(i), i)
        for piece, i in vocabulary.items()
        if i not in special and not library.is_byte(i)
    }
    merges = sorted(
        (rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    )
    own = {
        str(i): {"content": library.id_to_piece(i), **dict.fromkeys(FLAGS, False), "special": True}
        for i in special
    }
    double = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    marks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [marks, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": int(i), **entry} for i, entry in {**own, **entries}.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [spaces, double] if scheme == "always" else [spaces],
        },
        "pre_tokenizer": metaspace,
        "decoder": {
            "type": "Sequence",
            "decoders": decoders if scheme == "never" else [*decoders, strip],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [[left, right] for _, left, right in merges],
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }

"""Hostile tokenizer files: each is refused by name, without an abort, a hang or much memory."""

import base64
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from test_template_limits import outcomes_in_fork
from tokenizer_files import sentencepiece_bytes, write_json, write_json_tokenizer

from minitune.data.tokenization.json_limits import check_regex
from minitune.data.tokenization.library_errors import library_errors, no_panic_trace
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.tokenizer.pre_tokenizers import LLAMA_CPP_REGEXES, PRE_TOKENIZERS

TEXT = "Hello, world! 12 aaaa\n naïve 🦙"
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
PIECE, TWICE = {"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
LONG_MAP = base64.b64encode(bytes(4) + b"x" * 9999 + b"\0").decode()


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(key: str, part: dict, count: int) -> dict[str, Any]:
    return {"type": "Sequence", key: [part] * count}


def nested(key: str, part: dict, depth: int) -> dict[str, Any]:
    for _ in range(depth):
        part = {"type": "Sequence", key: [part, part]}
    return part


HOSTILE: dict[str, tuple[str, Any]] = {
    "multiplied text": ("normalizer", sequence("normalizers", REPLACE, 4)),
    "one replacement": ("normalizer", REPLACE),
    "nothing replaced": ("normalizer", REPLACE | {"pattern": {"String": ""}}),
    "any letter replaced": ("normalizer", REPLACE | {"pattern": {"Regex": "."}}),
    "long prefix": ("normalizer", {"type": "Prepend", "prepend": "x" * 10_000_000}),
    "long map": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": LONG_MAP}),
    "damaged map": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
    "no map": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "?"}),
    "many normalizers": ("normalizer", sequence("normalizers", {"type": "NFC"}, 100)),
    "nested normalizers": ("normalizer", nested("normalizers", {"type": "NFKD"}, 8)),
    "unknown normalizer": ("normalizer", {"type": "Other"}),
    "backtracking": ("pre_tokenizer", split("(a+)+b")),
    "alternatives": ("pre_tokenizer", split("(?:a|a)*b")),
    "reference": ("pre_tokenizer", split(r"(a*)\1*b")),
    "open repetitions": ("pre_tokenizer", split("a*" * 9 + "b")),
    "counts": ("pre_tokenizer", split("((a{1000}){1000}){1000}")),
    "no regex": ("pre_tokenizer", split("(")),
    "byte levels": (
        "pre_tokenizer",
        sequence("pretokenizers", {"type": "ByteLevel", "add_prefix_space": False}, 40),
    ),
    "empty text": ("normalizer", {"type": "Prepend", "prepend": ""}),
    "no length": ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "many pieces": ("post_processor", TEMPLATE | {"single": [TWICE, *[PIECE] * 999]}),
    "doubled text": ("post_processor", TEMPLATE | {"single": [TWICE, TWICE]}),
    "multiplied answer": ("decoder", sequence("decoders", REPLACE, 4)),
    "cut letters": ("decoder", {"type": "Strip", "content": "a", "start": 0, "stop": 2**63}),
    "a list": ("decoder", []),
    "a text": ("model", "x"),
    "long token": ("added_tokens", [{"id": 0, "content": "x" * 20_000, "special": True}]),
    "half a token": ("added_tokens", [{"id": 0}]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_json_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(path: Path) -> str:
    tokenizer = Tokenizer.from_folder(path)
    return tokenizer.decode(tokenizer.encode(TEXT))


def copy_with(folder: Path, target: Path, **parts: Any) -> Path:
    """Write a copy of a folder's tokenizer with other parts, and return its folder."""
    target.mkdir()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(target / "tokenizer.json", content | parts)
    return target


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hostile_tokenizer_is_refused_by_name(folder, tmp_path):
    paths = {
        name: copy_with(folder, tmp_path / name, **{key: part})
        for name, (key, part) in HOSTILE.items()
    }
    outcomes = outcomes_in_fork({name: lambda p=p: run(p) for name, p in paths.items()})
    for name, path in paths.items():
        outcome = outcomes.get(name, "hang")
        assert outcome.startswith(f"ValueError {path / 'tokenizer.json'}: "), (name, outcome)
        assert len(outcome) < 800


def test_a_suffix_that_is_written_for_each_word_is_refused(folder, tmp_path):
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    target = copy_with(folder, tmp_path / "a", model=model | {"end_of_word_suffix": "x" * 9999})
    with pytest.raises(ValueError, match="end_of_word_suffix of 9,999 characters"):
        Tokenizer.from_folder(target)


def test_usual_parts_are_read(folder, tmp_path):
    parts = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFKC"},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
                {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"),
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
    }
    assert "Hello" in run(copy_with(folder, tmp_path / "a", **parts))


def test_the_word_rules_of_published_tokenizers_pass():
    rules = [rule for regexes, _ in PRE_TOKENIZERS for rule in regexes]
    rules += [rule for regexes in LLAMA_CPP_REGEXES.values() for rule in regexes]
    for rule in [*rules, r"[\p{Han}]+", r"(?<=a)b", r"[^(\s|[.,!?…。，、।۔،])]+"]:
        check_regex(rule)


class PanicException(BaseException):
    """A panic as `tokenizers` raises it."""


def test_panics_become_value_errors_and_interrupts_pass(tmp_path):
    message = "file: tokenizers cannot read it: broken"
    with pytest.raises(ValueError, match=message), library_errors(Path("file"), "read it"):
        raise PanicException("broken")
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), library_errors(Path("file"), "read it"):
            raise error


def test_the_trace_of_a_panic_is_not_shown(capfd):
    with no_panic_trace():
        os.write(2, b"thread panicked")
    os.write(2, b"behind")
    assert capfd.readouterr().err == "behind"


def mutated(proto: bytes, rng: Random) -> bytes:
    """Return a tokenizer.model with some changed, removed or doubled bytes."""
    data = bytearray(proto)
    for _ in range(rng.choice((1, 3, 20))):
        place = (
            rng.randrange(len(data)) if rng.random() < 0.5 else len(data) - rng.randrange(1, 400)
        )
        kind = rng.randrange(3)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 9)]
        else:
            data[place:place] = data[place : place + rng.randrange(1, 99)]
    return bytes(data)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_damaged_sentencepiece_model_is_read_or_refused(tmp_path):
    rng = Random(0)
    paths = {}
    for i in range(150):
        path = tmp_path / str(i)
        path.mkdir()
        (path / "tokenizer.model").write_bytes(mutated(sentencepiece_bytes(), rng))
        paths[str(i)] = path
    outcomes = outcomes_in_fork({name: lambda p=p: run(p) for name, p in paths.items()}, 20)
    for name, path in paths.items():
        outcome = outcomes.get(name, "hang")
        named = outcome.startswith("ValueError ") and str(path) in outcome
        assert named or outcome.startswith("value "), (name, outcome)

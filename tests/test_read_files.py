"""Files of strangers are read, or refused by name: JSON, TOML and the bounds of both."""

import json
import random
import re
import tomllib
from pathlib import Path

import pytest

from minitune import read_files
from minitune.read_files import (
    IncompleteJson,
    parse_json,
    parse_json_at,
    parse_toml,
    read_json,
    read_text,
    read_toml,
)

PACKAGE = Path(read_files.__file__).parent
PARSERS = re.compile(r"json\.loads?\((?!json\.dumps)|JSONDecoder|raw_decode|tomllib\.")
# It runs beside llama.cpp as a program of its own, and reads the question that minitune wrote.
OWN_PARSERS = {"read_files.py", "json_decoders.py", "llama_cpp_probe.py"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"[" * 100_000, "JSON that is nested too deeply to be read; expected at most 100 levels"),
        (b'{"name": "\xff"}', "not UTF-8: invalid start byte at byte 10; save it in UTF-8"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
    ids=["truncated", "nested", "not UTF-8", "list", "null"],
)
def test_a_json_file_that_holds_no_object_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: {message}"):
        read_json(tmp_path / "a.json")


def test_a_missing_json_file_is_an_error_with_a_hint_or_the_default(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: not found; copy it here$"):
        read_json(tmp_path / "a.json", hint="copy it here")
    assert read_json(tmp_path / "a.json", default={}) == {}


def test_json_and_toml_are_parsed_in_one_place():
    found = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if PARSERS.search(path.read_text(encoding="utf-8"))
    }
    assert found <= OWN_PARSERS


REFUSED = {  # name -> text of a file, beginning of the error behind the file's name
    "nested over 100 deep": ('{"a":' * 101 + "1" + "}" * 101, "JSON that is nested too deeply"),
    "nested and not closed": ('{"weight_map":' + "[" * 100_000, "JSON that is nested too deeply"),
    "NaN": ('{"a": {"b": [1, NaN]}}', "a.b[1] is NaN, expected a number that is finite"),
    "Infinity": ('{"a": -Infinity}', "a is -Infinity, expected a number that is finite"),
    "1e400": ('{"a": {"b": 1e400}}', "a.b is 1e400, expected a number that fits a float"),
    "101 digits": (f'{{"a": {"7" * 101}}}', "a is 77777777777777777777..., an integer of 101"),
    "5000 digits": (f'{{"a": {"7" * 5000}}}', "a is 77777777777777777777..., an integer of 5000"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', 'the key "b" stands twice in an object (in a)'),
    "half a surrogate pair": ('{"a": "\\ud83e"}', "holds '\\ud83e', half a surrogate pair"),
    "a second object": ('{"a": 1}\n{"b": 2}', "not JSON: Extra data at line 2, column 1"),
    "single quotes": ("{'a': 1}", "not JSON: Expecting property name enclosed in double quotes"),
    "a comment": ('{\n  "a": 1 // one\n}', "not JSON: Expecting ',' delimiter at line 2, column"),
    "empty": ("", "not JSON: Expecting value at column 1: the text ends inside a value"),
    "null bytes": ("\0" * 8, "not JSON: Expecting value at column 1"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_later_code_may_not_survive_is_refused_by_file_and_field(
    tmp_path, text, message
):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        read_json(path)


def test_the_last_values_within_the_bounds_are_read(tmp_path):
    text = '{"a":' * 100 + "7" * 100 + "}" * 100
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == json.loads(text)
    (tmp_path / "b.json").write_text(
        '{"a": NaN, "b": [Infinity], "c": "\\ud83e\\udd99", "d": 1e308}'
    )
    values = read_json(tmp_path / "b.json", finite=False)
    assert values["a"] != values["a"] and values["c"] == "🦙"
    with pytest.raises(ValueError, match=r"b\.json: is larger than 9 bytes"):
        read_json(tmp_path / "b.json", max_bytes=9)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_utf_8_is_read_with_a_byte_order_mark_and_other_encodings_are_refused(tmp_path, encoding):
    for name, text, read in (("a.json", '{"a": "é"}', read_json), ("a.toml", 'a = "é"', read_toml)):
        (tmp_path / name).write_bytes(text.encode(encoding))
        if encoding == "utf-8-sig":
            assert read(tmp_path / name) == {"a": "é"}
        else:
            with pytest.raises(ValueError, match=f"{name}: (UTF-16, )?not (UTF-8|JSON|TOML)"):
                read(tmp_path / name)


def test_line_ends_of_windows_are_read_as_open_reads_them(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt") == (tmp_path / "a.txt").read_text() == "a\nb\nc\n"


def outcome(read, *arguments):
    try:
        return read(*arguments)
    except ValueError as error:
        return error


def mutants(text: str, alphabet: str, count: int):
    """Yield texts with a few characters replaced, removed, repeated or multiplied."""
    drawn = random.Random(0)
    for _ in range(count):
        characters = list(text)
        for _ in range(drawn.randint(1, 4)):
            at = drawn.randrange(len(characters))
            piece = drawn.choice(alphabet) * drawn.choice((0, 1, 1, 2, 200))
            characters[at : at + drawn.randint(0, 3)] = piece
            characters = characters or [" "]
        yield "".join(characters)


def test_mutants_of_json_are_read_as_python_reads_them_or_refused():
    text = '{"a": [1, -2.5e3, true, null, {"b": "c\\u00e9"}], "d": {"e": [[[]]]}, "f": 1e10}\n'
    read = 0
    for mutant in mutants(text, '[]{},:"e0-.\\1N \n', 3000):
        found = outcome(parse_json, mutant)
        expected = outcome(json.loads, mutant)
        if isinstance(found, ValueError):
            own = re.search("nested too deeply|stands twice|fits a float", str(found))
            assert own or isinstance(expected, ValueError), mutant
        else:
            read += 1
            assert repr(found) == repr(expected), mutant
            assert outcome(parse_json_at, mutant.strip(), 0)[0] == found
    assert read > 100


def test_mutants_of_toml_are_read_as_python_reads_them_or_refused():
    text = 'model = "org/name"\n[a.b]\nc = [1, 2.5, true]\nd = {e = 1, "f" = inf}\n'
    for mutant in mutants(text, "[]{}=,.\"'e0-1_#\n a", 2000):
        found, expected = outcome(parse_toml, mutant, "x"), outcome(tomllib.loads, mutant)
        if isinstance(found, ValueError):
            assert str(found).startswith("x: ")
        else:
            assert repr(found) == repr(expected), mutant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 20_000 + "]" * 20_000, "TOML that is nested too deeply"),
        ("a." * 60_000 + "a = 1", "TOML with a key of over 100 parts"),
        ("[" + '"a" . ' * 20_000 + "a]\n" + "a = 1\n" * 9_000, "TOML with a key of over 100 parts"),
        ("x = 1e400", "not TOML: a number is 1e400, expected a number that fits a float"),
        ("x = " + "9" * 5000, "not TOML: Exceeds the limit"),
        ("x = 1\nx = 2", "not TOML: Cannot overwrite a value"),
        ("x = '" + "y" * (1 << 20) + "'", "is larger than 1,048,576 bytes"),
    ],
    ids=["arrays", "key", "header", "1e400", "digits", "twice", "size"],
)
def test_toml_that_would_take_long_or_lose_a_value_is_refused(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.toml: {re.escape(message)}"):
        read_toml(tmp_path / "a.toml")
    assert parse_toml("x = [inf, -inf, 1e308]", "")["x"][0] == float("inf")


def test_a_part_of_a_text_is_read_where_it_begins_and_may_be_incomplete():
    assert parse_json_at('x [1, {"a": 2}] y', 2) == ([1, {"a": 2}], 15)
    with pytest.raises(IncompleteJson, match=r"f: not JSON: .* at column 2: the text ends inside"):
        parse_json_at('x ["a', 2, "f")
    with pytest.raises(ValueError, match="nested too deeply") as refused:
        parse_json_at("[" * 100_000, 0)
    assert not isinstance(refused.value, IncompleteJson)


def test_many_keys_with_one_that_stands_twice_are_refused_at_once():
    keys = [*(f'"{key}": 0' for key in range(50_000)), '"49999": 1']
    with pytest.raises(ValueError, match='the key "49999" stands twice'):
        parse_json(f"{{{', '.join(keys)}}}")
    assert parse_json('{"a": [1], "b": 2, "a": [1]}') == {"a": [1], "b": 2}  # no value is lost

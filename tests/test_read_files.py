"""Files of strangers are read, or refused by name: JSON, TOML and special files."""

import os
import subprocess
import sys

import pytest

from minitune import read_files
from minitune.read_files import (
    read_json,
)


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


def test_a_json_file_is_read_as_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "a.json").write_bytes('{"name": "Köln"}'.encode())
    code = f"""import runpy
read_json = runpy.run_path({read_files.__file__!r})["read_json"]
print(ascii(read_json("a.json")))"""
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | ascii_locale,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "{'name': 'K\\xf6ln'}\n"


def test_a_missing_json_file_is_an_error_with_a_hint_or_the_default(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: not found; copy it here$"):
        read_json(tmp_path / "a.json", hint="copy it here")
    assert read_json(tmp_path / "a.json", default={}) == {}

"""The package speaks Python; flags are named by the commands alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?!\w|: *[#\w])")
COMMAND = re.compile("minitune |llama-[a-z-]+ ")  # a command that is given in full
STYLES = (  # their texts hold names of CSS, which begin as flags do
    "minitune/data/inspector/html_page.py",
    "minitune/data/inspector/page_parts.py",
    "minitune/report/page_style.py",
)
OF_COMMANDS = ("minitune/commands", "minitune/config/cli", *STYLES)
FILES = [
    path
    for folder in ("minitune", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.relative_to(ROOT).as_posix().startswith(OF_COMMANDS)
]


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each string except docstrings; {} stands for a value in an f-string."""
    docstrings, parts = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings.add(node.body[0].value)
        if isinstance(node, ast.JoinedStr):
            parts |= set(node.values)
            pieces = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            yield node.lineno, "".join(pieces)
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and node not in docstrings | parts:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_of_the_package_names_a_flag_except_in_a_whole_command(path):
    found = [
        (line, FLAG.findall(text))
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if FLAG.search(text) and not COMMAND.search(text)
    ]
    assert not found


def test_the_search_finds_flags_in_texts_and_none_in_docstrings():
    source = (
        '"""Read --x."""\nraise ValueError(f"pass --resume to {name}" "or another --output-dir")'
    )
    assert [FLAG.findall(text) for _, text in texts(ast.parse(source))] == [
        ["--resume", "--output-dir"]
    ]

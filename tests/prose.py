"""Measure the project's English in docstrings, comments and the two READMEs.

    python tests/prose.py [PATH ...]      files or folders; default: the whole project

Prints two figures and exits with code 1 if one is above its limit:

- the count of `where` plus `what` per 1,000 words of docstrings and comments (limit 5);
- the mean number of words in a README sentence (limit 22). Code blocks, tables and headings are
  no sentences.

With paths, the occurrences are listed too.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("minitune", "kernels", "scripts", "tests")
READMES = ("README.md", "minitune/README.md")
MAX_RELATIVES = 5.0  # `where` and `what` per 1,000 words
MAX_SENTENCE = 22.0  # words
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
RELATIVE = re.compile(r"\b(?:where|what)\b", re.IGNORECASE)


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of each docstring and comment of a Python source."""
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and (text := ast.get_docstring(node, clean=False)):
            yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def python_files(paths: list[Path]) -> list[Path]:
    """Return the Python files among `paths` and in the folders among them, sorted."""
    found = (path.rglob("*.py") if path.is_dir() else [path] for path in paths)
    return sorted(path for group in found for path in group)


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a Markdown text, without code blocks, tables and headings."""
    text = re.sub(r"^```.*?^```", "\n\n", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?:\||#|!\[).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "Code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    parts = (re.split(r"(?<=[.!?])\s+(?=[A-Z`\[(])", part) for part in paragraphs if part)
    return [sentence for group in parts for sentence in group if len(WORD.findall(sentence)) > 1]


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments]
    words = relatives = 0
    for path in python_files(paths or [ROOT / folder for folder in FOLDERS]):
        for line, text in prose(path.read_text(encoding="utf-8")):
            words += len(WORD.findall(text))
            found = RELATIVE.findall(text)
            relatives += len(found)
            if paths and found:
                print(f"{path}:{line}: {' '.join(found)}")
    rate = 1000 * relatives / max(1, words)
    texts = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    counts = [len(WORD.findall(s)) for text in texts for s in sentences(text)]
    mean = sum(counts) / max(1, len(counts))
    print(f"where + what per 1,000 words: {rate:.1f} (limit {MAX_RELATIVES:g}; {words:,} words)")
    print(f"words a README sentence: {mean:.1f} (limit {MAX_SENTENCE:g}; {len(counts)} sentences)")
    return int(rate > MAX_RELATIVES or mean > MAX_SENTENCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

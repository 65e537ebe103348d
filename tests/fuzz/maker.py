"""The means to make a mutant: copies of originals, and changes that are written to disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fuzz import byte_mutants
from fuzz.json_mutants import JsonMutator, values_in
from minitune.training.own_files import FACTS

LARGE = 1 << 16  # bytes; larger files of an original are linked, not copied


class Mutant(NamedTuple):
    """A mutant on disk.

    path: the changed file, which the error should name; None if no file was changed.
    use: the door.
    prints: True if the door writes to stdout.
    """

    path: Path | None
    use: Callable[[], None]
    prints: bool = False


class Maker:
    """The means to make a mutant.

    root: folder of the originals. folder: an empty folder for the mutant.
    """

    def __init__(self, root: Path, folder: Path, rng: Random, pool: list):
        self.root, self.folder, self.rng = root, folder, rng
        self.json = JsonMutator(rng, pool)

    def copy(self, original: str, name: str = "m") -> Path:
        """Copy an original into the folder of the mutant; large files are linked."""
        return shutil.copytree(self.root / original, self.folder / name, copy_function=_copy)

    def one_of(self, parent: str) -> str:
        """Return one of the originals in a folder."""
        names = sorted(path.name for path in (self.root / parent).iterdir())
        return f"{parent}/{self.rng.choice(names)}"

    def rewrite(self, path: Path, content: bytes) -> Path:
        """Write the changed content; one in ten is damaged, or is no regular file at all."""
        path.unlink(missing_ok=True)  # it may be a link to the original
        kind = self.rng.randrange(100)
        if kind < 3:
            content = byte_mutants.cut(content, self.rng)
        elif kind < 6:
            content = byte_mutants.damaged(content, self.rng)
        path.write_bytes(content)
        if kind in (6, 7):
            byte_mutants.special_file(path, self.rng)
        return path

    def change_json(self, path: Path, most: int = 3) -> Path:
        """Change a JSON file by its structure, or its encoding."""
        text = self.json.text(json.loads(path.read_bytes()), most)
        content = text.encode("utf-8", "surrogatepass")
        if self.rng.random() < 0.04:
            content = byte_mutants.reencoded(content, self.rng)
        return self.rewrite(path, content)

    def change_bytes(self, path: Path, change: Callable[[bytes, Random], bytes]) -> Path:
        """Change a binary file by its structure."""
        return self.rewrite(path, change(path.read_bytes(), self.rng))


def _copy(source: str, target: str) -> None:
    path = Path(source)
    if path.stat().st_size < LARGE:
        Path(target).write_bytes(path.read_bytes())
    else:
        Path(target).hardlink_to(source)


def foreign_values(root: Path) -> list[tuple[str, Any]]:
    """Return (key, value) pairs of the JSON files among the originals.

    The facts of a run are left out: the seeds of found faults are older than this file.
    """
    found: list[tuple[str, Any]] = []
    for path in sorted(root.rglob("*.json")):
        if path.name == FACTS:
            continue
        values_in(json.loads(path.read_bytes()), found)
    unique = {f"{key}={value}": (key, value) for key, value in found if isinstance(key, str)}
    return list(unique.values())

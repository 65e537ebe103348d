"""One deliberate bug."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """A bug, and the tests that must catch it.

    name: the bug in a few words.
    file: path of the changed file, from the root of the checkout.
    original: text of the file, which occurs once.
    changed: the text in its place.
    tests: tests that must fail, as FILE::TEST below tests/, perhaps with [PARAMETERS].
    gpu: True if the tests need a GPU.
    """

    name: str
    file: str
    original: str
    changed: str
    tests: tuple[str, ...]
    gpu: bool = False

    def changed_source(self, source: str) -> str:
        """Return the source of the file with the bug.

        Raises: ValueError if the original text does not occur once.
        """
        if (count := source.count(self.original)) != 1:
            raise ValueError(
                f"{self.name}: the original text occurs {count} times in {self.file}, expected "
                f"once; correct it in tests/mutations: {self.original!r}"
            )
        return source.replace(self.original, self.changed)

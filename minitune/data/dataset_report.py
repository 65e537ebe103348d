"""The report of a dataset: counts of everything that happened to its records, with their places.

Each count keeps the places of its first 20 records, such as "data.jsonl:12" or "dataset[3]". The
report is plain JSON in a cache file (token_cache.py).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from minitune.config.fields import ListedErrors
from minitune.data.samples import EMPTY_ANSWER

MAX_ORIGINS = 20


@dataclass
class Occurrences:
    """The number of times that something happened, and the places of the first 20 times."""

    count: int = 0
    origins: list[str] = field(default_factory=list)

    def add(self, origin: str) -> None:
        """Count the record at `origin`."""
        self.count += 1
        if len(self.origins) < MAX_ORIGINS:
            self.origins.append(origin)


@dataclass
class DatasetReport:
    """Counts of the records of a dataset.

    records: number of records that were read, with bad ones.
    shapes: number of records of each shape, such as "messages".
    skipped: samples that have no token to train on.
    truncated: samples that were cut to length.
    bad: records that cannot be used. Each origin is followed by the reason: "a.jsonl:3: not JSON".
    notes: records about which the reader or the template has something to say, by that text.
    """

    records: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    skipped: Occurrences = field(default_factory=Occurrences)
    truncated: Occurrences = field(default_factory=Occurrences)
    bad: Occurrences = field(default_factory=Occurrences)
    notes: dict[str, Occurrences] = field(default_factory=dict)

    @property
    def empty_answers(self) -> Occurrences:
        """Return the records with an empty answer."""
        return self.notes.get(EMPTY_ANSWER, Occurrences())

    def add_notes(self, notes: Iterable[str], origin: str) -> None:
        """Count each of the notes on the record at `origin`."""
        for note in notes:
            self.notes.setdefault(note, Occurrences()).add(origin)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        counts = {name: asdict(getattr(self, name)) for name in ("skipped", "truncated", "bad")}
        notes = {note: asdict(found) for note, found in self.notes.items()}
        return {"records": self.records, "shapes": dict(self.shapes), **counts, "notes": notes}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DatasetReport":
        """Return the report that `to_json` wrote.

        Raises: KeyError or TypeError if the values are no report.
        """
        return cls(
            records=values["records"],
            shapes=Counter(values["shapes"]),
            **{name: Occurrences(**values[name]) for name in ("skipped", "truncated", "bad")},
            notes={note: Occurrences(**found) for note, found in values["notes"].items()},
        )

    def bad_records_error(self, name: str) -> ValueError:
        """Return the error for the bad records of dataset `name`.

        The text for a single bad record is one line that begins with its place.
        """
        if self.bad.count == 1:
            return ValueError(self.bad.origins[0])
        lines = [
            f"{name}: {self.bad.count:,} of {self.records:,} records cannot be used "
            "(skip_bad=True leaves them out):",
            *_remedies_once(self.bad.origins),
        ]
        if self.bad.count > len(self.bad.origins):
            lines.append(f"... and {self.bad.count - len(self.bad.origins):,} more")
        return ListedErrors("\n".join(lines))


def _remedies_once(lines: Iterable[str]) -> list[str]:
    """Return lines "place: fault; remedy" without a remedy that stands in the line above."""
    shortened, above = [], ""
    for line in lines:
        fault, _, remedy = line.partition("; ")
        shortened.append(fault if remedy and remedy == above else line)
        above = remedy
    return shortened

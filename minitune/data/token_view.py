"""A dataset of samples as rows and columns, as in `datasets`: view[3]["labels"]."""

from collections.abc import Iterator, Sequence
from typing import Any

from minitune.data.flat_samples import FlatSamples
from minitune.data.samples import Sample

COLUMNS = ("input_ids", "attention_mask", "labels")


class TokenView(Sequence):
    """The samples of a run, read-only; each row is made when it is asked for."""

    column_names = COLUMNS

    def __init__(self, samples: FlatSamples):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return map(_row, self._samples)

    def __getitem__(self, key: int | slice | str) -> Any:
        """Return a row, the rows of a slice as columns, or a whole column.

        Raises: KeyError if there is no such column.
        """
        if isinstance(key, str):
            if key not in COLUMNS:
                raise KeyError(f"no column {key!r}; choose from {', '.join(COLUMNS)}")
            return [row[key] for row in self]
        if isinstance(key, slice):
            rows = list(TokenView(self._samples[key]))
            return {name: [row[name] for row in rows] for name in COLUMNS}
        return _row(self._samples[key])

    def __repr__(self) -> str:
        return f"TokenView({len(self)} samples, columns {', '.join(COLUMNS)})"


def _row(sample: Sample) -> dict[str, list[int]]:
    """Return a sample as a row of plain lists."""
    ids, labels = (list(map(int, values)) for values in (sample.input_ids, sample.labels))
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

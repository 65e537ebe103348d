"""The result of the merge audit: a table of the ways to ship a model, and a recommendation."""

from collections.abc import Sequence
from dataclasses import dataclass

from minitune.progress import wrapped

# Rounding a merge to bfloat16 alone gives a KL of about this, in nats a token.
MEASURABLE_DIVERGENCE = 1e-4
GOOD_SURVIVAL = 0.95
COLUMNS = ("size", "KL, nats", "top-1", "perplexity", "survives")
WIDTHS = (9, 9, 7, 11, 9)
LABEL_WIDTH = 32


@dataclass(frozen=True)
class AuditRow:
    """One way to ship a trained model, against the model as trained.

    way: its name.
    nbytes: bytes of its files.
    divergence: KL(as trained || way), nats a token.
    agreement: share of the tokens with the same likeliest token.
    perplexity: of the trained-on tokens.
    survival: share of the fine-tune that survives, 1 - KL(trained || way) / KL(trained || base);
        negative if the way is further from the trained model than the base is. None if the
        fine-tune changed nothing measurable.
    method: type of its GGUF file, or None.
    merge_base: base of the merge, as in checkpoints/merge.py, or None if nothing is merged.
    """

    way: str
    nbytes: int
    divergence: float
    agreement: float
    perplexity: float
    survival: float | None
    method: str | None = None
    merge_base: str | None = None

    def __str__(self) -> str:
        survival = "-" if self.survival is None else f"{100 * self.survival:z.1f}%"
        cells = (
            _size(self.nbytes),
            f"{self.divergence:.4f}",
            f"{100 * self.agreement:.1f}%",
            f"{self.perplexity:.3f}" if self.perplexity < 1e4 else f"{self.perplexity:.2e}",
            survival,
        )
        return _line(self.way, cells)


@dataclass(frozen=True)
class MergeAudit:
    """The share of a fine-tune that each way to ship it keeps.

    trained: the model as trained. base: the base without the adapter.
    rows: the ways, in the order of the table.
    samples, tokens, context: the samples, their trained-on tokens and all of their tokens.
    trained_ships: True if the files of the model as trained can be served: a GGUF base and the
        adapter.
    left_out: samples of the data that were not used.
    cut: samples of the data that were cut to length.
    untrained: samples of the data without a trained-on token, which are left out.
    """

    trained: AuditRow
    base: AuditRow
    rows: tuple[AuditRow, ...]
    samples: int
    tokens: int
    context: int
    trained_ships: bool = False
    left_out: int = 0
    cut: int = 0
    untrained: int = 0

    @property
    def recommended(self) -> AuditRow | None:
        """Return the smallest way that keeps at least 95%, otherwise the one that keeps most.

        None if the fine-tune changed nothing measurable.
        """
        if self.base.survival is None:
            return None
        rows = [*([self.trained] if self.trained_ships else []), *self.rows]
        good = [row for row in rows if row.survival >= GOOD_SURVIVAL]
        if good:
            return min(good, key=lambda row: (row.nbytes, row.divergence))
        return max(rows, key=lambda row: row.survival)

    @property
    def recommendation(self) -> str:
        """Return one sentence: the way to choose, and the share that it keeps."""
        row = self.recommended
        if row is None:
            return (
                f"The adapter changes nothing measurable on this text: the base without it has "
                f"a KL of {self.base.divergence:.6f} nats a token to the trained model."
            )
        facts = (
            f"{100 * row.survival:.1f}% of the fine-tune in {_size(row.nbytes)}, perplexity "
            f"{row.perplexity:.3f} against {self.trained.perplexity:.3f} as trained"
        )
        if row.survival >= GOOD_SURVIVAL:
            return (
                f"Choose {row.way}, the smallest way that keeps at least {GOOD_SURVIVAL:.0%}: it "
                f"keeps {facts}."
            )
        return (
            f"No way keeps {GOOD_SURVIVAL:.0%} of the fine-tune; choose {row.way}, which keeps "
            f"most: {facts}."
        )

    def __str__(self) -> str:
        lines = [wrapped(self._data()), "", _line("", COLUMNS)]
        lines += map(str, (self.trained, self.base, *self.rows))
        return "\n".join([*lines, "", wrapped(self.recommendation)])

    def _data(self) -> str:
        """Return a line about the text."""
        line = f"{self.samples:,} samples, {self.tokens:,} trained-on of {self.context:,} tokens"
        if self.left_out:
            line += f"; {self.left_out:,} samples left out (token limit)"
        if self.cut:
            line += f"; {self.cut:,} cut to length"
        if self.untrained:
            line += f"; {self.untrained:,} without a trained-on token"
        return line


def _line(label: str, cells: Sequence[str]) -> str:
    columns = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    return f"{label:<{LABEL_WIDTH}}{columns}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"

"""Tables of the report: (label, text) rows of one run, or of two runs side by side."""

from collections.abc import Iterator, Sequence

from minitune.data.inspector.page_parts import escape, histogram_table
from minitune.data.inspector.summary_text import HISTOGRAM_TITLE, bar_label
from minitune.report.charts import swatch
from minitune.report.run_record import RunRecord
from minitune.report.texts import PairedRow, cut, paired, run_style, short_names
from minitune.training.run_facts import DataRecord

MAX_ROWS = 200  # of a table
MAX_DATA_ROWS = 20  # of the table of a dataset
MAX_BARS = 60  # of a histogram
MAX_NOTES = 20
MAX_DATASETS = 8


def rows_table(rows: Sequence[PairedRow], runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield a card with a table. Of two runs, rows that differ come first.

    limit: characters of a text.
    """
    yield '<div class="card"><table class="facts">'
    if len(runs) > 1 and any(row.differs for row in rows):
        names = (f"<th>{run_name(runs, i)}</th>" for i in range(len(runs)))
        yield f'<tr class="names"><th></th>{"".join(names)}</tr>'
    ordered = sorted(rows, key=lambda row: not row.differs)
    for row in ordered[:MAX_ROWS]:
        yield f"<tr><th>{_label(row.label, limit)}</th>{_cells(row, len(runs), limit)}</tr>"
    yield "</table>"
    yield from _hidden(len(ordered) - MAX_ROWS, "row")
    yield "</div>"


def _label(label: str, limit: int) -> str:
    """Return a label that may break after an underscore, as names of settings are long."""
    return escape(cut(label, limit)).replace("_", "_<wbr>")


def _cells(row: PairedRow, runs: int, limit: int) -> str:
    """Return the cells of a row: one that spans all columns if the runs agree."""
    if not row.differs:
        span = f' colspan="{runs}"' if runs > 1 else ""
        return f"<td{span}>{escape(cut(row.texts[0], limit))}</td>"
    cells = []
    for i, text in enumerate(row.texts):
        shown = '<span class="quiet">–</span>' if text is None else escape(cut(text, limit))
        cells.append(f'<td class="{run_style(i)}">{shown}</td>')
    return "".join(cells)


def _hidden(count: int, noun: str) -> Iterator[str]:
    if count > 0:
        yield f'<p class="remark quiet">Left out: {count:,} more {noun}{"s" * (count > 1)}</p>'


def halves(rows: Sequence[PairedRow], runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield rows that do not differ as two tables side by side, on a wide screen."""
    middle = -(-len(rows) // 2)
    yield '<div class="pair">'
    for part in (rows[:middle], rows[middle:]):
        if part:
            yield from rows_table(part, runs, limit)
    yield "</div>"


def run_name(runs: Sequence[RunRecord], i: int) -> str:
    """Return the colour and short name of a run as markup."""
    return swatch(run_style(i)) + escape(short_names(runs)[i])


def notes(runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield a card with the notes of all runs, if there are any."""
    lines = []
    for i, run in enumerate(runs):
        mark = swatch(run_style(i)) if len(runs) > 1 else ""
        lines += [f"<p>{mark}{escape(cut(note, limit))}</p>" for note in run.notes[:MAX_NOTES]]
        lines += _hidden(len(run.notes) - MAX_NOTES, "note")
    if lines:
        yield from ('<div class="card notes">', *lines, "</div>")


# ---- data


def data_section(runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield the datasets of all runs: two side by side, on a wide screen.

    A dataset that both runs have is shown once. Two of the same label stand side by side.
    """
    kept = [(i, data) for i, run in enumerate(runs) for data in run.data[:MAX_DATASETS]]
    groups = []
    for label in dict.fromkeys(data.label for _, data in kept):
        found = [(i, data) for i, data in kept if data.label == label]
        is_shared = [i for i, _ in found] == [0, 1] and found[0][1] == found[1][1]
        cards = []
        for i, data in found[:1] if is_shared else found:
            name = "both runs" if is_shared else run_name(runs, i) if len(runs) > 1 else ""
            cards.append("\n".join(_dataset(data, name, limit)))
        groups.append(cards)
    if all(len(cards) == 1 for cards in groups):
        groups = [[card for cards in groups for card in cards]]
    for cards in filter(None, groups):
        yield from ('<div class="pair">', *cards, "</div>")
    yield from _hidden(sum(len(run.data) for run in runs) - len(kept), "dataset")


def _dataset(data: DataRecord, name: str, limit: int) -> Iterator[str]:
    """Yield a dataset as a card.

    name: of the runs that have it, as markup.
    """
    title = data.label[:1].upper() + data.label[1:]
    yield f'<section class="card dataset"><h3>{escape(cut(title, limit))}'
    yield f'<span class="quiet">{name}</span></h3><table class="facts">'
    for row in paired([data.rows[:MAX_DATA_ROWS]]):
        yield f"<tr><th>{_label(row.label, limit)}</th>{_cells(row, 1, limit)}</tr>"
    yield "</table>"
    yield from _hidden(len(data.rows) - MAX_DATA_ROWS, "row")
    if data.bars:
        yield f'<p class="quiet caption">{HISTOGRAM_TITLE.capitalize()}</p>'
        bars = data.bars[:MAX_BARS]
        yield from histogram_table([(bar_label(first, last), count) for first, last, count in bars])
    for note in data.notes[:MAX_NOTES]:
        yield f'<p class="remark note">{escape(cut(note, limit))}</p>'
    yield from _hidden(len(data.notes) - MAX_NOTES, "note")
    yield "</section>"

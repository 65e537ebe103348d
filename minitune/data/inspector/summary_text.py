"""The summary of a dataset in words: the same rows for the terminal and for the HTML page."""

import textwrap
from dataclasses import dataclass

from minitune.config.visible_text import on_one_line
from minitune.data.dataset_report import Occurrences
from minitune.data.inspector.dataset_summary import DatasetSummary
from minitune.data.inspector.token_display import styled
from minitune.data.samples import EMPTY_ANSWER

LABEL_WIDTH = 14
NUMBER_WIDTH = 11
LINE_WIDTH = 100
BAR_WIDTH = 40
FAULT_STYLE = "33"  # yellow
EQUALS = "\u00a0=\u00a0"  # no line is broken at these spaces
HISTOGRAM_TITLE = "samples by length in tokens"
BAD_TITLE = "bad records, left out"


@dataclass(frozen=True)
class Row:
    """A line of the summary.

    is_fault: True if a person should look at the records that the row names.
    """

    label: str
    number: int
    detail: str = ""
    is_fault: bool = False


def total_rows(summary: DatasetSummary) -> list[Row]:
    """Return the sizes of a dataset."""
    report, limit = summary.report, summary.max_length
    shapes = ", ".join(f"{shape} {count:,}" for shape, count in report.shapes.most_common())
    lengths = f"median {summary.median:,g}, shortest {summary.shortest:,}, limit {limit:,}"
    rows = [
        Row("records", report.records, on_one_line(shapes)),
        Row("samples", summary.samples),
        Row("tokens", summary.tokens),
        Row("trained on", summary.trained, f"{summary.trained / summary.tokens:.1%} of the tokens"),
        Row("longest sample", summary.longest, f"tokens; {lengths}"),
    ]
    if summary.rows:
        full = f"of {limit:,} tokens, {summary.row_share:.1%} full"
        rows.append(Row("packed rows", summary.rows, full))
    return rows


def fault_rows(summary: DatasetSummary) -> list[Row]:
    """Return the possible faults of a dataset with their counts and places, then the notes."""
    report = summary.report
    ends = ", ".join(f"{count:,} end in {stop}" for stop, count in summary.stops.items())
    stops = f"of {summary.stretches:,} trained-on stretches" + (f" ({ends})" if ends else "")
    notes = {note: found for note, found in report.notes.items() if note != EMPTY_ANSWER}
    return [
        _fault("truncated", f"cut to {summary.max_length:,} tokens", report.truncated),
        _fault("skipped", "no token to train on", report.skipped),
        _fault("empty answers", "", report.empty_answers),
        Row("bad records", report.bad.count, "left out, listed below", True)
        if report.bad.count
        else Row("bad records", 0),
        _fault("duplicates", "the same tokens as an earlier sample", summary.duplicates),
        _fault("no stop token", on_one_line(stops), summary.endless, always=True),
        _fault("doubled BOS", "", summary.doubled_bos),
        _fault(
            "other labels",
            "labels differ from the tokens at their places; they must not be shifted",
            summary.other_labels,
        ),
        *(_fault("note", on_one_line(note), found) for note, found in notes.items()),
    ]


def _fault(label: str, meaning: str, found: Occurrences, always: bool = False) -> Row:
    """Return the row of a fault.

    always: give the meaning also if the fault does not occur.
    """
    parts = [meaning, places(found)] if found.count else [meaning * always]
    return Row(label, found.count, ": ".join(part for part in parts if part), bool(found.count))


def places(found: Occurrences) -> str:
    """Return the places of records as one line. Places in one file share its name.

    Such as "a.jsonl:3, 9, 12 and 4 more", or "a.jsonl:9 = 3" for a record that equals another one.
    """
    texts, file = [], None
    for origin in found.origins:
        sides = []
        for side in origin.split(" = "):
            name, _, line = side.rpartition(":")
            sides.append(line if name and name == file else side)
            file = name
        texts.append(EQUALS.join(sides))
    more = found.count - len(texts)
    return on_one_line(", ".join(texts) + (f" and {more:,} more" if more else ""))


# ---- terminal


def summary_text(summary: DatasetSummary, colour: bool = False) -> str:
    """Return the summary as lines: totals, histogram, faults, bad records."""
    parts = [
        "\n".join(_line(row, colour) for row in total_rows(summary)),
        _histogram(summary),
        "\n".join(_line(row, colour) for row in fault_rows(summary)),
    ]
    if summary.report.bad.count:
        listed = (_wrapped(line, "  ", "    ") for line in bad_records(summary.report.bad))
        parts.append("\n".join([BAD_TITLE, *listed]))
    return "\n\n".join(parts)


def bad_records(bad: Occurrences) -> list[str]:
    """Return the first bad records with their reasons, and the number of the others."""
    lines = [on_one_line(line) for line in bad.origins]
    more = bad.count - len(lines)
    return [*lines, f"and {more:,} more"] if more else lines


def _line(row: Row, colour: bool) -> str:
    head = f"{row.label:<{LABEL_WIDTH}}{row.number:>{NUMBER_WIDTH},}"
    detail = _wrapped(row.detail, "", " " * (len(head) + 2), first_column=len(head) + 2)
    if row.is_fault and colour:
        head = styled(head, FAULT_STYLE)
    return f"{head}  {detail}" if detail else head


def _wrapped(text: str, first_indent: str, indent: str, first_column: int = 0) -> str:
    """Return a text in lines of LINE_WIDTH columns. Long words stay whole.

    first_indent, indent: the beginnings of the first line and of the others.
    first_column: columns in front of the first line.
    """
    lines = textwrap.wrap(
        " " * first_column + first_indent + text,
        LINE_WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(EQUALS, " = ").removeprefix(" " * first_column)


def _histogram(summary: DatasetSummary) -> str:
    most = max(bar.count for bar in summary.bars)
    lines = [HISTOGRAM_TITLE]
    for bar in summary.bars:
        size = -(-bar.count * BAR_WIDTH // most)  # at least one block if there is a sample
        label = f"{bar_label(bar.first, bar.last):>{LABEL_WIDTH + NUMBER_WIDTH}}"
        lines.append(f"{label}  {'█' * size + ' ' * (size > 0)}{bar.count:,}")
    return "\n".join(lines)


def bar_label(first: int, last: int) -> str:
    """Return a range of lengths, such as "12 - 15", or "1" if it holds one length."""
    return f"{first:,}" if first == last else f"{first:,} - {last:,}"

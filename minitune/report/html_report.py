"""The report of a run, or of two runs side by side, as one HTML page.

From top to bottom: the state and main numbers, the settings that differ (two runs), curves, sample
answers, data, plan, facts and settings. The page needs no network: its policy refuses every
request, and allows no script except its own. Every text of the runs is escaped.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from minitune.data.inspector.page_parts import page
from minitune.report.axes import (
    count_text,
    gib_number,
    loss_text,
    norm_text,
    rate_text,
    step_axis,
)
from minitune.report.charts import Chart, Line, chart_markup
from minitune.report.curves import curve
from minitune.report.overview import (
    MAX_NAME,
    MAX_SCORES,
    best_evaluation,
    cards,
    heading,
    score_curve,
    score_names,
)
from minitune.report.page_script import SCRIPT
from minitune.report.page_style import STYLE
from minitune.report.run_record import RunRecord
from minitune.report.samples import samples_section
from minitune.report.tables import data_section, halves, notes, rows_table
from minitune.report.texts import PairedRow, cut, paired, run_style, short_names
from minitune.training.own_files import REPORT_MARK

MAX_BYTES = 1_900_000  # of a page
TEXT_LIMITS = (10_000, 2_000, 400, 80, 20)  # characters of a text; the first that fits
OF_FILES = {
    "disable_tqdm",
    "gguf",
    "merge",
    "merge_base",
    "output_dir",
    "overwrite",
    "report",
    "report_to",
    "resume",
    "run_name",
    "sample_prompts",
    "score_answer",
    "show",
}
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'sha256-{SCRIPT_HASH}'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{REPORT_MARK}'


def html_report(runs: Sequence[RunRecord], written: str = "") -> str:
    """Return the page as a text in UTF-8 of less than 2 MB. Long texts are cut, with a word.

    runs: one run, or two to compare.
    written: the time of the page as a text, which stands at its end.

    Raises: ValueError if there are none or more than two.
    """
    if not 1 <= len(runs) <= 2:
        raise ValueError(f"a report of {len(runs)} runs; expected one run, or two to compare")
    curves = list(_curves(runs))
    title = " and ".join(short_names(runs))
    for limit in TEXT_LIMITS:
        body = [
            *heading(runs),
            *cards(runs),
            *notes(runs, limit),
            *_differences(runs, limit),
            *_titled("Curves", curves),
            *_titled("Sample answers", samples_section(runs, limit)),
            *_titled("Data", data_section(runs, limit)),
            *_rows("Plan of the largest micro-step", [run.plan for run in runs], runs, limit),
            *_rows("Run", [run.facts for run in runs], runs, limit),
            *_equal_settings(runs, limit),
            f'<p class="written quiet">This page was written {written}.</p>' * bool(written),
            f"<script>{SCRIPT}</script>",
        ]
        text = page(f"{title} – minitune report", STYLE, body, HEAD)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _titled(title: str, parts: Sequence[str] | Iterator[str]) -> Iterator[str]:
    """Yield a section below its title; nothing if it is empty."""
    if parts := list(parts):
        yield from (f"<h2>{title}</h2>", *parts)


def _rows(
    title: str, columns: Sequence[Sequence[tuple[str, str]]], runs: Sequence[RunRecord], limit: int
) -> Iterator[str]:
    rows = paired(columns)
    return _titled(title, rows_table(rows, runs, limit) if rows else [])


# ---- settings


def _setting_rows(runs: Sequence[RunRecord]) -> list[PairedRow]:
    return paired([[(k, _value_text(v)) for k, v in run.settings.items()] for run in runs])


def _value_text(value: Any) -> str:
    """Return the value of a setting as text: texts and lists of words without quotes, else JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_word(item) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not set(value) & {" ", ","}


def _differences(runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield the settings that differ between two runs.

    First come those that change the training, then those of files and logging. output_dir, which
    always differs, is last.
    """
    if len(runs) < 2 or not all(run.settings for run in runs):
        return
    rows = [row for row in _setting_rows(runs) if row.differs]
    rows.sort(key=lambda row: (row.label == "output_dir", _is_of_files(row.label)))
    if all(row.label == "output_dir" for row in rows):
        yield from ("<h2>Different settings</h2>", "<p>None: all settings are equal.</p>")
    else:
        yield from _titled("Different settings", rows_table(rows, runs, limit))


def _is_of_files(setting: str) -> bool:
    """Return True if a setting decides about files and lines, not about the adapter."""
    return setting in OF_FILES or setting.startswith(("logging_", "save_", "eval_"))


def _equal_settings(runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield all settings of a run, or those in which two runs agree."""
    compares = len(runs) > 1 and all(run.settings for run in runs)
    rows = [row for row in _setting_rows(runs) if not (compares and row.differs)]
    title = "Equal settings" if compares else "Settings"
    return _titled(title, halves(rows, runs, limit) if rows else [])


# ---- curves


def _curves(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the charts, which share the axis of steps."""
    charts = [chart for chart in _charts(runs) if not chart.is_empty]
    if not charts:
        return
    ends = [
        line.curve.steps[i]
        for chart in charts
        for line in chart.lines
        if len(line.curve)
        for i in (0, -1)
    ]
    steps = step_axis(float(min(ends)), float(max(ends)))
    yield '<div class="charts">'
    for chart in charts:
        yield from chart_markup(chart, steps)
    yield "</div>"


def _charts(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    yield Chart("Loss", _loss_lines(runs), loss_text, is_smoothed=True, is_wide=True)
    lines = partial(_metric_lines, runs)
    rates = lines("learning_rate")
    yield Chart("Learning rate", rates, rate_text, from_zero=True, has_exponents=True)
    yield Chart("Gradient norm", lines("grad_norm"), norm_text, is_smoothed=True)
    speed = lines("tokens_per_second")
    yield Chart("Speed", speed, count_text, "tokens/s", from_zero=True, is_smoothed=True)
    memory = lines("peak_memory_bytes", 2**30)
    yield Chart("Peak memory", memory, gib_number, "GiB", from_zero=True)
    yield from _score_charts(runs)
    yield Chart("Loss scale", lines("loss_scale"), count_text, from_zero=True)


def _metric_lines(runs: Sequence[RunRecord], name: str, unit: float = 1.0) -> list[Line]:
    """Return the curve of a metric of the training records for each run."""
    labels = short_names(runs) if len(runs) > 1 else [""]
    return [
        Line(label, run_style(i), curve(run.training, name, unit, run.gaps.get(name, ())))
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]


def _score_charts(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """Yield a chart for each score of answers."""
    labels = short_names(runs) if len(runs) > 1 else [""]
    for name in score_names(runs)[:MAX_SCORES]:
        lines = [
            Line(label, f"{run_style(i)} evaluation", score_curve(run, name), True)
            for i, (run, label) in enumerate(zip(runs, labels, strict=True))
        ]
        yield Chart(f"Answers: {cut(name, MAX_NAME)}", lines, norm_text)


def _loss_lines(runs: Sequence[RunRecord]) -> list[Line]:
    """Return the curves of the training loss, then those of the evaluations."""
    if len(runs) == 1:
        names, styles = ["evaluation"], ["run-2 evaluation"]
    else:
        names = [f"{name}, evaluation" for name in short_names(runs)]
        styles = [f"{run_style(i)} evaluation" for i in range(len(runs))]
    lines = _metric_lines(runs, "loss")
    if len(runs) == 1:
        lines = [Line("training", run_style(0), lines[0].curve)]
    for run, name, style in zip(runs, names, styles, strict=True):
        best = int(best_evaluation(run)["step"]) if run.evaluations else None
        losses = curve(run.evaluations, "eval_loss", gaps=run.gaps.get("eval_loss", ()))
        lines.append(Line(name, style, losses, True, best))
    return lines

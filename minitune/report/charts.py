"""Charts as inline SVG that need no script: grid, axes, curves, and a legend with the last values.

Positions are percentages of the plot, so text keeps its size at every width. The curves lie in a
nested SVG of 1000 x 1000 units that is stretched to the plot; their strokes are not stretched.

A curve carries its values as texts, which the script of the page shows in the legend when the
pointer is over a plot (page_script.py). So no number is formatted twice:

    <path d="M0 812.5L2.5 790..." data-steps="1 2 ..." data-values="2.31;2.28;...">
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minitune.data.inspector.page_parts import escape
from minitune.report.axes import Axis, count_text, tick_texts, value_axis
from minitune.report.curves import Curve, moving_mean, smoothing_window, thinned

UNITS = 1000  # of the nested SVG, along both axes
MAX_MARKERS = 60  # of a curve; more of them would touch
MAX_NARROW_TEXTS = 4  # numbers of the axis of steps on a narrow screen


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    label: the legend's text, not markup.
    style: the class of its colour and stroke, such as "run-1".
    has_markers: mark each point, and name the step of each value.
    best: the step whose marker is larger, or None.
    """

    label: str
    style: str
    curve: Curve
    has_markers: bool = False
    best: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart of a metric.

    title, unit: texts, not markup.
    form: makes the text of a value.
    from_zero: the axis of values begins at 0.
    is_smoothed: noisy curves get a moving mean, and become faint themselves.
    is_wide: the chart takes the whole width of the page.
    has_exponents: the axis writes its numbers as "1e-4".
    """

    title: str
    lines: Sequence[Line]
    form: Callable[[float], str]
    unit: str = ""
    from_zero: bool = False
    is_smoothed: bool = False
    is_wide: bool = False
    has_exponents: bool = False

    @property
    def is_empty(self) -> bool:
        """Return True if no curve has a point."""
        return not any(len(line.curve) for line in self.lines)


def chart_markup(chart: Chart, steps: Axis) -> Iterator[str]:
    """Yield a chart as markup, which must not be empty.

    steps: the axis that all charts of the page share.
    """
    lines = [line for line in chart.lines if len(line.curve)]
    windows = [smoothing_window(line.curve) if _can_smooth(chart, line) else 0 for line in lines]
    values = value_axis(np.concatenate([line.curve.values for line in lines]), chart.from_zero)
    plot = _Plot(steps, values, chart.form)
    bold = [_smoothed(line, window) for line, window in zip(lines, windows, strict=True)]
    unit = f' <span class="quiet">{escape(chart.unit)}</span>' if chart.unit else ""
    yield f'<figure class="card chart{" wide" * chart.is_wide}">'
    yield f"<figcaption><b>{escape(chart.title)}</b>{unit}"
    yield '<span class="quiet step"></span></figcaption>'
    yield from _legend(bold, chart.form)
    yield f'<svg class="plot" role="img" aria-label="{escape(_summary(chart, lines))}">'
    yield from plot.grid(chart.has_exponents)
    yield f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" width="100%" '
    yield 'height="100%" class="curves">'
    for line, window in zip(lines, windows, strict=True):
        if window:
            yield f'<path class="faint {line.style}" d="{plot.path(thinned(line.curve))}"/>'
    yield from (plot.curve(line) for line in bold)
    yield "</svg>"
    for line in bold:
        yield from plot.markers(line)
    yield from (plot.end_point(line) for line in bold)
    yield '<line class="cursor" y2="100%"/></svg>'
    yield from _remark(values, windows)
    yield "</figure>"


def _can_smooth(chart: Chart, line: Line) -> bool:
    return chart.is_smoothed and not line.has_markers


def _smoothed(line: Line, window: int) -> Line:
    """Return the bold curve of a line."""
    curve = moving_mean(line.curve, window) if window else line.curve
    return Line(line.label, line.style, thinned(curve), line.has_markers, line.best)


def _legend(lines: Sequence[Line], form: Callable[[float], str]) -> Iterator[str]:
    """Yield the label and the last value of each curve. The script replaces the values."""
    yield '<p class="legend">'
    for line in lines:
        last = _value_text(line, len(line.curve) - 1, form)
        yield f"<span>{swatch(line.style)}<span>{escape(line.label)}</span> <b>{last}</b></span>"
    yield "</p>"


def swatch(style: str) -> str:
    """Return a short piece of a line in a style, as the legend shows it."""
    line = f'<line class="{style}" x2="100%" y1="50%" y2="50%"/>'
    mark = _marker(style, "50%", "50%", 3) if "evaluation" in style else ""
    return f'<svg class="swatch" aria-hidden="true">{line}{mark}</svg>'


def _marker(style: str, x: str, y: str, size: int) -> str:
    """Return the marker of a point: a square in the style of run 2, otherwise a circle."""
    if "run-2" not in style:
        return f'<circle class="marker {style}" cx="{x}" cy="{y}" r="{size}"/>'
    box = f'width="{2 * size}" height="{2 * size}" transform="translate(-{size} -{size})"'
    return f'<rect class="marker {style}" x="{x}" y="{y}" {box}/>'


def _value_text(line: Line, i: int, form: Callable[[float], str]) -> str:
    text = form(line.curve.values[i])
    return f"{text} at step {count_text(line.curve.steps[i])}" if line.has_markers else text


def _summary(chart: Chart, lines: Sequence[Line]) -> str:
    """Return the chart in words, for readers that do not see it."""
    parts = []
    for line in lines:
        first, last = chart.form(line.curve.values[0]), chart.form(line.curve.values[-1])
        low, high = chart.form(line.curve.values.min()), chart.form(line.curve.values.max())
        name = f"{line.label}: " if line.label else ""
        parts.append(f"{name}first {first}, last {last}, from {low} to {high}")
    unit = f", {chart.unit}" if chart.unit else ""
    return f"{chart.title}{unit}. {'; '.join(parts)}"


def _remark(values: Axis, windows: Sequence[int]) -> Iterator[str]:
    """Yield how the chart is to be read, if that is not plain."""
    found = sorted({window for window in windows if window})
    parts = []
    if found:
        counts = " and ".join(f"{window:,}" for window in found)
        parts.append(f"bold: mean of {counts} records; faint: each record")
    if values.is_logarithmic:
        parts.append("logarithmic axis")
    if parts:
        text = "; ".join(parts)
        yield f'<p class="remark quiet">{text[0].upper()}{text[1:]}</p>'


# ---- positions


@dataclass(frozen=True)
class _Plot:
    """The plot of a chart: it turns steps and values into markup.

    steps, values: the axes.
    form: makes the text of a value.
    """

    steps: Axis
    values: Axis
    form: Callable[[float], str]

    def grid(self, has_exponents: bool) -> Iterator[str]:
        """Yield the lines at the round values, and the numbers of both axes."""
        for place, text in tick_texts(self.values, has_exponents):
            y = f"{100 - 100 * place:.2f}%"
            yield f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/>'
            yield f'<text class="y" x="-8" y="{y}" dy=".33em">{text}</text>'
        texts = tick_texts(self.steps)
        for i, (place, text) in enumerate(texts):
            # every second number vanishes on a narrow screen
            is_minor = len(texts) > MAX_NARROW_TEXTS and (len(texts) - 1 - i) % 2
            kind = "x minor" if is_minor else "x"
            if place > 0.99 and len(text) > 4:  # centred, it would leave the card
                kind += " end"
            yield f'<text class="{kind}" x="{100 * place:.2f}%" y="100%" dy="1.5em">{text}</text>'

    def points(self, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of a curve's points as shares of the plot, y from the top."""
        return self.steps.place(curve.steps), 1 - self.values.place(curve.values)

    def path(self, curve: Curve) -> str:
        """Return the points of a curve as the `d` of a path."""
        x, y = (np.round(UNITS * share, 1) for share in self.points(curve))
        part = np.searchsorted(curve.gaps, curve.steps)
        letters = np.where(np.diff(part, prepend=-1), "M", "L")
        return "".join(f"{c}{a:g} {b:g}" for c, a, b in zip(letters, x, y, strict=True))

    def curve(self, line: Line) -> str:
        """Return the path of a curve, with its steps and values for the script."""
        steps = " ".join(f"{step:.0f}" for step in line.curve.steps)
        texts = (_value_text(line, i, self.form) for i in range(len(line.curve)))
        return (
            f'<path class="{line.style}" d="{self.path(line.curve)}" data-steps="{steps}" '
            f'data-values="{";".join(texts)}"/>'
        )

    def markers(self, line: Line) -> Iterator[str]:
        """Yield a marker for each point, if the line has any and they do not touch."""
        if not line.has_markers or len(line.curve) > MAX_MARKERS:
            return
        for step, x, y in zip(line.curve.steps, *self.points(line.curve), strict=True):
            size = 5 if step == line.best else 3
            yield _marker(line.style, f"{100 * x:.2f}%", f"{100 * y:.2f}%", size)

    def end_point(self, line: Line) -> str:
        """Return the dot at the last point, which the script moves to the pointer."""
        x, y = (share[-1] for share in self.points(line.curve))
        return f'<circle class="dot {line.style}" cx="{100 * x:.2f}%" cy="{100 * y:.2f}%" r="3.5"/>'

"""The top of the report: the name and state of each run, and cards with its main numbers."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minitune.data.inspector.page_parts import escape, number_card
from minitune.device import gib_text
from minitune.memory.plan import PEAK
from minitune.progress import duration
from minitune.report.axes import count_text, loss_text, norm_text
from minitune.report.charts import swatch
from minitune.report.run_record import RunRecord
from minitune.report.texts import cut, run_style

NOTHING = "–"
MAX_TEXT = 500  # characters of a text, such as the model's description


@dataclass(frozen=True)
class Number:
    """A number of a run as its card shows it; all are texts, not markup.

    value: for the difference of two runs, or None if the run has no such number.
    """

    text: str
    detail: str = ""
    value: float | None = None


def heading(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the name, state and model of each run."""
    yield "<h1>"
    for i, run in enumerate(runs):
        mark = swatch(run_style(i)) if len(runs) > 1 else ""
        kind = "badge" if run.is_finished else "badge open"
        state = "finished" if run.is_finished else "not finished"
        badge = f'<span class="{kind}">{state}</span>'
        yield f'<span class="name">{mark}{escape(run.name)} {badge}</span>'
    yield "</h1>"
    models = [dict(run.facts).get("model", "") for run in runs]
    for model in dict.fromkeys(model for model in models if model):
        yield f'<div class="quiet model">{escape(cut(model, MAX_TEXT))}</div>'


def cards(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a card for each main number, with the values of one or two runs."""
    yield '<dl class="totals">'
    for label, number_of in CARDS.items():
        numbers = [number_of(run) for run in runs]
        shown = []
        for i, number in enumerate(numbers):
            mark = swatch(run_style(i)) if len(runs) > 1 else ""
            change = _difference(numbers) if i else ""
            shown.append((mark + escape(number.text) + change, escape(number.detail)))
        yield number_card(label, *shown)
    yield "</dl>"


def _difference(numbers: Sequence[Number]) -> str:
    """Return the change from the first run to the second one as markup, if there are two."""
    values = [number.value for number in numbers]
    if len(values) < 2 or None in values or not values[0]:
        return ""
    change = values[1] / values[0] - 1
    if not math.isfinite(change) or abs(change) > 1e6:
        return ""
    text = f"{change:+.1%}".replace("-", "−")
    return f' <span class="change">{"equal" if abs(change) < 5e-4 else text}</span>'


# ---- the numbers


def _steps(run: RunRecord) -> Number:
    text = f"{run.steps_done:,}"
    epoch = run.training[-1].get("epoch") if run.training else None
    parts = []
    if run.total_steps:
        text += f" of {run.total_steps:,}"
        is_early = run.is_finished and run.steps_done < run.total_steps
        parts.append("ended early" if is_early else f"{run.steps_done / run.total_steps:.0%}")
    if epoch is not None:
        parts.append(f"{epoch:,.4g} epoch{'s' * (epoch != 1)}")
    return Number(text, ", ".join(parts))


def _training_loss(run: RunRecord) -> Number:
    if not run.training:
        return Number(NOTHING, "no record")
    last, lowest = run.training[-1], min(run.training, key=lambda record: record["loss"])
    detail = f"at step {last['step']:,}, the lowest"
    if lowest["loss"] < last["loss"]:
        detail = f"at step {last['step']:,}; lowest {loss_text(lowest['loss'])}"
        detail += f" at step {lowest['step']:,}"
    return Number(loss_text(last["loss"]), detail, last["loss"])


def _evaluation_loss(run: RunRecord) -> Number:
    if not run.evaluations:
        return Number(NOTHING, "no evaluation")
    last = run.evaluations[-1]
    best = best_evaluation(run)
    detail = f"at step {last['step']:,}, the best"
    if best["eval_loss"] < last["eval_loss"]:
        detail = f"at step {last['step']:,}; best {loss_text(best['eval_loss'])}"
        detail += f" at step {best['step']:,}"
    return Number(loss_text(last["eval_loss"]), detail, last["eval_loss"])


def best_evaluation(run: RunRecord) -> dict[str, float]:
    """Return the record of the lowest evaluation loss."""
    return min(run.evaluations, key=lambda record: record["eval_loss"])


def _time(run: RunRecord) -> Number:
    last = run.training[-1] if run.training else {}
    if "seconds" not in last:
        return Number(NOTHING)
    seconds, detail = last["seconds"], ""
    if last["step"]:
        a_step = seconds / last["step"]
        short = a_step < 1
        detail = f"{norm_text(1000 * a_step)} ms a step" if short else f"{a_step:,.3g} s a step"
    text = duration(min(seconds, 1e12)) if seconds >= 10 else f"{seconds:.1f} s"
    return Number(text, detail, seconds)


def _speed(run: RunRecord) -> Number:
    rates = [
        record["tokens_per_second"] for record in run.training if "tokens_per_second" in record
    ]
    if not rates:
        return Number(NOTHING)
    rate = statistics.median(rates)
    detail = "tokens/s, median"
    if "tokens" in run.training[-1]:
        detail += f"; {count_text(run.training[-1]['tokens'])} tokens in all"
    return Number(count_text(rate), detail, rate)


def _memory(run: RunRecord) -> Number:
    peaks = [record.get("peak_memory_bytes", 0) for record in run.training]
    peak = max(peaks, default=0)
    if not peak:
        return Number(NOTHING)
    planned = dict(run.plan).get(PEAK)
    return Number(gib_text(peak), f"planned {cut(planned, MAX_TEXT)}" if planned else "", peak)


CARDS: dict[str, Callable[[RunRecord], Number]] = {
    "Steps": _steps,
    "Training loss": _training_loss,
    "Evaluation loss": _evaluation_loss,
    "Time": _time,
    "Speed": _speed,
    "Peak memory": _memory,
}

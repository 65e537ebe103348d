"""The top of the report: the name and state of each run, and cards with its main numbers."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from minitune.data.inspector.page_parts import escape, number_card
from minitune.device import gib_text
from minitune.memory.plan import PEAK
from minitune.progress import duration
from minitune.report.axes import count_text, loss_text, norm_text
from minitune.report.charts import swatch
from minitune.report.curves import Curve, curve, last_common_step, part_until, smoothed
from minitune.report.run_record import RunRecord
from minitune.report.texts import cut, run_style
from minitune.training.score_functions import scores_in

NOTHING = "–"
MAX_TEXT = 500  # characters of a text, such as the model's description
MAX_SCORES = 8  # charts and cards of scores
MAX_NAME = 40  # characters of a score's name
MIN_REST = 0.02  # of the time; less than this beside the training is not shown


@dataclass(frozen=True)
class Number:
    """A number of a run as its card shows it; all are texts, not markup.

    value: for the difference of two runs, or None if the run has no such number.
    """

    text: str
    detail: str = ""
    value: float | None = None


NumberOf = Callable[[RunRecord], Number]


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
    is_shared = len(set(models)) == 1
    for i, model in enumerate(models[:1] if is_shared else models):
        if model:
            mark = "" if is_shared else swatch(run_style(i))
            yield f'<div class="quiet model">{mark}{escape(cut(model, MAX_TEXT))}</div>'


def cards(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a card for each main number, with the values of one or two runs."""
    yield '<dl class="totals">'
    for label, number_of in _card_numbers(runs):
        numbers = [number_of(run) for run in runs]
        shown = []
        for i, number in enumerate(numbers):
            mark = swatch(run_style(i)) if len(runs) > 1 else ""
            change = _difference(numbers, label in LOSSES) if i else ""
            shown.append((mark + escape(number.text) + change, escape(number.detail)))
        if label in LOSSES and len(runs) > 1:
            text, detail = shown[-1]
            shown[-1] = text, detail + _at_common_step(*map(LOSSES[label], runs))
        yield number_card(label, *shown)
    yield "</dl>"


def _card_numbers(runs: Sequence[RunRecord]) -> Iterator[tuple[str, NumberOf]]:
    """Yield the label and the number of each card; those of scores stand behind the losses."""
    for label, number_of in CARDS.items():
        yield label, number_of
        if label == "Evaluation loss":
            for name in score_names(runs)[:MAX_SCORES]:
                yield f"Answers: {cut(name, MAX_NAME)}", partial(_score, name=name)


def _difference(numbers: Sequence[Number], is_loss: bool) -> str:
    """Return the change from the first run to the second one as markup, if there are two.

    is_loss: the change is a difference in nats, otherwise a ratio.
    """
    values = [number.value for number in numbers]
    if len(values) < 2 or None in values:
        return ""
    if is_loss:
        text = _nats(*values)
    elif values[0]:
        change = values[1] / values[0] - 1
        if not math.isfinite(change) or abs(change) > 1e6:
            return ""
        text = "equal" if abs(change) < 5e-4 else f"{change:+.1%}".replace("-", "−")
    else:
        return ""
    return f' <span class="change">{text}</span>'


def _nats(first: float, second: float) -> str:
    """Return the difference of two losses."""
    change = round(second, 4) - round(first, 4)  # of the shown numbers
    if abs(change) < 5e-5:
        return "equal"
    return f"{'+' if change > 0 else '−'}{loss_text(abs(change))}"


def _at_common_step(first: Curve, second: Curve) -> str:
    """Return the losses of two runs at the last step that both have, if a run has later ones.

    Step 0 has none to compare: nothing is trained there.
    Both curves end there, because a mean at the end of a curve lags behind.
    """
    step = last_common_step(first, second)
    if not step or step == max(first.steps[-1], second.steps[-1]):
        return ""
    values = [smoothed(part_until(part, step)).values[-1] for part in (first, second)]
    texts = " and ".join(map(loss_text, values))
    return f"<br>at step {count_text(step)}, in both: {texts}, {_nats(*values)}"


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


def _training_curve(run: RunRecord) -> Curve:
    return curve(run.training, "loss")


def _evaluation_curve(run: RunRecord) -> Curve:
    return curve(run.evaluations, "eval_loss")


def _training_loss(run: RunRecord) -> Number:
    """Return the last loss, smoothed as in the chart."""
    if not run.training:
        return Number(NOTHING, "no record")
    full = _training_curve(run)
    shown = smoothed(full)
    detail = f"at step {count_text(full.steps[-1])}" + ", smoothed" * (shown is not full)
    return Number(loss_text(shown.values[-1]), detail, shown.values[-1])


def _evaluation_loss(run: RunRecord) -> Number:
    """Return the best loss, and the last one if it is another."""
    if not run.evaluations:
        return Number(NOTHING, "no evaluation")
    last = run.evaluations[-1]
    best = best_evaluation(run)
    detail = f"at step {best['step']:,}, the best"
    if best["eval_loss"] < last["eval_loss"]:
        detail += f"; {loss_text(last['eval_loss'])} at step {last['step']:,}, the last"
    return Number(loss_text(best["eval_loss"]), detail, best["eval_loss"])


def score_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of the scores of answers in all runs, in the order of their records."""
    records = (record for run in runs for record in run.evaluations)
    return list(dict.fromkeys(name for record in records for name in scores_in(record)))


def score_curve(run: RunRecord, name: str) -> Curve:
    """Return the values of a score at the evaluations that have it."""
    metric = name if name.startswith("eval_") else f"eval_{name}"
    return curve(run.evaluations, metric, gaps=run.gaps.get(metric, ()))


def _score(run: RunRecord, name: str) -> Number:
    """Return the last value of a score, and the first one."""
    values = score_curve(run, name)
    if not len(values):
        return Number(NOTHING, "no answers scored")
    detail = f"at step {count_text(values.steps[-1])}, the last"
    if len(values) > 1:
        first = norm_text(values.values[0])
        detail += f"; {first} at step {count_text(values.steps[0])}, the first"
    return Number(norm_text(values.values[-1]), detail, values.values[-1])


def best_evaluation(run: RunRecord) -> dict[str, float]:
    """Return the record of the lowest evaluation loss."""
    return min(run.evaluations, key=lambda record: record["eval_loss"])


def _time(run: RunRecord) -> Number:
    """Return the time of a training step, and that of the whole run."""
    training, steps = training_seconds(run), run.training[-1]["step"] if run.training else 0
    detail = ""
    if run.seconds is not None:
        detail = f"{_time_text(run.seconds)} in all"
        if training is not None and run.seconds - training >= MIN_REST * run.seconds:
            rest = _time_text(run.seconds - training)
            detail += f", of it {rest} evaluations, answers and checkpoints"
    if training is None or not steps:
        return Number(NOTHING, detail)
    a_step = training / steps
    text = f"{norm_text(1000 * a_step)} ms" if a_step < 1 else f"{a_step:,.3g} s"
    return Number(text, detail, a_step)


def training_seconds(run: RunRecord) -> float | None:
    """Return the time of the training steps alone, or None if a record does not tell it.

    The speed of a record is that of the steps since the record before, without evaluations, sample
    answers and checkpoints.
    """
    seconds, before = 0.0, 0.0
    for record in run.training:
        tokens, rate = record.get("tokens", 0), record.get("tokens_per_second", 0)
        if rate <= 0 or tokens < before:
            return None
        seconds, before = seconds + (tokens - before) / rate, tokens
    return seconds if 0 < seconds < math.inf else None


def _time_text(seconds: float) -> str:
    return duration(min(seconds, 1e12)) if seconds >= 10 else f"{seconds:.1f} s"


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


CARDS: dict[str, NumberOf] = {
    "Steps": _steps,
    "Training loss": _training_loss,
    "Evaluation loss": _evaluation_loss,
    "Time of a step": _time,
    "Speed": _speed,
    "Peak memory": _memory,
}
# The cards of losses, and the curve of each one.
LOSSES: dict[str, Callable[[RunRecord], Curve]] = {
    "Training loss": _training_curve,
    "Evaluation loss": _evaluation_curve,
}

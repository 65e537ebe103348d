"""The sample answers of a report: a card for each prompt, its answers before, during and after."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from minitune.config.visible_text import LINE_BREAK, visible
from minitune.report.run_record import RunRecord
from minitune.report.tables import run_name
from minitune.report.texts import cut, run_style

SHOWN_PROMPTS = 5  # the others are folded
MAX_PROMPTS = 100
MAX_ROWS = 6  # answers to a prompt by one run
BEFORE, AFTER = 0.0, float("inf")  # as times; other answers have their step


@dataclass
class Answers:
    """The answers to a prompt.

    by_time: BEFORE, a step or AFTER -> the answer of each run, None if it has none.
    """

    prompt: str
    by_time: dict[float, list[str | None]] = field(default_factory=dict)


def samples_section(runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield the prompts with their answers.

    limit: characters of a text.
    """
    prompts = answers_by_prompt(runs)
    last = [run.samples[-1]["step"] if run.samples else 0 for run in runs]
    for i, answers in enumerate(prompts[:MAX_PROMPTS]):
        if i == SHOWN_PROMPTS:
            yield f"<details><summary>{min(len(prompts), MAX_PROMPTS) - i} more prompts</summary>"
        yield from _prompt_card(answers, runs, last, limit)
    if len(prompts) > SHOWN_PROMPTS:
        yield "</details>"
    if len(prompts) > MAX_PROMPTS:
        yield f'<p class="quiet">{len(prompts) - MAX_PROMPTS:,} more prompts are left out</p>'


def answers_by_prompt(runs: Sequence[RunRecord]) -> list[Answers]:
    """Return the answers of all runs to each prompt; a prompt may occur several times."""
    found: dict[tuple[str, int], Answers] = {}
    for i, run in enumerate(runs):
        for record in run.samples:
            is_last = run.is_finished and record is run.samples[-1]
            is_after = is_last and record["step"] == run.steps_done
            time = AFTER if is_after and record["step"] else record["step"]
            seen: dict[str, int] = {}
            for sample in record["samples"]:
                prompt = sample["prompt"]
                seen[prompt] = seen.get(prompt, 0) + 1
                answers = found.setdefault((prompt, seen[prompt]), Answers(prompt))
                row = answers.by_time.setdefault(time, [None] * len(runs))
                row[i] = sample["answer"]
    return list(found.values())


def _prompt_card(
    answers: Answers, runs: Sequence[RunRecord], last: Sequence[int], limit: int
) -> Iterator[str]:
    """Yield a prompt with a row for each time.

    last: the last step of each run that has answers.
    """
    yield f'<article class="card prompt"><pre class="question">{_text(answers.prompt, limit)}</pre>'
    yield '<table class="answers">'
    if len(runs) > 1:
        names = (f"<th>{run_name(runs, i)}</th>" for i in range(len(runs)))
        yield f'<tr class="names"><th></th>{"".join(names)}</tr>'
    times = sorted(answers.by_time)
    for time in _spread(times, MAX_ROWS):
        cells = "".join(_cells(answers.by_time[time], limit))
        yield f"<tr><th>{_time_label(time, last)}</th>{cells}</tr>"
    yield "</table>"
    if (hidden := len(times) - MAX_ROWS) > 0:
        noun = "step" if hidden == 1 else "steps"
        yield f'<p class="remark quiet">Answers at {hidden:,} more {noun} are left out</p>'
    yield "</article>"


def _spread(times: Sequence[float], count: int) -> list[float]:
    """Return at most `count` times: both ends, and others at even distances."""
    if len(times) <= count:
        return list(times)
    return [times[round(i * (len(times) - 1) / (count - 1))] for i in range(count)]


def _time_label(time: float, last: Sequence[int]) -> str:
    if time == BEFORE:
        return "Before"
    if time != AFTER:
        return f"Step {time:,.0f}"
    steps = " and ".join(f"{step:,}" for step in dict.fromkeys(last))
    return f'After<br><span class="quiet">step {steps}</span>'


def _cells(answers: Sequence[str | None], limit: int) -> Iterator[str]:
    """Yield the answers of a row: one cell if all runs answer alike."""
    if len(answers) > 1 and len(set(answers)) == 1:
        yield f'<td colspan="{len(answers)}"><span class="quiet">both: </span>'
        yield f"{_answer(answers[0], limit)}</td>"
        return
    for i, answer in enumerate(answers):
        kind = f' class="{run_style(i)}"' if len(answers) > 1 else ""
        yield f"<td{kind}>{_answer(answer, limit)}</td>"


def _answer(answer: str | None, limit: int) -> str:
    if answer is None:
        return '<span class="quiet">no answer at this step</span>'
    return _text(answer, limit) if answer else '<span class="quiet">(nothing)</span>'


def _text(text: str, limit: int) -> str:
    """Return a text with its line breaks, and with signs for other hidden characters."""
    return html.escape(visible(cut(text, limit)).replace(LINE_BREAK, "\n"))

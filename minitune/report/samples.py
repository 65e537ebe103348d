"""The sample answers of a report: a card for each prompt, its answers before, during and after.

Two runs stand side by side. Their answers are paired in order, since they may have been made at
other steps: first the answers before the training, then those during the runs, then the last ones.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from minitune.config.visible_text import LINE_BREAK, visible
from minitune.report.run_record import RunRecord
from minitune.report.tables import run_name
from minitune.report.texts import cut, run_style

SHOWN_PROMPTS = 5  # the others are folded
MAX_PROMPTS = 100
PAIRING = "Answers during the training stand side by side at about equal shares of both runs."
MAX_DURING = 4  # answers to a prompt during a run


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, and the step that it was made at."""

    step: int
    text: str


@dataclass(frozen=True)
class AnswerRow:
    """The answers of all runs that stand side by side; None if a run has no answer here.

    label: "Before", "During", "After" or "Last".
    """

    label: str
    answers: Sequence[Answer | None]

    @property
    def steps(self) -> set[int]:
        """Return the steps of the answers."""
        return {answer.step for answer in self.answers if answer}


def samples_section(runs: Sequence[RunRecord], limit: int) -> Iterator[str]:
    """Yield the prompts with their answers.

    limit: characters of a text.
    """
    prompts = answers_by_prompt(runs)
    shown = list(prompts.items())[:MAX_PROMPTS]
    rows = (row for _, answers in shown for row in answer_rows(answers, runs))
    if any(row.label == "During" and len(row.steps) > 1 for row in rows):
        yield f'<p class="quiet">{PAIRING}</p>'
    for i, ((prompt, _), answers) in enumerate(shown):
        if i == SHOWN_PROMPTS:
            yield f"<details><summary>{len(shown) - i} more prompts</summary>"
        yield from _prompt_card(prompt, answers, runs, limit)
    if len(shown) > SHOWN_PROMPTS:
        yield "</details>"
    if len(prompts) > len(shown):
        yield f'<p class="quiet">Left out: {len(prompts) - len(shown):,} more prompts</p>'


def answers_by_prompt(runs: Sequence[RunRecord]) -> dict[tuple[str, int], list[list[Answer]]]:
    """Return (prompt, n) -> the answers of each run; n counts the occurrences of equal prompts."""
    found: dict[tuple[str, int], list[list[Answer]]] = {}
    for i, run in enumerate(runs):
        for record in run.samples:
            seen: dict[str, int] = {}
            for sample in record["samples"]:
                prompt = sample["prompt"]
                seen[prompt] = seen.get(prompt, 0) + 1
                answers = found.setdefault((prompt, seen[prompt]), [[] for _ in runs])
                answers[i].append(Answer(record["step"], sample["answer"]))
    return found


def answer_rows(answers: Sequence[Sequence[Answer]], runs: Sequence[RunRecord]) -> list[AnswerRow]:
    """Return the rows of a prompt.

    answers: of each run, in the order of their steps.
    """
    before = [next((a for a in own if a.step == 0), None) for own in answers]
    trained = [[a for a in own if a.step > 0] for own in answers]
    last = [own[-1] if own else None for own in trained]
    # equal numbers of each run, so that a row is of one share of both runs
    counts = [len(own) - 1 for own in trained if len(own) > 1]
    during = [_spread(own[:-1], min([MAX_DURING, *counts])) for own in trained]
    is_after = all(
        run.is_finished and answer.step == run.steps_done
        for run, answer in zip(runs, last, strict=True)
        if answer
    )
    rows = [
        AnswerRow("Before", before),
        *(AnswerRow("During", row) for row in zip_longest(*during)),
        AnswerRow("After" if is_after else "Last", last),
    ]
    return [row for row in rows if any(row.answers)]


def _spread(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Return at most `count` answers at even distances, as between two others that are shown."""
    if len(answers) <= count:
        return list(answers)
    return [answers[(2 * i + 1) * len(answers) // (2 * count)] for i in range(count)]


# ---- markup


def _prompt_card(
    prompt: str, answers: Sequence[Sequence[Answer]], runs: Sequence[RunRecord], limit: int
) -> Iterator[str]:
    """Yield a prompt with its rows."""
    yield f'<article class="card prompt"><pre class="question">{_text(prompt, limit)}</pre>'
    yield '<table class="answers">'
    if len(runs) > 1:
        names = (f"<th>{run_name(runs, i)}</th>" for i in range(len(runs)))
        yield f'<tr class="names"><th></th>{"".join(names)}</tr>'
    rows = answer_rows(answers, runs)
    for row in rows:
        yield f"<tr><th>{_label(row)}</th>{''.join(_cells(row, limit))}</tr>"
    yield "</table>"
    shown = sum(answer is not None for row in rows for answer in row.answers)
    if (hidden := sum(map(len, answers)) - shown) > 0:
        noun = "answer" if hidden == 1 else "answers"
        yield f'<p class="remark quiet">Left out: {hidden:,} more {noun} during training</p>'
    yield "</article>"


def _label(row: AnswerRow) -> str:
    """Return the label of a row, with the step if all answers are of one."""
    if row.label == "Before" or len(row.steps) > 1:
        return row.label
    step = f"{min(row.steps):,}"
    if row.label == "During":
        return f"Step {step}"
    return f'{row.label}<br><span class="quiet">step {step}</span>'


def _cells(row: AnswerRow, limit: int) -> Iterator[str]:
    """Yield the cells of a row: one that spans all columns if all runs answer alike."""
    count = len(row.answers)
    if count > 1 and None not in row.answers and len({a.text for a in row.answers}) == 1:
        mark = '<span class="quiet">both: </span>'
        yield f'<td colspan="{count}">{mark}{_answer(row.answers[0].text, limit)}</td>'
        return
    for i, answer in enumerate(row.answers):
        kind = f' class="{run_style(i)}"' if count > 1 else ""
        if answer is None:
            text = '<span class="quiet">–</span>'
        else:
            text = _answer(answer.text, limit)
            if len(row.steps) > 1:
                text = f'<span class="quiet at">step {answer.step:,}</span>{text}'
        yield f"<td{kind}>{text}</td>"


def _answer(text: str, limit: int) -> str:
    return _text(text, limit) if text else '<span class="quiet">(nothing)</span>'


def _text(text: str, limit: int) -> str:
    """Return a text with its line breaks, and with signs for other hidden characters."""
    return html.escape(visible(cut(text, limit)).replace(LINE_BREAK, "\n"))

"""The function that scores the answers of a model: a user's own one, or a built-in one.

    def score(answer, reference):            def length_and_match(answer, reference, record):
        return answer == reference               return {"length": len(answer), "match": ...}

The parameters are chosen by their names:

    answer      the text of the model, without special tokens and without spaces around it
    reference   the answer of the record, in the same form
    record      the record itself, as the dataset holds it

A number or a bool is one score with the name of the function, a dict gives several. The mean of
each score over the records becomes the metric `eval_NAME`.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minitune.config.numbers import shown
from minitune.config.training_config import SCORES

LARGEST_SCORE = 1e300
PARAMETERS = ("answer", "reference", "record")
# Metrics of an evaluation that are no scores
LOSS_METRICS = ("eval_loss", "eval_runtime", "eval_samples_per_second")
ANSWER_METRICS = (
    "eval_answers",
    "eval_answers_cut",
    "eval_answer_tokens",
    "eval_answers_runtime",
)
NO_SCORES = (*LOSS_METRICS, *ANSWER_METRICS)


class ScoreError(ValueError):
    """A scoring function that raises, or returns something else than a score."""


def exact_match(answer: str, reference: str) -> bool:
    """Return True if the answer is the reference."""
    return answer == reference


def contains(answer: str, reference: str) -> bool:
    """Return True if the answer contains the reference."""
    return reference in answer


BUILT_IN = dict(zip(SCORES, (exact_match, contains), strict=True))


def scores_in(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of an evaluation's record, by their names without eval_."""
    return {
        name.removeprefix("eval_"): value
        for name, value in record.items()
        if name.startswith("eval_") and name not in NO_SCORES
    }


class ScoredRecord(NamedTuple):
    """A record of the evaluation, and its answer.

    origin: its place, such as "eval.jsonl:12".
    """

    origin: str
    record: Mapping
    reference: str


class ScoreFunction:
    """A function that scores an answer.

    name: the name that errors show.
    """

    def __init__(self, function: Callable[..., Any]):
        """Check the function's parameters.

        Raises: ValueError if it cannot be called with the parameters named above.
        """
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._parameters = _parameters(function, self.name)

    def __call__(self, answer: str, record: ScoredRecord) -> dict[str, float]:
        """Return the scores of an answer, by the names of their metrics, such as eval_score.

        Raises: ScoreError that names the record if the function raises or returns no score.
        """
        values = {"answer": answer, "reference": record.reference, "record": record.record}
        try:
            result = self._function(**{name: values[name] for name in self._parameters})
        except Exception as error:  # a function of the user can raise anything
            reason = f"{type(error).__name__}: {error}".strip(": ")
            raise ScoreError(
                f"{record.origin}: score_answer {self.name} raised {reason}"
            ) from error
        scores = result if isinstance(result, Mapping) else {self._plain_name(): result}
        if not scores:
            raise ScoreError(f"{record.origin}: score_answer {self.name} returned an empty dict")
        return dict(self._score(name, value, record) for name, value in scores.items())

    def _plain_name(self) -> str:
        """Return the name of the only score: that of the function, or score for a lambda."""
        return self.name if self.name.isidentifier() else "score"

    def _score(self, name: Any, value: Any, record: ScoredRecord) -> tuple[str, float]:
        """Return a score with the name of its metric.

        Raises: ScoreError if it is no finite number, or its name is no free text.
        """
        text = f"{record.origin}: score_answer {self.name} returned"
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ScoreError(f"{text} a score named {shown(name)}; expected a name as a string")
        metric = name if name.startswith("eval_") else f"eval_{name}"
        if metric in NO_SCORES:
            raise ScoreError(f"{text} a score named {shown(name)}, which is a metric of its own")
        if getattr(value, "shape", None) == () and hasattr(value, "item"):  # of NumPy or PyTorch
            value = value.item()
        if not isinstance(value, bool | int | float) or not abs(value) <= LARGEST_SCORE:
            raise ScoreError(f"{text} {shown(value)} as {name}; expected a finite number or a bool")
        return metric, float(value)


def _parameters(function: Callable[..., Any], name: str) -> tuple[str, ...]:
    """Return the values that a function takes.

    Raises: ValueError if it has other parameters that need a value, or takes no answer.
    """
    expected = f"expected parameters with the names {', '.join(PARAMETERS)}, or some of them"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(
            f"score_answer {name} has no signature that Python shows; {expected}"
        ) from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return PARAMETERS
    own = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    for p in own:
        is_unknown = p.name not in PARAMETERS or p.kind is p.POSITIONAL_ONLY
        if is_unknown and p.default is p.empty:
            raise ValueError(f"score_answer {name} takes {p.name}; {expected}")
    names = tuple(p.name for p in own if p.name in PARAMETERS and p.kind is not p.POSITIONAL_ONLY)
    if "answer" not in names:
        raise ValueError(f"score_answer {name} does not take answer; {expected}")
    return names


def read_score(score: Any) -> ScoreFunction | None:
    """Return the scoring function of a setting, or None if there is none.

    score: a function, FILE.py:FUNCTION, or the name of a built-in score.

    Raises: ValueError if the file or the function is missing, or it is no scoring function.
    """
    if score is None or isinstance(score, ScoreFunction):
        return score
    if isinstance(score, str):
        score = BUILT_IN.get(score) or _function_in_file(score)
    if not callable(score):
        raise ValueError(
            f"score_answer is {shown(score)}; expected a function of an answer and a reference"
        )
    return ScoreFunction(score)


def _function_in_file(name: str) -> Any:
    """Return a value that a Python file defines.

    name: FILE.py:FUNCTION.

    Raises: ValueError if the file is missing or fails, or has no such value.
    """
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"score_answer {name}: {path} is no file")
    spec = importlib.util.spec_from_file_location(f"minitune_score_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does, for dataclasses
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as `python FILE.py` does, for files beside it
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a file of the user can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"score_answer {name}: {path} fails with {reason}") from error
    if not hasattr(module, function):
        raise ValueError(f"score_answer {name}: {path} has no function {function}")
    found = getattr(module, function)
    if not callable(found):
        raise ValueError(f"score_answer {name}: {function} is {shown(found)}, not a function")
    return found

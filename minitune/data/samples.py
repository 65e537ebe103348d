"""The values that pass between the parts of the data path: conversations, texts, samples, options.

record -> Conversation -> RenderedText -> Sample          records/, templates/
       -> RenderedText -> Sample                          plain text, prompt and completion
       -> Sample                                          tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from minitune.kernels.cross_entropy import IGNORE_INDEX

Span = tuple[int, int]  # characters [begin, end)
EMPTY_ANSWER = "an answer is empty"  # a note of RenderedRecord


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """The token ids of a sample, and the label of each: the id itself, or -100 to ignore it.

    Both are lists, or int32 arrays if the sample comes from a TokenizedDataset.
    """

    input_ids: Sequence[int] | np.ndarray
    labels: Sequence[int] | np.ndarray

    def __eq__(self, other: object) -> bool:
        """Return True if ids and labels are the same numbers, in lists or in arrays."""
        if not isinstance(other, Sample):
            return NotImplemented
        same_ids = np.array_equal(self.input_ids, other.input_ids)
        return same_ids and np.array_equal(self.labels, other.labels)

    __hash__ = None

    @property
    def targets(self) -> int:
        """Return the number of trained-on tokens; nothing predicts the first token."""
        labels = self.labels[1:]
        if isinstance(labels, list):  # faster than numpy for short samples
            return len(labels) - labels.count(IGNORE_INDEX)
        return int(np.count_nonzero(np.asarray(labels) != IGNORE_INDEX))


@dataclass(frozen=True)
class Conversation:
    """The messages of a record, in the form that chat templates read.

    messages: {"role", "content", ...}; no key is null, and call arguments are decoded.
    tools: the tool definitions for the template, or None.
    template_kwargs: further variables for the template, such as enable_thinking.
    trained: for each message, True if the loss counts it.
    """

    messages: list[dict]
    tools: list | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trained: tuple[bool, ...] = ()


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as the chat template writes it.

    spans: the characters that are trained on, in the order of the text.
    dropped: a name for each text that the template leaves out, such as "the system message".
    notes: facts that the user should know, as in RenderedRecord.
    """

    text: str
    spans: list[Span]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A text that is ready to be encoded.

    spans: the characters that are trained on, or None for all of them.
    add_special_tokens: True if the tokenizer adds its special tokens around the text. A rendered
        conversation brings its own.
    """

    text: str
    spans: list[Span] | None
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class RenderedRecord:
    """A record as texts or tokens.

    shape: the name of the record's shape, such as "messages".
    parts: one item for each sample. A conversation that is split by turns gives several.
    notes: facts that the user should know, such as "an answer is empty". The report counts them.
    """

    shape: str
    parts: list[RenderedText | Sample]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelOptions:
    """The reading of records and the choice of labels, under SFTConfig's names.

    assistant_only_loss, completion_only_loss: None is the default of each shape.
    dataset_text_field: key of plain-text records; None is "text". A name that the user gives wins
        over the other shapes in a record.
    split_turns: True makes one sample of each trained turn. None does so if the template leaves
        earlier reasoning out.
    dropped_text: "error" refuses a record if the template leaves a text out, "warn" makes a note.
    template_date: ISO date that the template's strftime_now tells; None is the clock's.
    instruction_part, response_part: marks in plain texts (response_marks.py), or None.
    ignore_fields: keys of records that are left out on purpose, such as "title" or
        "messages.mood".
    """

    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    dataset_text_field: str | None = None
    split_turns: bool | None = None
    dropped_text: str = "error"
    template_date: str | None = None
    instruction_part: str | None = None
    response_part: str | None = None
    ignore_fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Any) -> "LabelOptions":
        """Return the options among the fields of an SFTConfig."""
        return cls(**{item.name: getattr(settings, item.name) for item in fields(cls)})

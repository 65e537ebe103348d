"""The keys of a record: each is read, known to carry nothing to train on, or refused by name.

A reader of a shape takes the keys that it knows from a `Fields` and then calls `done`. A key that
is left over and holds a value is an error, unless it is in HARMLESS or the user ignores it. The
same holds inside messages, turns and tool calls, so no text of a record is lost unseen.
"""

import difflib
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minitune.data.sources.jsonl import kind_of
from minitune.read_files import parse_json

MAX_DEPTH = 100  # of lists and objects inside a record

# Keys that say something about a record or a message, and are no part of its text (HARMLESS).
_ABOUT = """
    id _id ids uid uuid idx index row_id sample_id example_id record_id conversation_id conv_id
    message_id msg_id parent_id message_tree_id prompt_id question_id task_id thread_id session_id
    custom_id user_id hash prompt_hash conversation_hash __index_level_0__
    source sources source_id origin dataset dataset_name dataset_source data_source subset split
    config url urls link license copyright author annotator annotator_id created created_at
    created_date updated_at timestamp date time version model model_name model_id generator
    generation_model metadata meta meta_data
    category categories subcategory topic topics task task_type task_name task_category tag tags
    domain type lang language languages difficulty quality level
    score scores quality_score rating ratings reward rewards rank likes upvotes votes
    similarity_score toxicity toxic redacted moderation openai_moderation detoxify
    num_turns n_turns num_tokens n_tokens token_count length word_count char_count
"""
_PREFERENCE = """
    chosen rejected chosen_response rejected_response chosen_messages rejected_messages kto_tag
"""
_MEDIA = "image images image_url image_path video videos audio audios input_audio pixel_values"
HARMLESS = frozenset(_ABOUT.split())
PREFERENCE = frozenset(_PREFERENCE.split())
MEDIA = frozenset(_MEDIA.split())


def ignored_note(path: str) -> str:
    """Return the note on a key that the user ignores."""
    return f'"{path}" is left out, because ignore_fields names it'


def unused_notes(ignored: Sequence[str], notes: Container[str]) -> list[str]:
    """Return a note for each name of ignore_fields that no record has, by the notes on all."""
    unused = [name for name in ignored if ignored_note(name) not in notes]
    return [f'ignore_fields names "{name}", but no record holds a value there' for name in unused]


def is_missing(value: Any) -> bool:
    """Return True for null, and for the values that tables hold in its place."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def is_empty(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Return True if a value carries nothing: null, "", or a list or object of such values."""
    if isinstance(value, Mapping):
        return depth > 0 and all(is_empty(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(is_empty(item, depth - 1) for item in value)
    if getattr(value, "shape", ()) and len(value) == 0:  # an array or tensor
        return True
    return is_missing(value) or (isinstance(value, str) and not value)


def plain(value: Any, place: str, depth: int = MAX_DEPTH) -> Any:
    """Return a value of a table or an array as a value of JSON.

    place: the name of the value in an error text.

    Raises: ValueError if the value is not one of JSON, or is nested too deeply.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == 0:
        raise ValueError(f"{place} is nested deeper than {MAX_DEPTH} levels")
    if hasattr(value, "tolist"):  # numpy's arrays and numbers, and tensors
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{place} has the key {key!r:.60}; keys are texts")
        return {str(key): plain(item, place, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, place, depth - 1) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if is_missing(value):
        return None
    raise ValueError(f"{place} holds a {type(value).__name__}, expected values of JSON")


def in_order(found: dict, original: Mapping) -> dict:
    """Return `found` with its keys in the order of the record, which a template may show."""
    first = {key: found[key] for key in original if key in found}
    return {**first, **found}


@dataclass(slots=True)
class Reading:
    """The facts that readers share while they read one record.

    ignored: names of LabelOptions.ignore_fields.
    template: the Jinja text of the chat template, "" if there is none.
    notes: facts for the user.
    expected: (name, text) of each further text that the chat template has to write.
    unread: names of values that the chat template does not read.
    """

    ignored: Sequence[str] = ()
    template: str = ""
    notes: list[str] = field(default_factory=list)
    expected: list[tuple[str, str]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep a fact for the user, once for each record."""
        if text not in self.notes:
            self.notes.append(text)


class Fields:
    """The keys of one object of a record, each of which is read once.

    place: the name of the object in error texts, such as '"messages"[0]'; "" is the record.
    path: its name in ignore_fields, such as "messages"; "" is the record.
    """

    __slots__ = ("_known", "_left", "path", "place", "reading")

    def __init__(self, value: Mapping, reading: Reading, place: str = "", path: str = ""):
        self.reading, self.place, self.path = reading, place, path
        self._left: dict[Any, Any] = dict(value)
        self._known: list[str] = []
        if reading.ignored:
            self._ignore()

    def _ignore(self) -> None:
        """Leave out the keys that the user ignores."""
        for key in list(self._left):
            path = self._path_of(key)
            if path in self.reading.ignored and not is_empty(self._left.pop(key)):
                self.reading.note(ignored_note(path))

    def _path_of(self, key: Any) -> str:
        return f"{self.path}.{key}" if self.path else str(key)

    def inside(self, value: Mapping, place: str, key: str) -> "Fields":
        """Return the keys of an object that stands under `key`."""
        return Fields(value, self.reading, place, self._path_of(key))

    def name_of(self, key: str) -> str:
        """Return the name of a key in error texts."""
        return f'"{key}" of {self.place}' if self.place else f'"{key}"'

    def left(self) -> list:
        """Return the keys that are not taken yet."""
        return list(self._left)

    def holds(self, key: str) -> bool:
        """Return True if a key is there with a value that is not empty."""
        return not is_empty(self._left.get(key))

    def take(self, key: str) -> Any:
        """Return the value of a key as it is, or None if the key is missing or null."""
        self._known.append(key)
        value = self._left.pop(key, None)
        if value is None or type(value) is str:  # the usual values, and this is the hot path
            return value
        return None if is_missing(value) else value

    def json(self, key: str) -> Any:
        """Return the value of a key in values of JSON, or None if it is missing or null."""
        value = self.take(key)
        if value is None or type(value) is str:
            return value
        return plain(value, self.name_of(key))

    def decoded(self, key: str) -> Any:
        """Return the value of a key, which may be written as a JSON text; "" is null."""
        value = self.json(key)
        if value is None or not isinstance(value, str):
            return value
        if not value.strip():
            return None
        try:
            return parse_json(value)
        except ValueError as error:
            raise ValueError(f"{self.name_of(key)} is a text that is {error}") from None

    def text(self, key: str) -> str | None:
        """Return the text of a key, or None if it is missing or null.

        Raises: ValueError if the value is not a text.
        """
        value = self.take(key)
        if value is None or type(value) is str:
            return value
        value = plain(value, self.name_of(key))
        if not isinstance(value, str | None):
            raise ValueError(f"{self.name_of(key)} is {kind_of(value)}, expected a text")
        return value

    def required_text(self, key: str) -> str:
        """Return the text of a key.

        Raises: ValueError if it is missing, null or not a text.
        """
        text = self.text(key)
        if text is None:
            raise ValueError(f"{self.name_of(key)} is null, expected a text")
        return text

    def leave_out(self, keys: Sequence[str], reason: str) -> None:
        """Drop some keys if they are there, with a note for each that holds a value."""
        for key in keys:
            if self.holds(key):
                self.reading.note(f'"{key}" is left out, because {reason}')
            self._left.pop(key, None)

    def leave_out_repeats(self, texts: Sequence[Any]) -> None:
        """Drop the keys that hold one of the texts that are rendered anyway, with a note."""
        for key, value in list(self._left.items()):
            if isinstance(value, str) and value.strip() and value in texts:
                self.reading.note(f'"{key}" repeats a message')
                del self._left[key]

    def done(self, elsewhere: Sequence[str] = ()) -> None:
        """Check that every key has been taken, is harmless or is empty.

        elsewhere: keys of other shapes, one of which may be meant by a misspelled key.

        Raises: ValueError that names the keys that nothing reads, and the remedy.
        """
        left = [
            key for key, item in self._left.items() if key not in HARMLESS and not is_empty(item)
        ]
        if left:
            raise ValueError(self._refusal(left, elsewhere))

    def _refusal(self, left: list, elsewhere: Sequence[str]) -> str:
        names = ", ".join(f'"{key}"' for key in left)
        where = f" of {self.place}" if self.place else ""
        ignore = json.dumps([self._path_of(key) for key in left], ensure_ascii=False)
        remedy = f"emove {'it' if len(left) == 1 else 'them'}, or use ignore_fields={ignore}"
        is_wish = "label" in left and isinstance(plain(self._left["label"], "label"), bool)
        if PREFERENCE.intersection(left) or is_wish:
            return (
                f"{names}{where}: this is a preference record, and training takes one answer; "
                f"write the good answer in one of the known shapes, and r{remedy}"
            )
        if MEDIA.intersection(left):
            return f"{names}{where}: only text is trained on; leave the record out, or r{remedy}"
        close = difflib.get_close_matches(str(left[0]), {*self._known, *elsewhere}, 2)
        hint = f"did you mean {' or '.join(close)}? Otherwise r" if close else "r"
        return f"nothing reads {names}{where}; {hint}{remedy}"

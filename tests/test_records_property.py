"""No text of a record is lost unseen: random records of every shape, each text a sentinel."""

import pytest
from random_records import RecordMaker
from record_templates import FORGETS_REASONING, WHOLE
from tokenizer_files import CHATML, TAGGED, write_chat_tokenizer

from minitune.data.records.record_fields import HARMLESS
from minitune.data.records.record_formats import render_record
from minitune.data.samples import LabelOptions, RenderedText
from minitune.data.templates.chat_template import EARLIER_REASONING
from minitune.data.templates.messages import REASONING_KEYS
from minitune.data.tokenization.tokenizer import Tokenizer

TEMPLATES = (WHOLE, WHOLE, FORGETS_REASONING, CHATML, TAGGED, None)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return tokenizers whose templates write everything, some things, or do not exist."""
    folders = [tmp_path_factory.mktemp("template") for _ in TEMPLATES]
    pairs = zip(folders, TEMPLATES, strict=True)
    return [Tokenizer.from_folder(write_chat_tokenizer(*pair)) for pair in pairs]


def keys_of(value):
    """Return every key inside a record."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def trained_text(part):
    """Return the text of a part inside its spans."""
    if part.spans is None:
        return part.text
    return "\0".join(part.text[begin:end] for begin, end in part.spans)


def faults(record, sentinels, tokenizer, ignored=(), dropped_text="error"):
    """Return (accepted, faults): the sentinels that are lost or labelled wrongly."""
    try:
        options = LabelOptions(ignore_fields=ignored, dropped_text=dropped_text)
        rendered = render_record(record, tokenizer, options)
    except ValueError as error:
        named = any(f'"{key}"' in str(error) or f" {key}" in str(error) for key in keys_of(record))
        named = named or "the chat template leaves out" in str(error)
        named = named or "no chat template" in str(error)
        return False, [] if named else [f"the refusal names no field: {error}"]
    notes = " ".join(rendered.notes)
    texts = [part for part in rendered.parts if isinstance(part, RenderedText)]
    text = "\0".join(part.text for part in texts)
    trained = "\0".join(map(trained_text, texts))
    found = []
    for sentinel in sentinels:
        exempt = HARMLESS.intersection(sentinel.path) or sentinel.path[0] in ignored
        if sentinel.path[-1] in REASONING_KEYS:
            exempt = exempt or EARLIER_REASONING in notes
        exempt = exempt or "after the last answer" in notes
        exempt = exempt or (dropped_text == "warn" and "the chat template leaves out" in notes)
        if sentinel.word not in text and not exempt:
            found.append(f"{sentinel} is lost")
        elif sentinel.word in text and sentinel.trained not in (None, sentinel.word in trained):
            found.append(f"{sentinel} is labelled wrongly")
    for name in ignored:
        said = f'"{name}" is left out' in notes
        if any(sentinel.path[0] == name for sentinel in sentinels) and not said:
            found.append(f"{name} is ignored without a note")
    return True, found


def check(count, seed, tokenizers, faulty=True):
    """Check random records; return the share that is accepted."""
    maker = RecordMaker(seed, faulty)
    accepted = 0
    for _ in range(count):
        record, sentinels = maker.record()
        tokenizer = maker.random.choice(tokenizers)
        ignored = (maker.random.choice(list(record)),) if maker.fault(0.05) else ()
        dropped_text = maker.random.choice(("error", "error", "warn"))
        is_accepted, found = faults(record, sentinels, tokenizer, ignored, dropped_text)
        assert not found, (found, record, tokenizer.chat_template, ignored, dropped_text)
        accepted += is_accepted
    return accepted / count


def test_every_text_of_a_random_record_is_rendered_harmless_or_refused_by_name(tokenizers):
    assert 0.4 < check(500, 1, tokenizers) < 0.9


def test_records_without_a_fault_are_accepted_by_a_template_that_writes_everything(tokenizers):
    assert check(200, 2, tokenizers[:1], faulty=False) == 1

"""The prompt of a record is the text before the answer that training sees in the same record."""

from random_records import RecordMaker
from record_templates import WHOLE
from tokenizer_files import write_chat_tokenizer

from minitune.data.records.prompt_records import read_prompt
from minitune.data.records.record_formats import render_record
from minitune.data.samples import LabelOptions
from minitune.data.tokenization.tokenizer import Tokenizer

SHAPES = ("messages", "conversations", "instruction")


def without_last_answer(record, shape):
    """Return a training record that ends in one answer, or None if it ends otherwise."""
    turns = record.get(shape)
    if shape == "instruction":
        return record
    speakers = [turn.get("role") or turn.get("from") for turn in turns[-2:]]
    return record if speakers[-1] in ("assistant", "gpt") and len(set(speakers)) == 2 else None


def test_a_prompt_is_the_trained_text_up_to_the_last_answer(tmp_path):
    tokenizer = Tokenizer.from_folder(write_chat_tokenizer(tmp_path, WHOLE))
    compared = dict.fromkeys(SHAPES, 0)
    for seed in range(250):
        record, _ = RecordMaker(seed, faulty=False).record()
        shape = next((name for name in SHAPES if name in record), None)
        if shape is None or without_last_answer(record, shape) is None:
            continue
        rendered = render_record(record, tokenizer, LabelOptions(split_turns=False))
        (part,) = rendered.parts
        if not part.spans:  # the record leaves its answers out of the loss
            continue
        text = tokenizer.decode(read_prompt(record, tokenizer).ids)
        begin = part.spans[-1][0]
        # the loss may leave out the last answer, so that an earlier one is the last trained
        assert part.text.startswith(text) and len(text) >= begin, record
        compared[shape] += len(text) == begin
    assert all(count > 10 for count in compared.values()), compared

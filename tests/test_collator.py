"""The collator pads samples as transformers' collator, and the trainer does without it."""

import pytest
import torch
from tiny import make_tiny_model
from training_runs import RECORDS

from minitune import DataCollatorForSeq2Seq, SFTConfig, SFTTrainer, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


SAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8], "labels": [8]},
    {"input_ids": [9, 10], "labels": [-100, -100]},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 8}, {"label_pad_token_id": 0}])
@pytest.mark.parametrize("with_labels", [True, False])
def test_batches_equal_those_of_transformers(folder, side, options, with_labels):
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours.padding_side = theirs.padding_side = side
    keys = ("input_ids", "labels") if with_labels else ("input_ids",)
    samples = [{key: sample[key] for key in keys} for sample in SAMPLES]
    found = DataCollatorForSeq2Seq(tokenizer=ours, **options)(samples)
    expected = transformers.DataCollatorForSeq2Seq(tokenizer=theirs, **options)(samples)
    expected = {key: value for key, value in expected.items() if value is not None}
    assert all(torch.equal(found[key], expected[key]) for key in {*expected, *found.data})


def test_samples_of_different_keys_are_refused(folder):
    collator = DataCollatorForSeq2Seq(Tokenizer.from_folder(folder))
    with pytest.raises(ValueError, match="the same in each"):
        collator([SAMPLES[0], {"input_ids": [1]}])
    with pytest.raises(ValueError, match="pixel_values"):
        collator([{"input_ids": [1], "pixel_values": [2]}])


def test_the_trainer_takes_the_collator_and_no_other_one(folder):
    collator = DataCollatorForSeq2Seq(Tokenizer.from_folder(folder))
    trainer = SFTTrainer(str(folder), SFTConfig(), RECORDS[:4], data_collator=collator)
    batch = collator([trainer.train_dataset[i] for i in range(2)])
    assert trainer.model(**batch).loss > 0
    with pytest.raises(ValueError, match=r"data_collator=.*leave it out"):
        SFTTrainer(str(folder), SFTConfig(), RECORDS[:4], data_collator=print)

"""standardize_sharegpt turns from/value into role/content, for every container of records."""

import pandas
import pytest

from minitune import standardize_data_formats, standardize_sharegpt

datasets = pytest.importorskip("datasets")
TOLD = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "How many?"},
    {"from": "gpt", "value": "Four."},
]
WRITTEN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Four."},
]
RECORDS = [{"conversations": TOLD, "id": 1}, {"conversations": TOLD[1:], "id": 2}]
EXPECTED = [{"conversations": WRITTEN, "id": 1}, {"conversations": WRITTEN[1:], "id": 2}]


def test_lists_and_generators_become_lists_and_stay_as_they_are():
    assert standardize_sharegpt(RECORDS) == EXPECTED
    assert standardize_sharegpt(record for record in RECORDS) == EXPECTED
    assert RECORDS[0]["conversations"] is TOLD
    assert TOLD[0] == {"from": "system", "value": "Be brief."}
    assert standardize_data_formats(EXPECTED) == EXPECTED


def test_datasets_keep_their_other_columns():
    dataset = datasets.Dataset.from_list(RECORDS)
    found = standardize_sharegpt(dataset)
    assert found.column_names == dataset.column_names
    assert found.to_list() == EXPECTED
    both = standardize_sharegpt(datasets.DatasetDict(train=dataset, test=dataset))
    assert both["test"].to_list() == EXPECTED
    assert list(standardize_sharegpt(dataset.to_iterable_dataset())) == EXPECTED


def test_a_data_frame_gets_a_new_column():
    frame = pandas.DataFrame(RECORDS)
    assert standardize_sharegpt(frame).to_dict("records") == EXPECTED
    assert frame.to_dict("records") == RECORDS


def test_further_keys_of_a_message_stay():
    told = [{"from": "gpt", "value": "Four.", "weight": 0}]
    (record,) = standardize_sharegpt([{"messages": told}])
    assert record == {"messages": [{"role": "assistant", "content": "Four.", "weight": 0}]}


REFUSED = {
    "a message is from 'narrator'; the known roles are human, gpt": [{"from": "narrator"}],
    "a message from 'gpt' has no value, but from, text": [{"from": "gpt", "text": "Four."}],
    "from 'function_call'; the trainer reads": [{"from": "function_call", "value": "{}"}],
    "has from/value and content; keep one": [{"from": "gpt", "value": "a", "content": "b"}],
    "a conversation is 'Four.', expected a list": "Four.",
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_conversation_that_cannot_be_read_is_refused(message):
    with pytest.raises(ValueError, match=message):
        standardize_sharegpt([{"conversations": REFUSED[message]}])


def test_a_wrong_container_is_refused():
    with pytest.raises(ValueError, match="a record has text, and no conversation under"):
        standardize_sharegpt([{"text": "a"}])
    for wrong in ("train.jsonl", 5, {"conversations": TOLD}):
        with pytest.raises(ValueError, match="takes records, not a"):
            standardize_sharegpt(wrong)
    with pytest.raises(TypeError, match="has no argument 'datasets'; did you mean dataset"):
        standardize_sharegpt(datasets=[])
    assert standardize_sharegpt(RECORDS, num_proc=4, batch_size=10) == EXPECTED

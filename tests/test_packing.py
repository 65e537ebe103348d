"""Packing: every sample once, no row too long, the same rows as TRL's packing=True."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitune.data.batching import collate, micro_steps, pack_rows
from minitune.data.samples import Sample

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def samples_of(sizes):
    """Return samples whose tokens are all different, so that a misplaced sample shows."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ids = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    return [Sample(tokens, [-100 if token % 3 else token for token in tokens]) for tokens in ids]


@given(lengths, st.integers(40, 90))
def test_rows_hold_every_sample_once_within_the_length_and_at_most_one_row_is_half_empty(
    sizes, max_length
):
    rows = pack_rows(sizes, max_length)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in row) for row in rows]
    assert max(filled) <= max_length
    assert sum(2 * tokens <= max_length for tokens in filled) <= 1


@given(lengths, st.integers(10, 90))
def test_micro_steps_hold_every_sample_once_in_order_and_within_the_budget(sizes, max_tokens):
    samples = samples_of(sizes)
    steps = micro_steps(samples, max_tokens)
    firsts = [[sample.input_ids[0] for sample in step] for step in steps]
    assert sorted(token for step in firsts for token in step) == [s.input_ids[0] for s in samples]
    for step, first_tokens in zip(steps, firsts, strict=True):
        assert first_tokens == sorted(first_tokens)
        assert sum(len(sample.input_ids) for sample in step) <= max_tokens or len(step) == 1
    fitting = [size for size in sizes if size <= max_tokens]
    too_long = len(sizes) - len(fitting)
    assert len(steps) - too_long <= max(1, 2 * sum(fitting) / max_tokens)


@given(lengths)
def test_a_batch_is_its_samples_side_by_side_with_positions_that_restart(sizes):
    samples = samples_of(sizes)
    batch = collate(samples)
    assert batch.input_ids.tolist() == list(range(sum(sizes)))
    assert batch.labels.tolist() == [label for sample in samples for label in sample.labels]
    assert batch.position_ids.tolist() == [position for size in sizes for position in range(size)]
    assert batch.targets == sum(label != -100 for sample in samples for label in sample.labels[1:])
    tensors = (batch.input_ids, batch.labels, batch.position_ids)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_samples_that_fill_a_row_exactly_share_it_and_a_longer_one_is_refused():
    assert pack_rows([3, 5, 8], 8) == [[2], [1, 0]]
    with pytest.raises(ValueError, match="sample 1 has 9 tokens and does not fit into a row of 8"):
        pack_rows([3, 9], 8)


def test_rows_equal_trl():
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.data_utils")
    sizes = [1 + (i * i * 7 + 13 * i) % 61 for i in range(300)]
    dataset = datasets.Dataset.from_dict({"input_ids": [[0] * size for size in sizes]})
    packed = trl.pack_dataset(dataset, 64, strategy="bfd", map_kwargs={"batch_size": 1000})
    rows = pack_rows(sizes, 64)
    assert sorted([sizes[i] for i in row] for row in rows) == sorted(packed["seq_lengths"])

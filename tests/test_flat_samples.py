"""Flat samples behave as a list of samples, and their hash is that of earlier versions."""

import array
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitune.data import flat_samples
from minitune.data.flat_samples import OriginFormat, SampleBuilder
from minitune.data.samples import Sample

tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9)
FORMATS = (OriginFormat("a.jsonl", by_line=True), OriginFormat("dataset", by_line=False))


def flat(samples):
    """Return the samples in flat arrays, each with its position as its record's number."""
    builder = SampleBuilder(FORMATS)
    for number, sample in enumerate(samples):
        builder.add(sample, sample.targets, number % 2, number, ("text", "messages")[number % 2])
    return builder.build()


def labelled(pairs):
    """Return a sample of (token, trained) pairs."""
    ids = [token for token, _ in pairs]
    return Sample(ids, [token if trained else -100 for token, trained in pairs])


@given(st.lists(tokens, min_size=1, max_size=9))
def test_flat_samples_equal_the_list_that_they_were_built_from(pairs):
    samples = [labelled(sample) for sample in pairs]
    stored = flat(samples)
    assert list(stored) == samples
    assert stored.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert stored.targets.tolist() == [sample.targets for sample in samples]
    assert list(stored[1:]) == samples[1:]
    assert stored[-1] == samples[-1]


def test_a_sample_may_be_taken_twice_and_keeps_its_place_of_origin():
    stored = flat([Sample([5, 6], [-100, 6]), Sample([7], [7]), Sample([8, 9, 10], [8, 9, 10])])
    taken = stored.take(np.array([2, 0, 2]))
    assert [sample.input_ids.tolist() for sample in taken] == [[8, 9, 10], [5, 6], [8, 9, 10]]
    assert [taken.origin(i) for i in range(3)] == ["a.jsonl:2", "a.jsonl:0", "a.jsonl:2"]
    assert stored.origin(1) == "dataset[1]"
    assert [stored.shape(i) for i in range(3)] == ["text", "messages", "text"]
    assert taken.input_ids is stored.input_ids


@pytest.mark.parametrize("at_once", [1, 3, 1024])
def test_the_fingerprint_hashes_length_ids_and_labels_in_int64(at_once, monkeypatch):
    monkeypatch.setattr(flat_samples, "SAMPLES_PER_HASH", at_once)
    samples = [Sample(list(range(n)), [-100, *range(1, n)][:n]) for n in (4, 1, 7, 2, 300)]
    digest = hashlib.sha256()
    for sample in samples:
        for values in ([len(sample.input_ids)], sample.input_ids, sample.labels):
            digest.update(array.array("q", values).tobytes())
    assert flat(samples).fingerprint() == digest.hexdigest()[:16]

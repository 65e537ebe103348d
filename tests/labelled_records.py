"""Conversations as records, and helpers that show which text of a sample is trained on."""

from minitune.data.samples import Sample
from minitune.data.tokenize_dataset import tokenize_dataset

PAIR = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four é."}]
TURNS = [
    {"role": "system", "content": "Count."},
    *PAIR,
    {"role": "user", "content": "And now?"},
    PAIR[1],
]
ANSWER = "Four é.<|end|>"


def sample_of(record, tokenizer, max_length=500, **options):
    """Return the sample of one record, in lists; every label is -100 or the token itself."""
    dataset = tokenize_dataset([record], tokenizer, max_length, **options)
    for sample in dataset.samples:
        assert len(sample.labels) == len(sample.input_ids)
        pairs = zip(sample.labels, sample.input_ids, strict=True)
        assert all(label in (-100, token) for label, token in pairs)
    sample = dataset.samples[0]
    return Sample(sample.input_ids.tolist(), sample.labels.tolist())


def text_of(sample, tokenizer):
    """Return the whole text of a sample."""
    return tokenizer.decode(sample.input_ids, skip_special_tokens=False)


def trained(sample, tokenizer):
    """Return the stretches of text that are trained on."""
    stretches = []
    previous = -100
    for label in sample.labels:
        if label != -100:
            if previous == -100:
                stretches.append([])
            stretches[-1].append(label)
        previous = label
    return [tokenizer.decode(stretch, skip_special_tokens=False) for stretch in stretches]

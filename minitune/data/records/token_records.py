"""A record that holds tokens becomes a sample.

    {"input_ids", "labels"}              each label is the token itself, or -100
    {"input_ids", "completion_mask"}     without labels, every token is trained on except the zeros
    {"input_ids", "assistant_masks"}     of the masks

The keys that tokenizers write beside input_ids are accepted if they say nothing else:
attention_mask all ones, token_type_ids all zeros, position_ids counting from 0.
"""

from typing import Any

from minitune.data.records.record_fields import Fields
from minitune.data.samples import LabelOptions, Sample
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX


def token_sample(record: Fields, tokenizer: Tokenizer, options: LabelOptions) -> Sample:
    """Return the sample of a record of tokens.

    Raises: ValueError if a value is wrong, or an option needs a key that the record lacks.
    """
    if options.response_part is not None:
        raise ValueError("response_part needs texts, but the record holds tokens; give labels")
    ids = _integers(record.take("input_ids"), "input_ids")
    given = record.take("labels")
    labels = list(ids) if given is None else _integers(given, "labels")
    if len(ids) != len(labels):
        raise ValueError(
            f"{len(ids)} input_ids but {len(labels)} labels; "
            "each token has one label, -100 if it is not trained on"
        )
    _check_ids(ids, "input_ids", tokenizer)
    _check_ids([label for label in labels if label != IGNORE_INDEX], "labels", tokenizer)
    _check_companions(record, len(ids))
    for name, flag, option in (
        ("completion_mask", options.completion_only_loss, "completion_only_loss"),
        ("assistant_masks", options.assistant_only_loss, "assistant_only_loss"),
    ):
        mask = _mask(record, name, len(ids))
        if mask is None:
            if given is None:
                refuse_option(flag, option, f"{name} or labels")
        elif flag is not False:
            pairs = zip(labels, mask, strict=True)
            labels = [label if trained else IGNORE_INDEX for label, trained in pairs]
    return Sample(ids, labels)


def refuse_option(flag: bool | None, name: str, needed: str) -> None:
    """Raise ValueError if an option is set that the record has no data for."""
    if flag:
        raise ValueError(
            f"{name}=True needs records with {needed}; leave it out to use the record's default"
        )


def _check_companions(record: Fields, size: int) -> None:
    """Check the keys of a tokenizer that have one allowed value each."""
    if 0 in (_mask(record, "attention_mask", size) or []):
        raise ValueError(
            '"attention_mask" holds a 0; samples are packed without padding, '
            "so leave padded tokens out"
        )
    for name, allowed, words in (
        ("token_type_ids", [0] * size, "zeros"),
        ("position_ids", list(range(size)), "positions that count from 0"),
        ("seq_lengths", [size], "one sequence a record"),
    ):
        value = record.take(name)
        if value is not None and _integers(value, name) != allowed:
            raise ValueError(f'"{name}" is not {words}; the model computes it, so remove it')
    _mask(record, "special_tokens_mask", size)


def _check_ids(ids: list[int], name: str, tokenizer: Tokenizer) -> None:
    for index in ids:
        if not 0 <= index < tokenizer.id_count:
            raise ValueError(
                f"{name} hold {index}, but the tokenizer's ids are 0 to {tokenizer.id_count - 1}"
            )


def _mask(record: Fields, name: str, size: int) -> list[int] | None:
    """Return a mask of a record of `size` tokens, or None if the record has no such mask."""
    value = record.take(name)
    if value is None:
        return None
    mask = _integers(value, name)
    if len(mask) != size or not set(mask) <= {0, 1}:
        raise ValueError(
            f'"{name}" is not a list of {size} zeros and ones, one for each of the input_ids'
        )
    return mask


def _integers(values: Any, name: str) -> list[int]:
    """Return a list, tuple, array or tensor of whole numbers as a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise ValueError(f'"{name}" is not a list of whole numbers')
    return list(values)

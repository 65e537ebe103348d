"""Texts that a user's function makes of the records of a dataset.

    TRL        formatting_func(record) -> text
    Unsloth    formatting_func(columns) -> list of texts; columns = {"name": [values of the batch]}

The first record decides which form a function has. A function that returns a text for a record has
TRL's form. A function that makes two texts of two records in columns has Unsloth's form.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from minitune.data.sources.jsonl import kind_of
from minitune.data.sources.sources import Dataset, open_sources

BATCH = 1000  # records that become columns together, as in `datasets`
# Errors of a function that is called with columns in place of a record, or the other way round.
WRONG_FORM_ERRORS = (LookupError, TypeError, ValueError, AttributeError)
FORMS = "it takes a record and returns a text, or takes columns and returns a list of texts"


def formatted_records(
    dataset: Dataset | None, function: Callable[[Any], Any], text_field: str
) -> list[dict[str, str]] | None:
    """Return a record {text_field: text} for each record of a dataset, or None if there is none.

    Raises: ValueError that names the record if it cannot be read or does not become a text.
    """
    if dataset is None:
        return None
    records = _records(dataset)
    origin, first = next(records)
    takes_columns = _takes_columns(function, first)
    if isinstance(dataset, Iterator):  # it cannot start again
        records = chain([(origin, first)], records)
    else:
        records = _records(dataset)
    texts: list[dict[str, str]] = []
    while batch := list(islice(records, BATCH if takes_columns else 1)):
        if takes_columns:
            made = function(_columns([record for _, record in batch]))
        else:
            made = _single(function(batch[0][1]))
        if not isinstance(made, list | tuple) or len(made) != len(batch):
            raise ValueError(f"formatting_func made {kind_of(made)} of {batch[0][0]}; {FORMS}")
        for (origin, _), text in zip(batch, made, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"formatting_func made {kind_of(text)} of {origin}; {FORMS}")
            texts.append({text_field: text})
    return texts


def _records(dataset: Dataset) -> Iterator[tuple[str, Mapping]]:
    """Yield (origin, record).

    Raises: ValueError that names the place of a record that cannot be read.
    """
    for source in open_sources(dataset):
        for number, record in source.records():
            origin = source.format.origin(number)
            if isinstance(record, ValueError):
                raise ValueError(f"{origin}: {record}")
            yield origin, record


def _columns(records: list[Mapping]) -> dict[str, list]:
    """Return records as columns; a record without a key has None there."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _single(made: Any) -> list:
    """Return the one text of a record as a list; some functions return such a list themselves."""
    return made if isinstance(made, list) and len(made) == 1 else [made]


def _takes_columns(function: Callable[[Any], Any], record: Mapping) -> bool:
    """Return True if a function has Unsloth's form, False if it has TRL's.

    Raises: ValueError if it has neither.
    """
    results: list[Any] = []
    for argument in (record, _columns([record, record])):
        try:
            results.append(function(argument))
        except WRONG_FORM_ERRORS as error:
            results.append(error)
        if isinstance(results[0], str):
            return False
    of_record, of_columns = results
    if isinstance(of_columns, list | tuple) and len(of_columns) == 2:
        return True
    if _single(of_record) is of_record:
        return False
    if isinstance(of_record, Mapping) or isinstance(of_columns, Mapping):
        raise ValueError(
            "formatting_func returns a dict: it is a function for dataset.map(..., batched=True); "
            "pass the mapped dataset, and SFTConfig(dataset_text_field=...) names its column"
        )
    if isinstance(of_record, Exception):
        raise ValueError(f"formatting_func failed: {of_record!r}; {FORMS}") from of_record
    raise ValueError(f"formatting_func made {kind_of(of_record)} of a record; {FORMS}")

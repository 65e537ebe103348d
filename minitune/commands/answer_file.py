"""A file of prompts becomes a JSONL file: each record with its answer, in the order of the input.

    minitune generate --model DIR --input prompts.jsonl --output answers.jsonl

    {"prompt": "Two words?", "id": 7}  ->  {"prompt": "Two words?", "id": 7, "answer": "Of course."}

All records are read and checked before the model is loaded. The model answers a chunk of prompts in
one call. Each prompt has a seed of its own, so its draws depend neither on the chunks nor on an
interruption. On a CPU the log-probabilities of other chunks may differ by rounding.
answer_output.py writes.
"""

import argparse
import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minitune.checkpoints.adapter_config import WEIGHTS
from minitune.checkpoints.find_model import ModelSource, find_model
from minitune.commands.answer_output import AnswerOutput, check_name, json_line
from minitune.commands.answering import BOTH, WITH_ADAPTER, Answer, Answerer
from minitune.commands.generate_flags import sampling_of
from minitune.config.fields import ListedErrors
from minitune.data.records.prompt_records import Prompt, read_prompt
from minitune.data.records.record_fields import is_missing, plain
from minitune.data.sources.sources import Source, open_sources
from minitune.data.templates.adapter_template import load_template
from minitune.data.templates.template_budget import CostlyTemplateError
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.base.load import open_base
from minitune.gguf.base.model_files import model_files
from minitune.progress import ProgressBar, print_line, print_message

MAX_LISTED = 20  # bad records that an error names


class Item(NamedTuple):
    """A record of the input, in values of JSON, and the token ids of its prompt."""

    record: dict[str, Any]
    prompt: list[int]


class AnswerFile(contextlib.AbstractContextManager):
    """The answers to the records of a file; a context that holds the lock of its output.

    Raises: ValueError if a record is no prompt, or the output exists and is not to be replaced.
    """

    def __init__(self, arguments: argparse.Namespace, program: str):
        self._arguments = arguments
        self._fields = _Fields(arguments)
        check_name(Path(arguments.output), arguments.input)
        source = find_model(arguments.model, arguments.adapter)
        self._items = list(_read_items(arguments, source, self._fields))
        self._output = AnswerOutput(
            Path(arguments.output), self._identity(source), len(self._items), program
        )
        self._output.open(overwrite=arguments.overwrite, resume=arguments.resume)

    def _identity(self, source: ModelSource) -> dict[str, Any]:
        """Return everything that an answer depends on; a run is resumed only if it is the same."""
        digest = hashlib.sha256()
        for item in self._items:
            digest.update(json_line([item.record, item.prompt]))
        adapter = source.adapter and source.adapter / WEIGHTS
        settings = self._arguments
        return {
            "--model": str(source.base),
            "--adapter": adapter and [str(adapter), adapter.stat().st_mtime_ns],
            "--input": digest.hexdigest(),
            **{
                f"--{name.replace('_', '-')}": value
                for name, value in sampling_of(settings).items()
            },
            "--stop-strings": settings.stop_strings,
            "--compare": settings.compare,
            "--logprobs": settings.logprobs,
            "--answer-field": settings.answer_field,
            "--show-special-tokens": settings.show_special_tokens,
            "--max-seq-length": settings.max_seq_length,
            "--no-load-in-4bit": settings.no_load_in_4bit,
            "--dtype": settings.dtype,
        }

    @property
    def is_unfinished(self) -> bool:
        """True if there are prompts to answer."""
        return not self._output.is_finished

    def __exit__(self, *exception: object) -> None:
        self._output.close()

    def answer(self, answerer: Answerer) -> None:
        """Answer the prompts that have no answer yet, and write the file.

        An interruption leaves the answers of whole chunks, and a line says how to go on.
        """
        sides = BOTH if self._arguments.compare else (WITH_ADAPTER,)
        total, cut = len(self._items), 0
        answered = (total - self._output.done) * len(sides) * answerer.count
        try:
            with ProgressBar("answering", total, "prompt", True, self._output.done) as bar:
                while chunk := self._next_chunk():
                    # the seed of a prompt's first answer; those of its other answers follow
                    numbers = range(self._output.done, self._output.done + len(chunk))
                    seeds = [self._arguments.seed + i * answerer.count for i in numbers]
                    prompts = [item.prompt for item in chunk]
                    found = answerer.answers(prompts, sides, seeds, self._arguments.logprobs)
                    self._output.write(
                        self._fields.filled(item.record, answers, answerer)
                        for item, answers in zip(chunk, found, strict=True)
                    )
                    cut += sum(answer.is_cut for row in found for side in row for answer in side)
                    bar.update(len(chunk))
            path = self._output.finish()
        except BaseException as error:
            self._output.explain(error)
            raise
        if cut:
            limit = f"{self._arguments.max_new_tokens:,} tokens of --max-new-tokens"
            counts = f"{cut:,} of {answered:,} answers"
            print_message("note", f"{counts} ended at a limit: the {limit}, or the context")
        each = len(sides) * answerer.count
        print_line(f"{path}: {total:,} records{f', {each} answers each' if each > 1 else ''}")

    def _next_chunk(self) -> list[Item]:
        """Return the next records without an answer, at most as many as a chunk has."""
        first = self._output.done
        return self._items[first : first + self._arguments.chunk_size]


class _Fields:
    """The keys that an answer adds to its record."""

    def __init__(self, arguments: argparse.Namespace):
        self.answer = arguments.answer_field
        self._logprobs, self._compare = arguments.logprobs, arguments.compare
        self._is_list = arguments.num_return_sequences > 1

    def names(self) -> list[str]:
        """Return all keys."""
        sides = [self.answer, f"{self.answer}_base"] if self._compare else [self.answer]
        ends = ("", "_token_ids", "_logprobs") if self._logprobs else ("",)
        return [f"{side}{end}" for side in sides for end in ends]

    def filled(self, record: dict, answers: list[list[Answer]], answerer: Answerer) -> dict:
        """Return a record with its answers: of each side one, or a list of several."""
        columns = []
        for side in answers:
            columns.append([answerer.text_of(answer.ids) for answer in side])
            if self._logprobs:
                columns.append([answer.ids for answer in side])
                columns.append([answer.logprobs for answer in side])
        values = columns if self._is_list else [column[0] for column in columns]
        return record | dict(zip(self.names(), values, strict=True))


def _read_items(
    arguments: argparse.Namespace, source: ModelSource, fields: _Fields
) -> Iterator[Item]:
    """Yield the records of the input, all of which have a prompt.

    Raises: ListedErrors that names each bad record; ValueError if the input cannot be read.
    """
    config, _ = open_base(source.base)
    tokenizer = Tokenizer.from_folder(model_files(source.base))
    tokenizer.name_or_path = str(source.base)
    if source.adapter is not None:
        load_template(tokenizer, source.adapter)
    context = arguments.max_seq_length or config.default_seq_length
    notes: Counter = Counter()
    bad, count = [], 0
    (file,) = open_sources(arguments.input, text_field="prompt")
    for number, record in file.records():
        try:
            item, prompt = _read_item(record, tokenizer, arguments, fields, context)
            notes.update(prompt.notes)
            yield item
        except CostlyTemplateError:  # would cost as much for each further record
            raise
        except ValueError as error:
            count += 1
            if count <= MAX_LISTED:
                bad.append(f"{file.format.origin(number)}: {' '.join(str(error).split())}")
    if count:
        raise _bad_records(file, bad, count)
    for note, times in notes.items():
        word = "record" if times == 1 else "records"
        print_message("note", f"{note} ({times:,} {word} of {file.format.name})")


def _read_item(
    record: Mapping | ValueError,
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
    fields: _Fields,
    context: int,
) -> tuple[Item, Prompt]:
    """Return a record and its prompt.

    Raises: ValueError if there is none, or it is too long, or the record has an answer's key.
    """
    if isinstance(record, ValueError):
        raise record
    for name in fields.names():
        if name in record:
            raise ValueError(
                f'the record holds "{name}", which the answer would replace; name another key '
                "with minitune generate --answer-field NAME"
            )
    prompt = read_prompt(record, tokenizer, arguments.system, arguments.raw)
    if len(prompt.ids) >= context:
        raise ValueError(
            f"the prompt has {len(prompt.ids):,} tokens, but prompt and answer together may have "
            f"{context:,}; raise it with minitune generate --max-seq-length N"
        )
    values = {str(k): None if is_missing(v) else plain(v, f'"{k}"') for k, v in record.items()}
    try:
        json_line(values)
    except ValueError:
        raise ValueError("the record holds NaN or infinity, which JSON cannot write") from None
    return Item(values, prompt.ids), prompt


def _bad_records(file: Source, bad: list[str], count: int) -> ListedErrors:
    """Return the error that names the bad records of a file."""
    more = [f"and {count - len(bad):,} more"] if count > len(bad) else []
    word = "record is" if count == 1 else "records are"
    return ListedErrors("\n".join([f"{file.format.name}: {count:,} {word} bad", *bad, *more]))

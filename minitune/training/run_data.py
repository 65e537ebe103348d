"""The datasets of a run, the order of its samples, and the number of its optimizer steps.

A unit is one sample, or with packing one row of whole samples. An optimizer step takes the next
`units_per_step` units of the epoch's order. This order is a permutation that depends on the seed
and the epoch alone, so the number of a step is enough to find its samples.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from minitune.config.sft_checks import check_date
from minitune.config.sft_config import SFTConfig
from minitune.data.batching import pack_rows
from minitune.data.flat_samples import FlatSamples
from minitune.data.samples import LabelOptions, Sample
from minitune.data.sources.sources import Dataset, file_names
from minitune.data.token_cache import FOLDER
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import TokenizedDataset, tokenize_dataset
from minitune.progress import ProgressBar
from minitune.read_files import read_toml
from minitune.training.checkpoint import RunSize
from minitune.training.own_files import CONFIG


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Return the order in which an epoch visits `count` units."""
    return tuple(np.random.default_rng((seed, epoch)).permutation(count).tolist())


class SampleOrder:
    """The samples of every optimizer step of a run."""

    def __init__(self, samples: FlatSamples, args: SFTConfig, max_length: int):
        """Divide the samples into units.

        max_length: tokens of a row, used with packing.
        """
        self._samples, self._seed = samples, args.seed
        if args.packing:
            self._units = pack_rows(samples.lengths, max_length)
        else:
            self._units = [[i] for i in range(len(samples))]
        self.size = _run_size(args, len(self._units))

    def samples_of_step(self, step: int) -> list[Sample]:
        """Return the samples of optimizer step `step`, counted from 0."""
        epoch, step_in_epoch = divmod(step, self.size.steps_per_epoch)
        order = epoch_order(self._seed, epoch, len(self._units))
        first = step_in_epoch * self.size.units_per_step
        units = order[first : first + self.size.units_per_step]
        return [self._samples[i] for unit in units for i in self._units[unit]]


def _run_size(args: SFTConfig, units: int) -> RunSize:
    units_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(units / units_per_step)
    total_steps = args.max_steps
    if total_steps < 0:
        total_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
    return RunSize(units_per_step, steps_per_epoch, total_steps)


# ---- reading


def with_template_date(args: SFTConfig) -> SFTConfig:
    """Return the settings with the day that the chat template writes.

    A run that continues another one, even after midnight, takes its day from that run's
    config.toml. A new run takes today.
    """
    if args.template_date is not None:
        return args
    today = datetime.date.today().isoformat()
    if args.output_dir is None or args.overwrite:
        return replace(args, template_date=today)
    try:
        before = read_toml(Path(args.output_dir) / CONFIG).get("template_date")
        check_date(before or today)
    except ValueError:  # there is no such run; run_folder.py judges the folder
        before = None
    return replace(args, template_date=before or today)


@dataclass(frozen=True)
class RunData:
    """The tokenized datasets of a run.

    max_length: tokens of the longest sample, or with packing of a row.
    train_files, eval_files: paths of the datasets; none for records in memory.
    """

    train: TokenizedDataset
    evaluation: TokenizedDataset | None
    max_length: int
    train_files: tuple[str, ...]
    eval_files: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the datasets that are files."""
        return self.train_files + self.eval_files

    @property
    def by_label(self) -> dict[str, TokenizedDataset]:
        """The datasets by their labels in the banner."""
        if self.evaluation is None:
            return {"data": self.train}
        return {"data": self.train, "eval data": self.evaluation}

    @property
    def cache_keys(self) -> list[str]:
        """The names of the datasets' entries in the cache."""
        return [data.key for data in self.by_label.values() if data.key is not None]

    @property
    def is_in_files(self) -> bool:
        """True if config.toml can name all data."""
        return bool(self.train_files) and (self.evaluation is None or bool(self.eval_files))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest training sample."""
        return int(self.train.samples.lengths.max())


def read_datasets(
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None,
    tokenizer: Tokenizer,
    args: SFTConfig,
    max_seq_length: int,
) -> RunData:
    """Tokenize the datasets of a run.

    Large files are tokenized into output_dir/tokenized, and read from there by the next run.

    max_seq_length: tokens of the longest sample that the model takes.

    Raises: ValueError if settings and data do not fit together, or a record cannot be read.
    """
    if train_dataset is None:
        raise ValueError("train_dataset is missing; give a path or a sequence of dicts")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy!r}, but there is no eval_dataset; pass one, "
            "or choose eval_strategy 'no'"
        )
    max_length = args.max_length or max_seq_length
    if max_length > max_seq_length:
        raise ValueError(
            f"max_length {max_length} is more than the max_seq_length {max_seq_length} that the "
            "model was loaded for; load it with a larger max_seq_length"
        )
    evaluation = None
    cache = None if args.output_dir is None else Path(args.output_dir) / FOLDER
    train = tokenize(train_dataset, tokenizer, args, max_length, cache)
    if args.data_weights:
        samples = weighted(train.samples, args.data_weights, args.seed)
        train = replace(train, samples=samples, is_weighted=True)
    if eval_dataset is not None:
        evaluation = tokenize(eval_dataset, tokenizer, args, max_length, cache)
    files = [file_names(source) for source in (train_dataset, eval_dataset)]
    return RunData(train, evaluation, max_length, *files)


def tokenize(
    source: Dataset,
    tokenizer: Tokenizer,
    args: SFTConfig,
    max_length: int,
    cache: Path | None = None,
) -> TokenizedDataset:
    """Tokenize one dataset with the settings of a run.

    Raises: ValueError if a record cannot be read.
    """
    with ProgressBar("tokenizing", None, "record", not args.disable_tqdm) as bar:
        return tokenize_dataset(
            source,
            tokenizer,
            max_length,
            progress=bar.move_to,
            skip_bad=args.skip_bad,
            cache=cache,
            **vars(LabelOptions.of(args)),
        )


def weighted(samples: FlatSamples, weights: Sequence[float], seed: int) -> FlatSamples:
    """Return the samples with those of each source repeated by its weight.

    The whole part of a weight repeats all samples of the source. The fraction takes a share of them
    once more, drawn by the seed.

    weights: one number for each source.

    Raises: ValueError if the numbers of weights and sources differ, or no sample remains.
    """
    names = [item.name for item in samples.formats]
    if len(weights) != len(names):
        raise ValueError(
            f"data_weights has {len(weights)} numbers, but the training data has {len(names)} "
            f"sources ({', '.join(names)}); give one number for each"
        )
    taken = []
    for source, weight in enumerate(weights):
        own = np.flatnonzero(samples.sources == source)
        whole = int(weight)
        drawn = np.random.default_rng((seed, source)).permutation(own)
        share = np.sort(drawn[: round((weight - whole) * len(own))])
        taken += [*[own] * whole, share]
    if not sum(map(len, taken)):
        raise ValueError(f"data_weights {tuple(weights)} leave no sample; raise one of them")
    return samples.take(np.concatenate(taken))

"""The merge audit: how much of a fine-tune each way to ship it keeps, on held-out text.

A merge rounds the weights, and a quantised export rounds them a second time, although training saw
other weights. For each way to ship the model (audit_ways.py), over the trained-on tokens:

    KL(P || Q)    P as trained, Q the way; also top-1 agreement and perplexity (model/divergence.py)
    survival    = 1 - KL(as trained || way) / KL(as trained || base without the adapter)

All ways compute in float32, so the audit is about weights. llama.cpp also rounds the activations of
quantised matmuls to 8 bits, which this audit leaves out.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from minitune.checkpoints.adapter import BASE_16BIT, BASE_TEXTS, GGUF_BASE, NF4_BASE, base_form
from minitune.checkpoints.merge import merged_dtype
from minitune.data.batching import collate
from minitune.data.flat_samples import FlatSamples
from minitune.data.samples import Sample
from minitune.data.sources.sources import Dataset
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.gguf.audit.audit_pass import Quantizer, compare_ways
from minitune.gguf.audit.audit_table import MEASURABLE_DIVERGENCE, AuditRow, MergeAudit
from minitune.gguf.audit.audit_ways import BASE, TRAINED, Way, shipped_ways
from minitune.gguf.importance.importance import ImportanceMatrix
from minitune.gguf.mixtures import gguf_methods
from minitune.model.causal_lm import CausalLM
from minitune.model.loss import LossRows
from minitune.progress import ProgressBar, warn

DEFAULT_TOKENS = 4096
REMEDIES = {
    NF4_BASE: "load it with load_in_4bit=True",
    BASE_16BIT: "load it with load_in_4bit=False",
    GGUF_BASE: "load that file",
}


def audit_merges(
    model: CausalLM,
    tokenizer: Tokenizer,
    data: Dataset,
    methods: str | Sequence[str] = "q8_0",
    max_tokens: int = DEFAULT_TOKENS,
    importance: ImportanceMatrix | None = None,
    progress: bool | None = None,
) -> MergeAudit:
    """Return the share of a fine-tune that each way to ship it keeps.

    The samples are those of training: conversations are rendered by the chat template, and long
    samples are cut to the model's max_seq_length. If they hold more than `max_tokens` tokens,
    random samples are used, the same in every call. The model stays as it is.

    model: a model with an adapter, on the base that the adapter was trained on.
    data: held-out text: a file, several files, or records in memory.
    methods: a type of the GGUF files, or a list of types.
    max_tokens: tokens of the samples; the first sample is used whole.
    importance: the importance matrix that the quantisers use.
    progress: show bars, as in progress.py.

    Raises: ValueError if the model has no adapter or another base than in training, if the data
        cannot be read, or if GGUF cannot express the model or the tokenizer.
    """
    _check(model, max_tokens)
    names = gguf_methods(methods, merged_dtype(model) == torch.float16)
    for note in importance.check_model(model.config) if importance else ():
        warn(note, stacklevel=2)
    ways = shipped_ways(model, tokenizer, names, importance)
    with ProgressBar("tokenizing", None, "record", progress) as bar:
        dataset = tokenize_dataset(data, tokenizer, model.max_seq_length, bar.move_to)
    samples = audited_samples(dataset.samples, max_tokens)
    batch = collate(samples)
    ids, positions = batch.input_ids, batch.position_ids
    model.check(ids, positions)
    rows = LossRows.from_labels(batch.labels, positions, model.config.vocab_size, len(ids))
    quantizer = Quantizer.for_ways(model, ways, importance)
    sums = compare_ways(model, ways, ids, positions, rows, quantizer, progress)
    found = _rows(ways, [(total / len(rows)).tolist() for total in sums])
    return MergeAudit(
        trained=found[0],
        base=found[1],
        rows=tuple(found[2:]),
        samples=len(samples),
        tokens=len(rows),
        context=len(ids),
        trained_ships=model.gguf is not None,
        left_out=len(dataset.samples) - len(samples),
        cut=dataset.truncated,
        untrained=dataset.skipped,
    )


def _rows(ways: Sequence[Way], means: Sequence[list[float]]) -> list[AuditRow]:
    """Return the rows of the table; the second way is the base.

    means: KL, top-1 agreement, loss as trained and loss of each way.
    """
    lost = means[1][0]  # by leaving out the whole fine-tune
    return [
        AuditRow(
            way.label,
            way.nbytes,
            divergence,
            agreement,
            math.exp(loss),
            1 - divergence / lost if lost >= MEASURABLE_DIVERGENCE else None,
            way.method,
            None if way.source in (TRAINED, BASE) else way.source,
        )
        for way, (divergence, agreement, _, loss) in zip(ways, means, strict=True)
    ]


def audited_samples(samples: FlatSamples, max_tokens: int) -> list[Sample]:
    """Return all samples, or random ones of at most `max_tokens` tokens, at least one.

    The choice is the same in every call. The samples are whole and in the order of the data.
    """
    order = np.arange(len(samples))
    if samples.lengths.sum() > max_tokens:
        order = np.random.default_rng(0).permutation(order)
        count = int((samples.lengths[order].cumsum() <= max_tokens).sum())
        order = np.sort(order[: max(1, count)])
    return [samples[i] for i in order]


def _check(model: CausalLM, max_tokens: int) -> None:
    """Raise ValueError if there is nothing to audit, or not the model that was trained."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1")
    if model.lora is None:
        raise ValueError(
            "the model has no adapter, so there is no fine-tune to audit; load the folder of the "
            "run or the adapter"
        )
    held = base_form(model)
    if model.lora_base not in (None, held):
        raise ValueError(
            f"the adapter was trained on {BASE_TEXTS[model.lora_base]}, and the model holds "
            f"{BASE_TEXTS[held]}; {REMEDIES[model.lora_base]}, because the audit compares with the "
            "model as trained"
        )

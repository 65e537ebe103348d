"""Measure an importance matrix with the model's own forward pass.

The inputs of a layer's linears follow from the activations that the layer saves for backward, so
the forward pass of training serves as it is. With the names of model/decoder_layer.py:

    q, k, v    h = norm(x)          o      attn
    gate, up   h_mid = norm(x + o)  down   m = silu(gate) * up

The adapter takes part, so the inputs are those of the trained model. A batch costs one forward pass
and the elementwise operations that give h, h_mid and m a second time. Sums are float64.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minitune.data.sources.sources import Dataset, file_names
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.gguf.importance.importance import CHUNK_TOKENS, ImportanceMatrix
from minitune.gguf.model_metadata import gguf_name
from minitune.model.activations import Activations, SaveLevel, row_tiles
from minitune.model.causal_lm import CausalLM
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.layers import new_residual
from minitune.model.linear import FusedLinear
from minitune.model.packed_sequences import PackedSequences
from minitune.progress import ProgressBar

DEFAULT_TOKENS = 128 * CHUNK_TOKENS
BATCH_TOKENS = 2048  # of whole samples that run together; also the rows squared at a time


def importance_from_data(
    model: CausalLM,
    tokenizer: Tokenizer,
    source: Dataset,
    max_tokens: int = DEFAULT_TOKENS,
    progress: bool | None = None,
) -> ImportanceMatrix:
    """Return the importance of a model's linears on a dataset that training would accept.

    The samples are those of training: conversations are rendered by the chat template, and long
    samples are cut to the model's max_seq_length. If they hold more than `max_tokens` tokens,
    random samples are used, the same in every call: sorted data is represented too.

    source: a file, several files, or records in memory.
    max_tokens, progress: as in `collect_importance`.

    Raises: ValueError if records cannot be read or rendered; see also `collect_importance`.
    """
    with ProgressBar("tokenizing", None, "record", progress) as bar:
        data = tokenize_dataset(source, tokenizer, model.max_seq_length, progress=bar.move_to)
    samples = data.samples
    order = np.arange(len(samples))
    if samples.lengths.sum() > max_tokens:
        order = np.random.default_rng(0).permutation(order)
    names = ", ".join(file_names(source)) or "records in memory"
    ids = (samples[i].input_ids for i in order)
    return collect_importance(model, ids, names, max_tokens, progress)


@torch.no_grad()
def collect_importance(
    model: CausalLM,
    samples: Iterable[Sequence[int]],
    dataset: str = "",
    max_tokens: int = DEFAULT_TOKENS,
    progress: bool | None = None,
) -> ImportanceMatrix:
    """Return the importance of all linears of the decoder layers.

    The head is left out, as by llama-imatrix.

    samples: token ids of each sample; no sample sees another one.
    dataset: name of the data, for the file's keys.
    max_tokens: tokens to use; the sample that reaches the limit is cut.
    progress: show a bar in tokens, as in progress.py.

    Raises: ValueError if there is no token, if a sample does not fit the model, or if an activation
        is not finite.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1")
    fused_linears = list(model.fused_linears())
    sums = {
        fused: torch.zeros(fused.in_features, dtype=torch.float64, device=model.device)
        for fused in fused_linears
    }
    tokens = 0
    bar = ProgressBar("importance", max_tokens, "token", progress)
    with model.as_current_device(), model.resident_weights_if_they_fit(), bar:
        for batch in _batches(samples, max_tokens):
            ids = torch.cat(batch)
            positions = torch.cat([torch.arange(len(sample)) for sample in batch])
            model.check(ids, positions)
            _add_squares_(sums, model, ids, positions)
            tokens += len(ids)
            bar.update(len(ids))
    if not tokens:
        raise ValueError(f"{dataset or 'the samples'}: no token to collect an importance from")
    names = {linear: f"{name}.weight" for name, linear in model.linears()}
    values = {
        gguf_name(names[linear], model.config.architecture): (sums[fused] / tokens).float().cpu()
        for fused in fused_linears
        for linear in fused.linears
    }
    chunks = math.ceil(tokens / CHUNK_TOKENS)
    matrix = ImportanceMatrix(values, tokens, chunks, dataset)
    matrix.check_values()
    return matrix


def linear_inputs(layer: DecoderLayer, a: Activations) -> Iterator[tuple[FusedLinear, Tensor]]:
    """Yield each fused linear of a layer with its input (N, in).

    a: activations of `SaveLevel.ALL`.
    """
    norms = layer.norms
    h = layer.qkv.new_input_without_lora(a.x)
    norms.attention_in(a.x, out=h)
    yield layer.qkv, h
    yield layer.o, a.attn[:, : layer.o.in_features]
    h_mid = layer.gate_up.new_input_without_lora(a.x)
    norms.mlp_in.of_sum_(a.x, norms.attention_out.of_output(a.o), out=h_mid)
    yield layer.gate_up, h_mid
    yield layer.down, layer.compute_m(a.gate_up)[:, : layer.F]


def _add_squares_(
    sums: dict[FusedLinear, Tensor], model: CausalLM, ids: Tensor, positions: Tensor
) -> None:
    """Add the squared inputs of packed tokens to the sums.

    ids, positions: (N,), on the host.
    """
    packed = PackedSequences.from_positions(positions, model.windows).to(model.device)
    s = new_residual(model.model.embed_tokens(ids.to(model.device), model.dtype))  # (N, D)
    for layer in model.model.layers:
        a = layer.forward_saving_(s, packed, model.layer_context, SaveLevel.ALL)
        for fused, x in linear_inputs(layer, a):
            for rows in row_tiles(len(x), BATCH_TOKENS):
                sums[fused] += x[rows].float().square().sum(0)


def _batches(samples: Iterable[Sequence[int]], max_tokens: int) -> Iterator[list[Tensor]]:
    """Yield whole samples in batches of at most BATCH_TOKENS tokens, or of one longer sample."""
    batch, held, left = [], 0, max_tokens
    for sample in samples:
        ids = torch.as_tensor(sample, dtype=torch.int64)[:left]
        if held + len(ids) > BATCH_TOKENS and batch:
            yield batch
            batch, held = [], 0
        batch.append(ids)
        held += len(ids)
        left -= len(ids)
        if not left:
            break
    if batch:
        yield batch

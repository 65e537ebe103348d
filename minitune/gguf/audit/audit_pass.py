"""The pass of the merge audit: every way's next-token distributions against those as trained.

All ways run side by side, layer by layer. Each keeps its residual stream (N, D) in float32, and the
weights of a layer are made when they are needed: the sources give each tensor once, and each type
quantises it once. So the pass holds the sources and the quantised bytes of one layer, and the
float32 weights of one layer of one way. Embedding and head are quantised too: of the embedding only
the rows of the samples, and the head once for all ways that hold it in the same type.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.checkpoints.load_weights import open_weights
from minitune.checkpoints.merge import merged_dtype, merged_tensors
from minitune.config.model_config import EMBEDDING, NORM
from minitune.gguf.audit.audit_ways import BASE, TRAINED, Way
from minitune.gguf.importance.importance import ImportanceMatrix
from minitune.gguf.model_metadata import gguf_name
from minitune.gguf.quantization.fusion import choose_steps
from minitune.gguf.quantization.k_searches import EAGER_STEPS, Steps
from minitune.gguf.quantization.quantize import dequantize, quantize
from minitune.gguf.streamed_model import StreamedModel
from minitune.model.causal_lm import CausalLM
from minitune.model.divergence import compared_rows, comparison_sums, log_probabilities
from minitune.model.loss import LossRows
from minitune.progress import ProgressBar


@dataclass(frozen=True)
class Quantizer:
    """The quantisation of an export.

    importance: the importance matrix that the quantizers use, or None.
    steps: of the searches, from quantization/fusion.py.
    """

    importance: ImportanceMatrix | None = None
    steps: Steps = EAGER_STEPS

    @classmethod
    def for_ways(
        cls, model: CausalLM, ways: Sequence[Way], importance: ImportanceMatrix | None
    ) -> "Quantizer":
        """Return a quantizer whose searches are compiled if that saves time."""
        shapes = model.config.tensor_shapes()
        counts: Counter[GGMLType] = Counter()
        for way in ways:
            for name, kind in way.types.items():
                counts[kind] += math.prod(shapes[name])
        return cls(importance, choose_steps(counts, model.device, importance is not None))

    def quantize(self, model: CausalLM, name: str, values: Tensor, kind: GGMLType) -> Tensor:
        """Return the bytes of a tensor of the model, or of some of its rows.

        Raises: ValueError that names the tensor if a value does not fit the type.
        """
        weights = None
        if self.importance is not None:
            weights = self.importance.values.get(gguf_name(name, model.config.architecture))
        try:
            on_device = None if weights is None else weights.to(values.device)
            return quantize(values, kind, on_device, self.steps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


class _Sources:
    """The tensors of each source of weights, taken in the model's order.

    names: TRAINED, BASE, or merge bases of merge.py.
    """

    def __init__(self, model: CausalLM, names: Collection[str]):
        self._model = model
        self._has_base = BASE in names
        self._stored = None if model.gguf else open_weights(model.folder, model.config)
        self._merges: dict[str, Iterator[tuple[str, Tensor]]] = {
            name: merged_tensors(model, name) for name in names if name not in (TRAINED, BASE)
        }

    def take(self, names: Sequence[str]) -> dict[tuple[str, str], Tensor]:
        """Return (source, name) -> tensor of the next names of all sources."""
        taken = {(TRAINED, name): _as_trained(self._model, name) for name in names}
        if self._has_base:
            taken |= {(BASE, name): self._base(name) for name in names}
        for source, tensors in self._merges.items():
            taken |= {(source, name): _next(tensors, name) for name in names}
        return taken

    def _base(self, name: str) -> Tensor:
        """Return a tensor of the base as an export without the adapter writes it."""
        if self._stored.prequantized:
            return _as_trained(self._model, name).to(merged_dtype(self._model))
        shape = self._model.config.tensor_shapes()[name]
        return self._stored.load(name, shape, self._model.device)


def _next(tensors: Iterator[tuple[str, Tensor]], name: str) -> Tensor:
    """Return the next tensor, which has this name."""
    found, tensor = next(tensors)
    assert found == name, f"{found} instead of {name}"
    return tensor


def _as_trained(model: CausalLM, name: str) -> Tensor:
    """Return a tensor of the base in the values that the training computed with."""
    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    quantized = getattr(module, "quantized", None) if kind == "weight" else None
    if quantized is not None:
        # NF4 in the compute dtype, but the types of GGUF files as llama.cpp has them.
        return quantized.dequantize(torch.float32 if model.gguf else model.dtype)
    return getattr(module, kind).detach()


class _Weights:
    """The weights of each way among the tensors that the sources gave, such as those of a layer.

    tensors: (source, name) -> tensor.
    """

    def __init__(
        self, model: CausalLM, tensors: dict[tuple[str, str], Tensor], quantizer: Quantizer
    ):
        self._model, self._tensors, self._quantizer = model, tensors, quantizer
        self._stored: dict[tuple[str, str, GGMLType], Tensor] = {}

    def of(self, way: Way, name: str) -> Tensor:
        """Return a tensor of a way, float32."""
        values = self._dequantised(way, name)
        linear = self._model.get_submodule(name.rpartition(".")[0])
        if way.has_adapter and name.endswith(".weight") and getattr(linear, "rank", 0):
            A, B = (factor.float() for factor in linear.adapter())
            return torch.addmm(values, B, A, alpha=linear.scaling)
        return values

    def _dequantised(self, way: Way, name: str) -> Tensor:
        """Return the values that the files of a way store for a tensor, float32."""
        kind = way.types.get(name, GGMLType.F32)
        if kind == GGMLType.F32:
            return self._tensors[way.source, name].float()
        key = (way.source, name, kind)
        if key not in self._stored:
            tensor = self._tensors[way.source, name]
            self._stored[key] = self._quantizer.quantize(self._model, name, tensor, kind)
        return dequantize(self._stored[key], kind)


@torch.no_grad()
def compare_ways(
    model: CausalLM,
    ways: Sequence[Way],
    ids: Tensor,
    positions: Tensor,
    rows: LossRows,
    quantizer: Quantizer,
    progress: bool | None = None,
) -> list[Tensor]:
    """Return the sums of `comparison_sums` of each way, against the first way.

    ids, positions: packed samples, (N,) each, on the host.
    rows: the rows that are compared.
    progress: show a bar in layers, as in progress.py.

    Raises: ValueError if a source is not available, or a weight does not fit its type.
    """
    sources = _Sources(model, {way.source for way in ways})
    streamed = StreamedModel(model.config, positions, model.device)
    rows = rows.to(model.device)
    total = len(ways) * streamed.layers
    with model.as_current_device(), ProgressBar("auditing", total, "layer", progress) as bar:
        embedding = sources.take([EMBEDDING])
        streams = _embed(model, streamed, ways, embedding, ids, quantizer)
        for layer in range(streamed.layers):
            taken = sources.take(streamed.layer_names(layer))
            weights = _Weights(model, taken, quantizer)
            for way, s in zip(ways, streams, strict=True):
                streamed.run_layer_(layer, s, partial(weights.of, way))
                bar.update()
        streams = [s[rows.rows] for s in streams]  # (M, D)
        head = embedding if streamed.head_name == EMBEDDING else {}
        tensors = head | sources.take([NORM])
        if not head:
            tensors |= sources.take([streamed.head_name])
        weights = _Weights(model, tensors, quantizer)
        return _compare(streamed, ways, streams, weights, rows.targets)


def _embed(
    model: CausalLM,
    streamed: StreamedModel,
    ways: Sequence[Way],
    embedding: dict[tuple[str, str], Tensor],
    ids: Tensor,
    quantizer: Quantizer,
) -> list[Tensor]:
    """Return the residual stream (N, D) of each way before the first layer."""
    used, index = ids.unique(return_inverse=True)
    rows = {  # the table may be in host memory
        key: tensor[used.to(tensor.device)].to(model.device) for key, tensor in embedding.items()
    }
    weights, index = _Weights(model, rows, quantizer), index.to(model.device)
    return [streamed.embed(weights.of(way, EMBEDDING)[index]) for way in ways]


def _compare(
    streamed: StreamedModel,
    ways: Sequence[Way],
    streams: Sequence[Tensor],
    weights: _Weights,
    targets: Tensor,
) -> list[Tensor]:
    """Return the sums of each way's rows (M, D) against those of the first way.

    Two heads are in memory at a time. The log probabilities of the first way are computed once for
    all ways that share a head.
    """
    sums = [torch.zeros(4, dtype=torch.float64, device=targets.device) for _ in ways]
    reference = streamed.head(partial(weights.of, ways[0]))
    step = compared_rows(len(reference.weight))
    for members in _ways_by_head(ways, streamed.head_name):
        own = streamed.head(partial(weights.of, ways[members[0]]))
        for first in range(0, len(targets), step):
            tile = slice(first, first + step)
            log_p = log_probabilities(reference, streams[0][tile])  # (n, V)
            for i in members:
                log_q = log_probabilities(own, streams[i][tile])
                sums[i] += comparison_sums(log_p, log_q, targets[tile])
    return sums


def _ways_by_head(ways: Sequence[Way], name: str) -> Iterable[list[int]]:
    """Return the indices of the ways in groups that share the values of norm and head.

    No adapter changes them, so they are the same in all merges.

    name: name of the head's tensor.
    """
    groups: dict[tuple[str, GGMLType], list[int]] = {}
    for i, way in enumerate(ways):
        source = way.source if way.source in (TRAINED, BASE) else "merged"
        groups.setdefault((source, way.types.get(name, GGMLType.F32)), []).append(i)
    return groups.values()

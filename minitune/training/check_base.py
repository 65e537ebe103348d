"""The difference that NF4 makes to a base model, measured on a few training samples.

The next-token distributions P of the 16-bit base and Q of the NF4 base are compared over the
trained-on tokens of some samples (model/divergence.py).

The samples run through the model twice, first with its NF4 weights. In the second pass a layer gets
the 16-bit weights of the model folder when it begins, and its NF4 weights again when it ends. So
the memory holds the 16-bit linears of one layer at most. Both passes keep their residual streams
(N, D), and the logits exist for one tile of rows.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitune.checkpoints.load_weights import open_weights
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.data.batching import collate
from minitune.data.flat_samples import FlatSamples
from minitune.data.samples import Sample
from minitune.kernels.backend import accumulator
from minitune.model.causal_lm import CausalLM
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.divergence import compared_rows, comparison_sums, log_probabilities
from minitune.model.loss import LossRows
from minitune.model.quantized_weight import set_frozen_weight
from minitune.progress import ProgressBar

CHECKED_SAMPLES, CHECKED_TOKENS = 8, 2048
LARGE_RISE = 0.05  # of the perplexity


@dataclass(frozen=True)
class BaseCheck:
    """The difference between the NF4 base and the 16-bit base.

    samples, tokens: the checked samples and their trained-on tokens.
    divergence: KL(16 bit || NF4), nats a token.
    agreement: share of the tokens with the same likeliest token.
    perplexity_16bit, perplexity_nf4: of the trained-on tokens.
    bytes_16bit, bytes_nf4: memory of the linears that are in NF4.
    """

    samples: int
    tokens: int
    divergence: float
    agreement: float
    perplexity_16bit: float
    perplexity_nf4: float
    bytes_16bit: int
    bytes_nf4: int

    @property
    def rise(self) -> float:
        """Return the share by which NF4 raises the perplexity."""
        return self.perplexity_nf4 / self.perplexity_16bit - 1

    @property
    def advice(self) -> str:
        """Return one sentence: the cost of NF4, and the setting and memory that avoid it."""
        cost = f"NF4 changes the perplexity of this base by {100 * self.rise:+.1f}%"
        sixteen_bit = (
            f"load_in_4bit=False holds the linears in {self.bytes_16bit / 1e9:.2f} GB instead of "
            f"{self.bytes_nf4 / 1e9:.2f} GB"
        )
        if self.rise > LARGE_RISE:
            return f"{cost}: train in 16 bit if the memory allows; {sixteen_bit}"
        return f"{cost}, which is little; {sixteen_bit}"

    def __str__(self) -> str:
        return (
            f"{self.samples} samples, {self.tokens:,} trained-on tokens: KL(16 bit || NF4) "
            f"{self.divergence:.4f} nats a token, same top-1 token {100 * self.agreement:.1f}%, "
            f"perplexity {self.perplexity_16bit:.2f} in 16 bit, {self.perplexity_nf4:.2f} in NF4"
        )


def checked_samples(samples: FlatSamples) -> list[Sample]:
    """Return a few samples, spread evenly over the data.

    They are at most 8, whole, and hold at most 2,048 tokens together, except if the first one is
    longer.
    """
    trained = samples.targets.nonzero()[0]
    count = min(CHECKED_SAMPLES, len(trained))
    chosen, tokens = [], 0
    for i in range(count):
        index = trained[i * len(trained) // count]
        tokens += int(samples.lengths[index])
        if chosen and tokens > CHECKED_TOKENS:
            break
        chosen.append(samples[index])
    return chosen


@torch.no_grad()
def check_base(
    model: CausalLM, samples: Sequence[Sample], progress: bool | None = None
) -> BaseCheck:
    """Return the difference between the NF4 base of a model and its 16-bit base.

    An adapter counts in both passes; a new one changes nothing.

    samples: they run as one packed batch, and at least one token of them is trained on.
    progress: show a bar in layers, as in progress.py.

    Raises: ValueError if the model or its folder lacks one of the two bases, or if no token of the
        samples is trained on.
    """
    stored = _stored_weights(model)
    batch = collate(samples)
    if not batch.targets:
        raise ValueError("the samples to check hold no trained-on token; choose other samples")
    ids, positions = batch.input_ids, batch.position_ids
    model.check(ids, positions)
    rows = LossRows.from_labels(batch.labels, positions, model.config.vocab_size, len(ids))
    rows = rows.to(model.device)
    with model.as_current_device(), _counted_layers(model, progress):
        s_nf4 = model.residual_stream(ids, positions)[rows.rows]  # (M, D)
        with _weights_of_folder(model, stored):
            s_16bit = model.residual_stream(ids, positions)[rows.rows]  # (M, D)
        sums = _compare(model, s_16bit, s_nf4, rows.targets)
    divergence, agreement, loss_16bit, loss_nf4 = (sums / len(rows)).tolist()
    quantized = [linear for _, linear in model.linears() if linear.is_quantized]
    return BaseCheck(
        samples=len(samples),
        tokens=len(rows),
        divergence=divergence,
        agreement=agreement,
        perplexity_16bit=math.exp(loss_16bit),
        perplexity_nf4=math.exp(loss_nf4),
        bytes_16bit=sum(2 * linear.in_features * linear.out_features for linear in quantized),
        bytes_nf4=sum(linear.quantized.nbytes for linear in quantized),
    )


def nothing_to_check(model: CausalLM) -> str | None:
    """Return the reason why a base has no second form to compare with, or None."""
    if model.gguf is not None:
        return f"the base is {model.gguf} as it is served, so there is nothing to check"
    if not model.is_nf4:
        return "the base is in 16 bit, not in NF4, so there is nothing to check"
    return None


def _stored_weights(model: CausalLM) -> SafetensorsFolder:
    """Return the weights of the model's folder.

    Raises: ValueError if the model has no NF4 weights, or the folder no 16-bit weights.
    """
    if (reason := nothing_to_check(model)) is not None:
        raise ValueError(reason)
    stored = open_weights(model.folder, model.config)
    if stored.prequantized:
        raise ValueError(
            f"{model.folder}: holds 4-bit weights only, so there is nothing to compare them with; "
            "check the folder of 16-bit weights that they were made from"
        )
    return stored


@contextmanager
def _weights_of_folder(model: CausalLM, stored: SafetensorsFolder) -> Iterator[None]:
    """Meanwhile, let each layer run with the stored weights instead of NF4."""
    names = {linear: name for name, linear in model.linears() if linear.is_quantized}
    ended = ExitStack()  # gives the running layer its NF4 weights again

    def begin(layer: DecoderLayer, _) -> None:
        for fused in layer.fused_linears:
            ended.callback(setattr, fused, "resident_weight", fused.resident_weight)
            fused.resident_weight = None
            for linear in fused.linears:
                if linear in names:
                    ended.callback(set_frozen_weight, linear, linear.quantized)
                    shape = (linear.out_features, linear.in_features)
                    weight = stored.load(f"{names[linear]}.weight", shape, model.device)
                    set_frozen_weight(linear, weight)

    def end(*_) -> None:
        ended.close()

    with ended, ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.register_forward_pre_hook(begin))
            hooks.enter_context(layer.register_forward_hook(end))
        yield


@contextmanager
def _counted_layers(model: CausalLM, progress: bool | None) -> Iterator[None]:
    """Meanwhile, count the layers of two passes in a bar."""
    layers = model.model.layers
    with ProgressBar("checking", 2 * len(layers), "layer", progress) as bar, ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda *_: bar.update()))
        yield


def _compare(model: CausalLM, s_16bit: Tensor, s_nf4: Tensor, targets: Tensor) -> Tensor:
    """Return the sums over the rows of divergence, agreement and both losses, float64 (4,).

    s_16bit, s_nf4: rows of the residual streams, (M, D).
    targets: (M,).
    """
    weight = model.lm_head.weight_as(accumulator(model.dtype))  # (V, D)
    head = replace(model.head(), weight=weight)
    sums = torch.zeros(4, dtype=torch.float64, device=targets.device)
    step = compared_rows(len(weight))
    for first in range(0, len(targets), step):
        tile = slice(first, first + step)
        log_p, log_q = (log_probabilities(head, s[tile]) for s in (s_16bit, s_nf4))  # (n, V)
        sums += comparison_sums(log_p, log_q, targets[tile])
    return sums

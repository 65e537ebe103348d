"""The causal language model: embedding, decoder layers, final norm, head and loss.

Inside, everything is packed: N tokens of any number of samples, without padding, with positions
that restart at 0 in each sample. Batches (B, T) are packed on the way in. All indices (positions,
sample bounds, labelled rows) are computed on the host and sent along, so a training step fetches
nothing from the device.

The dimension letters are those of minitune/model/__init__.py.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitune.config.foreign_arguments import foreign_arguments
from minitune.config.loading_arguments import CALLING
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.device import check_torch_defaults, free_memory
from minitune.model.activations import SaveLevel
from minitune.model.autograd import LogitsNode, LossNode
from minitune.model.decoder import Decoder
from minitune.model.decoding.engine import DecodeEngine
from minitune.model.fixed_module import FixedModule
from minitune.model.generate import generate
from minitune.model.layers import LayerContext, new_residual
from minitune.model.linear import FusedLinear, Linear
from minitune.model.loss import Head, LossBuffers, LossRows, new_logits_buffer, rows_loss
from minitune.model.packed_sequences import PackedSequences, pack_batch
from minitune.model.precision import own_precision
from minitune.model.resident_weights import ResidentWeights
from minitune.model.rope import RopeTables
from minitune.model.step_planner import StepPlanner

EVALUATION_TILE_ROWS = 2048


@dataclass
class Output:
    """The result of a forward pass: the loss if labels were given, and the logits otherwise.

    logits: shaped like input_ids, with V at the end; in float32 if the model is in float16.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class CausalLM(FixedModule):
    """A causal language model with a frozen base.

    `FastLanguageModel.from_pretrained` builds the model and fills its weights.

    windows: the sliding windows that a sample of max_seq_length reaches beyond, in tokens.
    lora_seed: the seed that drew the adapter's A.
    lora_dropout: the dropout that a loaded adapter was trained with; not applied here.
    lora_base: form of the weights that a loaded adapter was trained on: "nf4", "gguf" or "16bit";
        None if its file does not say, or if training went on here.
    folder: the folder of config.json and the tokenizer.
    gguf: the GGUF file of the weights; None if the folder holds them.
    adapters_removed: number of adapters that another one replaced.
    max_trained_seqlen: tokens of the longest sample that this process trained on, or 0.
    eos_token_ids: the tokens at which `generate` stops.
    generation_defaults: settings of the model's folder that `generate` takes if a call names none.
    decode_engine: the engine of `generate`, with the memory that it keeps between calls.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_seq_length: int,
        planner: StepPlanner,
        attention: str = "auto",
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.device = device
        self.max_seq_length = max_seq_length
        self.planner = planner
        kinds = config.kinds_up_to(max_seq_length)
        self.windows = tuple(sorted({kind.window for kind in kinds} - {None}))
        self.model = Decoder(config, kinds)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        ropes = tuple(RopeTables.build(rope, max_seq_length, device) for rope in config.ropes)
        self.layer_context = LayerContext(ropes, dtype, attention)
        self.lora: LoraConfig | None = None
        self.lora_seed: int | None = None
        self.lora_dropout = 0.0
        self.lora_base: str | None = None
        self.adapters_removed = 0
        self.max_trained_seqlen = 0
        self._resident_head: Tensor | None = None  # while it stays dequantised
        self.name = ""
        self.folder = Path()
        self.gguf: Path | None = None
        self.eos_token_ids: tuple[int, ...] = ()
        self.generation_defaults: dict[str, Any] = {}
        self.decode_engine = DecodeEngine()

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield the full name and the module of each adaptable linear, layer by layer."""
        for name, module in self.named_modules():
            if isinstance(module, Linear) and module is not self.lm_head:
                yield name, module

    def fused_linears(self) -> Iterator[FusedLinear]:
        """Return the fused linears of all layers, from the first layer on."""
        return (fused for layer in self.model.layers for fused in layer.fused_linears)

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Return the formats of the quantised linears, such as "NF4", those of most bytes first."""
        nbytes = Counter()
        for _, linear in self.linears():
            if linear.is_quantized:
                nbytes[linear.quantized.format] += linear.quantized.nbytes
        return tuple(name for name, _ in nbytes.most_common())

    @property
    def formats_text(self) -> str:
        """Return the formats of the linears in words, such as "Q4_K and Q6_K" or "16-bit"."""
        if self.weight_formats:
            return " and ".join(self.weight_formats)
        _, first = next(self.linears())
        return f"{8 * first.weight.dtype.itemsize}-bit"

    @property
    def is_nf4(self) -> bool:
        """Return True if linears are in NF4."""
        return "NF4" in self.weight_formats

    def num_parameters(self) -> int:
        """Return the number of parameters of the base model, each quantised weight included."""
        shapes = self.config.tensor_shapes()
        return sum(math.prod(shape) for shape in shapes.values())

    # ---- adapter

    @torch.inference_mode(False)  # else its parameters could not be trained
    def add_lora(self, lora: LoraConfig, seed: int = 3407) -> None:
        """Attach LoRA branches that change nothing yet. The same seed draws the same A.

        Raises: ValueError if there is an adapter already, or the model lacks a target module.
        """
        if self.lora is not None:
            raise ValueError(
                "the model has an adapter already; load the base again to attach another one"
            )
        lora = replace(lora, target_modules=self.config.adapted_linears(lora.target_modules))
        generator = torch.Generator().manual_seed(seed)
        for name, linear in self.linears():
            if name.rsplit(".", 1)[1] in lora.target_modules:
                linear.add_lora(lora, self.device, generator)
        self.lora, self.lora_seed = lora, seed

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the adapter's parameters under PEFT's names, always in the same order."""
        return [(name, p) for name, p in self.named_parameters() if ".lora_" in name]

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the adapter's parameters that requires_grad_(False) does not freeze."""
        return [(name, p) for name, p in self.adapter_parameters() if p.requires_grad]

    # ---- forward

    @foreign_arguments(**CALLING)
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Output:
        """Return the loss if labels are given, and the logits otherwise.

        input_ids: (B, T); or (N,) or (1, N) packed, with position_ids that restart at 0 in each
            sample.
        labels: shaped like input_ids. The token before a label predicts it, within the sample, so
            the first label of a sample does not count, nor does -100.
        attention_mask: (B, T), 0 for padding. Padding is not computed at all.
        num_items_in_batch: divisor of the summed loss; None is the number of labels that count.

        Raises: ValueError if an id is not in the vocabulary, if shapes differ, or if a sample is
            longer than max_seq_length.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)} "
                "differ in shape; each token has one label"
            )
        check_torch_defaults()
        ids, positions, mask = pack_batch(input_ids.cpu(), attention_mask, position_ids)
        self.check(ids, positions)
        if torch.is_grad_enabled() and self.lora is not None:
            self.free_generation_memory()  # backward needs the room
        with self.as_current_device():
            s = self.residual_stream(ids, positions)
            if labels is None:
                return Output(logits=self._logits(s, mask))
            targets, vocab = labels.cpu()[mask], self.config.vocab_size
            loss_rows = LossRows.from_labels(targets, positions, vocab, len(ids))
            divisor = max(1, len(loss_rows)) if num_items_in_batch is None else num_items_in_batch
            return Output(loss=LossNode.apply(s, self, loss_rows.to(self.device), divisor))

    def residual_stream(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the residual stream (N, D) after the last layer.

        ids, positions: packed, (N,) each, on the host.
        """
        s = new_residual(self._embed(ids))
        levels, packed, tile_rows = self._plan(
            PackedSequences.from_positions(positions, self.windows).to(self.device)
        )
        for layer, level in zip(self.model.layers, levels, strict=True):
            s = layer(s, packed, self.layer_context, level, tile_rows)
        return s

    def _embed(self, ids: Tensor) -> Tensor:
        """Return the embedding (N, D) of ids (N,) on the host, in the compute dtype."""
        return self.model.embed_tokens(ids.to(self.device, non_blocking=True), self.dtype)

    def _logits(self, s: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of s (N, D), shaped like the mask with V at the end, 0 for padding."""
        logits = LogitsNode.apply(s, self.head())  # (N, V)
        if not mask.all():
            rows = mask.view(-1).nonzero()[:, 0].to(self.device)
            padded = logits.new_zeros(mask.numel(), logits.shape[-1])
            logits = padded.index_put((rows,), logits)
        return logits.view(*mask.shape, -1)

    @property
    def converts_head(self) -> bool:
        """Return True if the head is not stored in the compute dtype."""
        return self.lm_head.is_quantized or self.lm_head.weight.dtype != self.dtype

    def head(self, out: Tensor | None = None) -> Head:
        """Return the final norm and the head in the compute dtype.

        out: room for a head that is converted (V, D); None makes a new tensor.
        """
        weight, c = self._resident_head, self.config
        if weight is None:
            weight = self.lm_head.weight_as(self.dtype, out)
        return Head(self.model.norm, weight, c.logit_multiplier, c.logit_softcap)

    def rows_loss(
        self,
        s: Tensor,
        loss_rows: LossRows,
        denominator: float | Tensor,
        dresidual: Tensor | None,
        buffers: LossBuffers | None = None,
    ) -> Tensor:
        """Return the loss of s (N, D), as loss.rows_loss.

        buffers: from `new_loss_buffers`; None allocates what the loss needs.
        """
        logits, room = buffers or (None, None)
        return rows_loss(s, loss_rows, self.head(room), denominator, dresidual, logits)

    def new_loss_buffers(self, rows: int) -> LossBuffers:
        """Return the buffers of a loss over at most `rows` rows."""
        c, head = self.config, None
        if self.converts_head:
            head = torch.empty(self.model.embed_tokens.shape, dtype=self.dtype, device=self.device)
        return LossBuffers(new_logits_buffer(rows, c.vocab_size, self.dtype, self.device), head)

    def check(self, ids: Tensor, positions: Tensor) -> None:
        """Check packed ids (N,) and positions (N,), both on the host.

        Raises: ValueError if there is no token, if a sample is longer than max_seq_length, or if an
            id is not in the vocabulary.
        """
        if len(ids) == 0:
            raise ValueError("input_ids hold no token; expected at least one")
        if (longest := int(positions.max()) + 1) > self.max_seq_length:
            raise ValueError(
                f"a sample has {longest} tokens, but the model was loaded for "
                f"{self.max_seq_length}; load it with a larger max_seq_length"
            )
        vocab, low, high = self.config.vocab_size, int(ids.min()), int(ids.max())
        if not 0 <= low <= high < vocab:
            wrong = low if low < 0 else high
            raise ValueError(f"input_ids reach {wrong}, but the vocabulary has {vocab} rows")

    def _plan(self, packed: PackedSequences) -> tuple[list[SaveLevel], PackedSequences, int | None]:
        """Return the level of each layer, the samples as attention sees them, and tile_rows.

        Without autograd every layer saves the least, in tiles: an evaluation fits into the memory
        that a training step has. With autograd nothing is offloaded.
        """
        if not torch.is_grad_enabled():
            levels = [SaveLevel.INPUT] * len(self.model.layers)
            return levels, replace(packed, uniform_seqlen=None), EVALUATION_TILE_ROWS
        plan = self.planner.plan_for(self, packed)
        levels = [
            SaveLevel.INPUT if layer.offloaded else max(layer.level, SaveLevel.INPUT)
            for layer in plan.layers
        ]
        return levels, plan.select_attention(packed), plan.tile_rows

    # ---- device and weights

    def free_generation_memory(self) -> None:
        """Free the cache, the CUDA graphs and the weights that `generate` keeps between calls."""
        self.decode_engine.free()

    @contextmanager
    def resident_weights(self) -> Iterator[None]:
        """Keep all linears and the head dequantised meanwhile; no number changes."""
        weights = ResidentWeights(self.dtype, self.device)
        owns_head = self._resident_head is None
        try:
            weights.keep_only(self.fused_linears())
            self._resident_head = self.head().weight
            yield
        finally:
            weights.keep_only(())
            self._resident_head = None if owns_head else self._resident_head

    def resident_weights_if_they_fit(self) -> AbstractContextManager:
        """Return `resident_weights()` if they take less than half of the free memory."""
        shapes = [fused.weight_shape for fused in self.fused_linears()]
        elements = sum(map(math.prod, [self.model.embed_tokens.shape, *shapes]))
        fits = elements * self.dtype.itemsize < free_memory(self.device) / 2
        return self.resident_weights() if fits else nullcontext()

    @contextmanager
    def as_current_device(self) -> Iterator[None]:
        """Make the model's GPU the current device, on which Triton launches, in own precision."""
        gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with gpu, own_precision(self.device, self.dtype):
            yield

    generate = generate

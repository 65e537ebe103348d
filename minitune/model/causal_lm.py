"""The model: embedding, decoder layers, norm, head and loss.

Inside, everything is packed: N tokens of any number of samples without padding, whose positions restart at 0 with each
sample (layers.py). Batches of shape (B, T) are packed on the way in. Whatever is an index (positions, sample bounds,
rows with a label) is computed on the host and sent along: a training step fetches nothing from the device.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.device import free_memory
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.autograd import LogitsNode, LossNode
from minitune.model.decoder_layer import DecoderLayer, new_residual
from minitune.model.generate import generate
from minitune.model.layers import Embedding, LayerContext, RMSNorm
from minitune.model.linear import FusedLinear, Linear
from minitune.model.loss import LossRows, new_logits_buffer, rows_loss
from minitune.model.packed_sequences import PackedSequences
from minitune.model.resident_weights import ResidentWeights
from minitune.model.rope import RopeTables

EVALUATION_ROWS = 2048  # that the wide parts of a layer take at a time


@dataclass
class Output:
    """`loss` where labels were given, else `logits`, shaped like input_ids with V at the end."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class StepPlanner(Protocol):
    """The part of memory/planner.py's Planner that the model uses."""

    def plan_for(self, model: "CausalLM", packed: PackedSequences) -> "StepPlan": ...


class StepPlan(Protocol):
    """The part of memory/plan.py's Plan that the model uses."""

    layers: tuple[LayerPlan, ...]
    tile_rows: int | None

    def select_attention(self, packed: PackedSequences) -> PackedSequences: ...


class Decoder(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class CausalLM(nn.Module):
    """A Llama whose base is frozen. `FastLanguageModel.from_pretrained` makes one and fills it."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_seq_length: int,
        planner: "StepPlanner",
        attention: str = "auto",
    ):
        super().__init__()
        self.config, self.dtype, self.device, self.max_seq_length = (
            config,
            dtype,
            device,
            max_seq_length,
        )
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.layer_context = LayerContext(
            RopeTables.build(config, max_seq_length, device), dtype, attention
        )
        self.lora: LoraConfig | None = None
        self.lora_seed: int | None = None  # drew the adapter's A
        self.lora_dropout = 0.0  # that a loaded adapter was trained with; not applied here
        self.planner = planner
        self.name, self.folder = "", Path()
        self.eos_token_ids: tuple[int, ...] = ()  # where generate stops

    def _apply(self, fn, recurse=True):
        raise ValueError(
            "the model stays where it was loaded; choose with from_pretrained(device=..., dtype=...)"
        )

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """The adaptable linears by their full names, layer by layer."""
        return (
            (name, m)
            for name, m in self.named_modules()
            if isinstance(m, Linear) and m is not self.lm_head
        )

    def num_parameters(self) -> int:
        """Parameters of the base model; quantised ones count as what they stand for."""
        c = self.config
        linears = sum(linear.in_features * linear.out_features for _, linear in self.linears())
        embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        small = sum(
            p.numel() for n, p in self.named_parameters() if n.endswith(("norm.weight", ".bias"))
        )
        return linears + embeddings + small

    # ---- adapter

    def add_lora(self, lora: LoraConfig, seed: int = 3407) -> None:
        """Attach LoRA branches that change nothing yet; the same seed draws the same A."""
        if self.lora is not None:
            raise ValueError(
                "the model already has an adapter; load the base again to attach another"
            )
        generator = torch.Generator().manual_seed(seed)
        for name, linear in self.linears():
            if name.rsplit(".", 1)[1] in lora.target_modules:
                linear.add_lora(lora, self.device, generator)
        self.lora, self.lora_seed = lora, seed

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters under PEFT's names, always in the same order."""
        return [(name, p) for name, p in self.named_parameters() if ".lora_" in name]

    # ---- forward

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Output:
        """The loss where there are labels, else the logits.

        input_ids: (B, T), or (N,) or (1, N) packed together with position_ids that restart at 0 with each sample.
        labels: shaped like input_ids; the label of a token is predicted from the token before it in its sample, so
            a sample's first label counts for nothing, nor does -100.
        attention_mask: (B, T), 0 for padding, which is left out of the computation altogether.
        num_items_in_batch: what the summed loss is divided by; by default the number of labels that count.

        Raises ValueError for ids beyond the vocabulary, shapes that disagree, or a sample over max_seq_length.
        """
        ids, positions, keep = self._pack(input_ids.cpu(), attention_mask, position_ids)
        packed = PackedSequences.from_positions(positions).to(self.device)
        with torch.autocast(self.device.type, enabled=False), self.as_current_device():
            s = new_residual(
                self.model.embed_tokens(ids.to(self.device, non_blocking=True), self.dtype)
            )
            levels, packed, tile = self._plan(packed)
            for layer, level in zip(self.model.layers, levels, strict=True):
                s = layer(s, packed, self.layer_context, level, tile)
            if labels is None:
                logits = LogitsNode.apply(s, self.model.norm, self.lm_head.weight_as(self.dtype))
                if not keep.all():
                    full = logits.new_zeros(keep.numel(), logits.shape[-1])
                    logits = full.index_put(
                        (keep.view(-1).nonzero()[:, 0].to(self.device),), logits
                    )
                return Output(logits=logits.view(*input_ids.shape, -1))
            if labels.shape != input_ids.shape:
                raise ValueError(
                    f"labels {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)} differ in shape"
                )
            loss_rows = LossRows.from_labels(
                labels.cpu()[keep], positions, self.config.vocab_size, len(ids)
            )
            denominator = (
                max(1, len(loss_rows)) if num_items_in_batch is None else num_items_in_batch
            )
            return Output(loss=LossNode.apply(s, self, loss_rows.to(self.device), denominator))

    def rows_loss(
        self,
        s: Tensor,
        loss_rows: LossRows,
        denominator: float | Tensor,
        dx: Tensor | None,
        tile: Tensor | None = None,
    ) -> Tensor:
        """loss.labelled_loss with the model's norm and head."""
        return rows_loss(
            s, loss_rows, self.model.norm, self.lm_head.weight_as(self.dtype), denominator, dx, tile
        )

    def new_logits_buffer(self, rows: int) -> Tensor:
        """Where the logits of the loss over so many rows go, a tile at a time."""
        return new_logits_buffer(rows, self.config.vocab_size, self.dtype, self.device)

    def _pack(
        self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Packed ids (N,), their positions (N,), and the mask of those kept, shaped like the ids; all on the host."""
        keep = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != ids.shape:
                raise ValueError(
                    f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(ids.shape)} differ"
                )
            keep = attention_mask.cpu().bool()
        if position_ids is None:
            positions = (keep.cumsum(-1) - 1)[keep]
        else:
            positions = position_ids.cpu().expand(ids.shape)[keep]
            follows = torch.cat([positions.new_full((1,), -1), positions[:-1]]) + 1
            if not ((positions == 0) | (positions == follows)).all():
                raise ValueError(
                    "position_ids must count up by one and restart at 0 with each packed sample"
                )
        ids = ids[keep]
        self.check(ids, positions)
        return ids, positions, keep

    def check(self, ids: Tensor, positions: Tensor) -> None:
        """ValueError where packed ids (N,) or positions (N,), on the host, are not what the model was loaded for."""
        if len(ids) == 0:
            raise ValueError("input_ids hold no token")
        if (longest := int(positions.max()) + 1) > self.max_seq_length:
            raise ValueError(
                f"a sample has {longest} tokens, but the model was loaded for {self.max_seq_length}"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"input_ids reach {int(ids.max())}, but the vocabulary has {self.config.vocab_size} rows"
            )

    def fused_linears(self) -> Iterator[FusedLinear]:
        """Return the fused linears of all layers, from the first layer on."""
        return (fused for layer in self.model.layers for fused in layer.fused_linears)

    @contextlib.contextmanager
    def resident_weights(self) -> Iterator[None]:
        """Keep every linear as a dense weight in the compute dtype meanwhile: same numbers, nothing to dequantise."""
        weights = ResidentWeights(self.dtype, self.device)
        try:
            weights.keep_only(self.fused_linears())
            yield
        finally:
            weights.keep_only(())

    def resident_weights_if_they_fit(self) -> contextlib.AbstractContextManager:
        """Return `resident_weights()` if they take less than half of the free memory."""
        elements = sum(math.prod(fused.weight_shape) for fused in self.fused_linears())
        fits = elements * self.dtype.itemsize < free_memory(self.device) / 2
        return self.resident_weights() if fits else contextlib.nullcontext()

    def _plan(self, packed: PackedSequences) -> tuple[list[SaveLevel], PackedSequences, int | None]:
        """Return the level of each layer, the samples as attention sees them, and the rows of a tile.

        Without autograd every layer saves the least, in tiles: an evaluation fits into the memory
        that a training step has. With autograd nothing is offloaded.
        """
        if not torch.is_grad_enabled():
            levels = [SaveLevel.INPUT] * len(self.model.layers)
            return levels, replace(packed, uniform_seqlen=None), EVALUATION_ROWS
        plan = self.planner.plan_for(self, packed)
        levels = [
            SaveLevel.INPUT if layer.offloaded else max(layer.level, SaveLevel.INPUT)
            for layer in plan.layers
        ]
        return levels, plan.select_attention(packed), plan.tile_rows

    def as_current_device(self) -> contextlib.AbstractContextManager:
        """Makes the model's GPU the current one meanwhile: Triton launches there, wherever the tensors are."""
        return (
            torch.cuda.device(self.device)
            if self.device.type == "cuda"
            else contextlib.nullcontext()
        )

    generate = generate

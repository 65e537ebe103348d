"""A micro-step: forward and backward of packed samples, without the autograd engine.

    s = embedding;  s = layer(s) for each layer, keeping what its level says
    loss, dx = final norm, head and cross entropy of the labelled rows of s
    dx = layer.backward(dx) for each layer from the last, .grad += dA, dB

On a GPU both passes are CUDA graphs (graphs.py), for which samples are padded. Padding is a sample of its own, or,
behind a single sample, more of it: nobody sees it, and it has no label.
"""

import contextlib
import warnings
from bisect import bisect_right
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minitune.data.batching import Batch
from minitune.device import to_device_async
from minitune.memory.device_rates import machine_rates
from minitune.memory.offload import ActivationOffloader
from minitune.memory.plan import Plan
from minitune.memory.planner import Planner
from minitune.model.activations import Activations, SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.model.decoder_layer import new_residual
from minitune.model.linear import FusedLinear
from minitune.model.loss import LossRows
from minitune.model.packed_sequences import PackedSequences
from minitune.training.cuda_graphs import MOST_TOKENS, CUDAGraphCache, bucket_size


def _padded(batch: Batch, size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Ids and positions, (size,) each; no position reaches `longest`."""
    ids, positions = batch.input_ids, batch.position_ids
    more = size - len(ids)
    if more == 0:
        return ids, positions
    first = len(ids) if not positions[1:].eq(0).any() and size <= longest else 0
    padding = torch.arange(first, first + more) if first else torch.arange(more) % longest
    return torch.cat([ids, ids.new_zeros(more)]), torch.cat([positions, padding])


class MicroStep:
    """Adds the gradients of a batch to `.grad` of the model's adapters and returns its loss."""

    def __init__(self, model: CausalLM, planner: Planner | None = None, capture: bool = True):
        """planner: makes the plans; by default the model's. capture=False launches everything as it comes; on a CPU there is no other way.

        Raises ValueError for a model without an adapter.
        """
        if model.lora is None:
            raise ValueError(
                "the model has no adapter to train; call FastLanguageModel.get_peft_model first"
            )
        self.model, self.planner = model, planner or model.planner
        self._parameters = [layer.lora_parameters() for layer in model.model.layers]
        self._offload: ActivationOffloader | None = None
        self._dense: set[FusedLinear] = set()
        if model.device.type == "cuda":  # now, and not while a step is timed or its memory counted
            torch.cuda.current_blas_handle()
            if self.planner.level is None:
                machine_rates(model.device)
        capture &= model.device.type == "cuda" and CUDAGraphCache.failure is None
        self._graphs = CUDAGraphCache(model.device) if capture else None

    @torch.no_grad()
    def __call__(self, batch: Batch, denominator: float) -> Tensor:
        """The batch's token losses over `denominator`, the targets of the whole optimizer step; 0-dim, on the device.

        Raises ValueError for tokens and labels that the model does not have.
        """
        model = self.model
        model.check(batch.input_ids, batch.position_ids)
        self._give_up_after_a_failure()
        tokens = len(batch.input_ids)
        capture = self._graphs is not None and tokens <= MOST_TOKENS
        size = bucket_size(tokens) if capture else tokens
        for parameters in self._parameters:
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)

        def loss_of(s: Tensor, top: Tensor, tile: Tensor) -> Tensor:
            # the host's work for the loss, now that the GPU has a forward pass to do
            loss_rows = LossRows.from_labels(
                batch.labels, batch.position_ids, model.config.vocab_size, size
            )
            dx = top[:, : model.config.hidden_size]
            return model.rows_loss(s, loss_rows.to(model.device), denominator, dx, tile)

        try:
            with torch.autocast(model.device.type, enabled=False), model.as_current_device():
                inputs, packed = self._inputs(batch, size)
                run = partial(self._graphs.run, self) if capture else self._plainly
                loss = run(inputs, packed, loss_of)
        except BaseException:
            self._offload = None  # and what was on its way to the host
            raise
        self._give_up_after_a_failure()
        return loss

    def _plainly(
        self,
        inputs: Tensor,
        packed: PackedSequences,
        loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """As Graphs.run, with plain launches."""
        if self._graphs is not None:
            self._graphs.forget()
            self.make_resident(0)
        plan = self.planner.plan_for(self.model, packed)
        packed = plan.select_attention(packed)
        s, kept = self.forward(inputs, packed, plan)
        top = self.new_residual_gradient(inputs.shape[1])
        loss = loss_of(s, top, self.model.new_logits_buffer(inputs.shape[1]))
        del s  # backward has no use for it
        self.backward(top, kept, packed, plan)
        return loss

    def _give_up_after_a_failure(self) -> None:
        if self._graphs is not None and CUDAGraphCache.failure is not None:
            self._graphs = self._offload = None
            self.make_resident(0)
            warnings.warn(
                f"launching without CUDA graphs from now on: {CUDAGraphCache.failure}", stacklevel=3
            )

    def close(self) -> None:
        """Give up all graphs and their memory; the next call begins anew."""
        if self._graphs is not None:
            self._graphs.forget()
        self._offload = None
        self.make_resident(0)

    def own_memory(self) -> contextlib.AbstractContextManager:
        """Runs what is launched within in the memory that the graphs have, where there are any."""
        return self._graphs.own_memory() if self._graphs is not None else contextlib.nullcontext()

    def make_resident(self, count: int) -> None:
        """Keep the weights of the first `count` layers dequantised, and no others that were so because of this."""
        wanted = [
            projection
            for layer in self.model.model.layers[:count]
            for projection in layer.projections
        ]
        for projection in self._dense - set(wanted):
            projection.resident = None
        self._dense &= set(wanted)
        for projection in wanted:
            if projection.resident is None:
                projection.make_resident(self.model.dtype, self.model.device)
            if projection.resident is not None:
                self._dense.add(projection)

    @property
    def dense_bytes(self) -> int:
        """What `keep_dense` takes now."""
        return sum(projection.resident.nbytes for projection in self._dense)

    def _inputs(self, batch: Batch, size: int) -> tuple[Tensor, PackedSequences]:
        """Ids, positions, start and end, int32 (4, size) on the device, and the samples, which are views of them."""
        ids, positions = _padded(batch, size, self.model.max_seq_length)
        host = PackedSequences.from_positions(positions)
        inputs = to_device_async(
            torch.stack([ids.int(), host.positions, host.start, host.end]), self.model.device
        )
        return inputs, PackedSequences(*inputs[1:], host.uniform_seqlen, host.max_seqlen)

    def new_residual_gradient(self, tokens: int) -> Tensor:
        """An empty buffer (N, D + R) for the gradient of the residual stream, layer by layer from the last."""
        return self.model.model.layers[-1].new_gradient(tokens, self.model.dtype, self.model.device)

    def forward(
        self, inputs: Tensor, packed: PackedSequences, plan: Plan
    ) -> tuple[Tensor, list[Activations | None]]:
        """The residual stream s (N, D) behind the last layer, and what each layer keeps: None where that has gone to
        the host or is nothing."""
        model, kept = self.model, []
        s = new_residual(model.model.embed_tokens(inputs[0], model.dtype))
        if plan.host_bytes:
            self._make_arena(plan.host_bytes)
            # One piece, of which the tensors of all sizes are cut: where small ones had been, no large one would fit.
            torch.empty(plan.saved_bytes, dtype=torch.uint8, device=model.device)
        for i, (layer, keep) in enumerate(zip(model.model.layers, plan.layers, strict=True)):
            if plan.host_bytes:
                self._offload.wait_until_in_flight(plan.in_flight_limit(i))
            a = layer.forward_saving(
                s, packed, model.shared, max(keep.level, SaveLevel.INPUT), plan.tile_rows
            )
            if keep.offloaded:
                self._offload.offload(i, a)
            kept.append(None if keep.offloaded or keep.level == SaveLevel.NOTHING else a)
            del a  # or the next layer would run beside what this one does not keep
        if plan.host_bytes:
            self._offload.wait_until_in_flight(0)
        return s, kept

    def backward(
        self, top: Tensor, kept: list[Activations | None], packed: PackedSequences, plan: Plan
    ) -> None:
        """From the gradient of s in `top`. Uses up `kept`."""
        keepers = [i for i, keep in enumerate(plan.layers) if keep.level != SaveLevel.NOTHING]
        lowest = [
            keepers[bisect_right(keepers, i) - 1] for i in range(len(kept))
        ]  # what layer i is computed from
        for i in reversed(range(len(kept))):
            if kept[lowest[i]] is None:
                kept[lowest[i]] = self._offload.restore(lowest[i])
            if i > 0 and kept[lowest[i - 1]] is None:
                self._offload.prefetch(lowest[i - 1])
            if kept[i] is None:
                self._inputs_again(kept, lowest[i], i, packed, plan.tile_rows)
            layer = self.model.model.layers[i]
            gradients = layer.backward(
                top, kept.pop(), packed, self.model.shared, plan.tile_rows, need_dx=i > 0
            )
            torch._foreach_add_([p.grad for p in self._parameters[i]], gradients)

    def _inputs_again(
        self,
        kept: list[Activations | None],
        lowest: int,
        highest: int,
        packed: PackedSequences,
        tile: int | None,
    ) -> None:
        """Fill in the inputs of the layers above `lowest` up to `highest`, which kept nothing."""
        layers, s = self.model.model.layers, new_residual(kept[lowest].x)
        for i in range(lowest, highest):
            a = layers[i].forward_saving(s, packed, self.model.shared, SaveLevel.INPUT, tile)
            if i > lowest:
                kept[i] = a
        kept[highest] = layers[highest].new_activations(s, self.model.dtype)

    def _make_arena(self, nbytes: int) -> None:
        """An empty arena of at least this size."""
        if self._offload is None or self._offload.nbytes < nbytes:
            self._offload = None  # before there is another
            self._offload = ActivationOffloader(nbytes, self.model.device)
        self._offload.reset()

    def addresses(self) -> list[int]:
        """Where adapters, gradients, dense weights and the arena are: all that a graph does not get copied."""
        tensors = [t for parameters in self._parameters for p in parameters for t in (p, p.grad)]
        tensors += [p.resident for p in self.model.projections() if p.resident is not None]
        return [t.data_ptr() for t in tensors] + [
            0 if self._offload is None else self._offload.address
        ]

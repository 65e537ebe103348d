"""The eager pass: forward and backward of packed samples over all layers, without autograd.

    forward     s = embedding;  s = layer(s) for each layer, which saves the activations of its plan
    loss        computed by the caller, who fills ds, the gradient of the residual stream s
    backward    ds = layer.backward(ds) for each layer from the last;  .grad += dA, dB

A layer saves its activations on the GPU, offloads them to pinned host memory, or saves nothing.
A layer that saves nothing gets its input from the nearest lower layer that saves: all layers
between the two run forward again.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minitune.memory.offload import ActivationOffloader
from minitune.memory.plan import Plan
from minitune.memory.planner import Planner
from minitune.model.activations import Activations, SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.model.layers import new_residual
from minitune.model.loss import LossBuffers
from minitune.model.packed_sequences import PackedSequences
from minitune.model.resident_weights import ResidentWeights

# (s, dresidual, buffers) -> loss; fills dresidual
LossFunction = Callable[[Tensor, Tensor, LossBuffers], Tensor]


class ForwardBackward:
    """The eager forward and backward pass of one model.

    It owns the pinned memory of offloaded activations and the weights that stay dequantised.
    """

    def __init__(self, model: CausalLM, planner: Planner):
        self.model = model
        self.planner = planner
        self._parameters = [layer.lora_parameters() for layer in model.model.layers]
        self._offloader: ActivationOffloader | None = None
        self._resident_weights = ResidentWeights(model.dtype, model.device)

    def run(
        self,
        inputs: Tensor,
        packed: PackedSequences,
        plan: Plan,
        compute_loss: LossFunction,
        dresidual: Tensor | None = None,
        memory_pool: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> Tensor:
        """Add the gradients of the samples to `.grad` and return the loss of `compute_loss`.

        inputs: ids and `tensors()` of the samples, int32 (4 or more, N), on the device.
        dresidual: buffer (N, D + R) for the gradient of the residual stream; None allocates one.
        memory_pool: makes the context that forward and backward run in; the loss runs outside.
        """
        packed = plan.select_attention(packed)
        rows = inputs.shape[1]
        with memory_pool():
            s, saved = self.forward(inputs, packed, plan)
            if dresidual is None:
                dresidual = self.new_residual_gradient(rows)
            buffers = self.model.new_loss_buffers(rows)
        loss = compute_loss(s, dresidual, buffers)
        del s, buffers  # backward uses their memory
        with memory_pool():
            self.backward(dresidual, saved, packed, plan)
        return loss

    def forward(
        self, inputs: Tensor, packed: PackedSequences, plan: Plan
    ) -> tuple[Tensor, list[Activations | None]]:
        """Return the residual stream s (N, D) after the last layer, and each layer's activations.

        The activations of a layer are None if they are offloaded or if the layer saves nothing.
        """
        model = self.model
        saved: list[Activations | None] = []
        s = new_residual(model.model.embed_tokens(inputs[0], model.dtype))
        if plan.host_bytes:
            self._reset_offloader(plan.host_bytes)
            # Reserve one block for all saved activations, so that the allocator splits it and the
            # pool does not fragment.
            torch.empty(plan.saved_bytes, dtype=torch.uint8, device=model.device)
        for i, (layer, layer_plan) in enumerate(zip(model.model.layers, plan.layers, strict=True)):
            if plan.host_bytes:
                self._offloader.wait_until_in_flight(plan.in_flight_limit(i))
            level = max(layer_plan.level, SaveLevel.INPUT)
            a = layer.forward_saving_(s, packed, model.layer_context, level, plan.tile_rows)
            if layer_plan.offloaded:
                self._offloader.offload(i, a)
            stays = not layer_plan.offloaded and layer_plan.level != SaveLevel.NOTHING
            saved.append(a if stays else None)
            del a  # otherwise it lives on while the next layer runs
        if plan.host_bytes:
            self._offloader.wait_until_in_flight(0)
        return s, saved

    def backward(
        self,
        dresidual: Tensor,
        saved: list[Activations | None],
        packed: PackedSequences,
        plan: Plan,
    ) -> None:
        """In place, turn `dresidual` into the gradient of the embedding, and empty `saved`.

        Each layer adds the gradients of its adapters to `.grad`.
        """
        sources = _source_layers(plan)
        for i in reversed(range(len(saved))):
            source = sources[i]
            if saved[source] is None:
                saved[source] = self._offloader.restore(source)
            if i > 0 and saved[sources[i - 1]] is None:
                self._offloader.prefetch(sources[i - 1])
            if saved[i] is None:
                self._recompute_inputs_(saved, source, i, packed, plan.tile_rows)
            gradients = self.model.model.layers[i].backward_(
                dresidual,
                saved.pop(),
                packed,
                self.model.layer_context,
                plan.tile_rows,
                need_dx=i > 0,
            )
            _add_gradients_(self._parameters[i], gradients)
            del gradients  # otherwise they live on while the next layer runs

    def _recompute_inputs_(
        self,
        saved: list[Activations | None],
        source: int,
        last: int,
        packed: PackedSequences,
        tile_rows: int | None,
    ) -> None:
        """Run forward from layer `source` to fill in the inputs of the layers up to `last`."""
        layers, context = self.model.model.layers, self.model.layer_context
        s = new_residual(saved[source].x)
        for i in range(source, last):
            a = layers[i].forward_saving_(s, packed, context, SaveLevel.INPUT, tile_rows)
            if i > source:
                saved[i] = a
        saved[last] = Activations(s.to(self.model.dtype, copy=True))

    # ---- buffers

    def new_residual_gradient(self, rows: int) -> Tensor:
        """Return an empty buffer (rows, D + R) for the gradient of the residual stream."""
        model = self.model
        return model.model.layers[-1].new_residual_gradient(rows, model.dtype, model.device)

    def create_missing_gradients(self) -> None:
        """Give each trainable parameter without a `.grad` a gradient of zeros."""
        for parameters in self._parameters:
            for p in parameters:
                if p.grad is None and p.requires_grad:
                    p.grad = torch.zeros_like(p)

    def allocate_weight_buffers(self) -> None:
        """Allocate the dequantisation buffers that the layers share, if they are missing."""
        model = self.model
        # The last layer's, because the weights of the first layers may be resident.
        last = model.model.layers[-1].fused_linears
        dequantised = [fused for fused in last if fused.resident_weight is None]
        model.layer_context.weight_buffers.allocate(dequantised, model.dtype, model.device)

    def keep_resident(self, layers: int) -> None:
        """Keep the weights of the first `layers` layers dequantised, and release all others."""
        first_layers = self.model.model.layers[:layers]
        self._resident_weights.keep_only(
            fused for layer in first_layers for fused in layer.fused_linears
        )

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that `keep_resident` keeps now."""
        return self._resident_weights.nbytes

    def drop_offloaded(self) -> None:
        """Free the pinned memory and forget the activations in it."""
        self._offloader = None

    def clear(self) -> None:
        """Free the pinned memory and release the resident weights."""
        self.drop_offloaded()
        self.keep_resident(0)

    def _reset_offloader(self, nbytes: int) -> None:
        """Provide an empty arena of at least `nbytes` bytes of pinned memory."""
        if self._offloader is None or self._offloader.nbytes < nbytes:
            self._offloader = None  # free the old arena before the new one is allocated
            self._offloader = ActivationOffloader(nbytes, self.model.device)
        self._offloader.reset()

    def captured_pointers(self) -> list[int]:
        """Return the addresses of all tensors that a CUDA graph reads in place.

        These are the adapters, the gradients of those that are not frozen, the resident weights
        and the pinned arena.
        """
        adapters = [p for parameters in self._parameters for p in parameters]
        tensors = [*adapters, *(p.grad for p in adapters if p.requires_grad)]
        resident = (fused.resident_weight for fused in self.model.fused_linears())
        tensors += [weight for weight in resident if weight is not None]
        arena = 0 if self._offloader is None else self._offloader.address
        return [*(t.data_ptr() for t in tensors), arena]


def _add_gradients_(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add the gradients to the `.grad` of the parameters that are not frozen."""
    pairs = zip(parameters, gradients, strict=True)
    trained = [(p.grad, gradient) for p, gradient in pairs if p.requires_grad]
    if trained:
        sums, terms = zip(*trained, strict=True)
        torch._foreach_add_(sums, terms)


def _source_layers(plan: Plan) -> list[int]:
    """Return for each layer the nearest layer, itself or a lower one, that saves activations."""
    sources: list[int] = []
    for i, layer_plan in enumerate(plan.layers):
        sources.append(sources[-1] if layer_plan.level == SaveLevel.NOTHING else i)
    return sources

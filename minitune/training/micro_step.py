"""A micro-step: loss and gradients of one batch of packed samples.

    pad        ids and positions, to a size that may be captured
    forward    residual stream s (N, D) after the last layer
    loss       final norm, head and cross entropy of the labelled rows of s
    backward   gradients of the adapters, added to `.grad`

A GPU replays forward and backward as CUDA graphs (cuda_graphs.py). They run eagerly
(forward_backward.py) on a CPU, for long micro-steps, and if nothing can be captured any more.

Padding tokens form one more sample, or extend the only sample. No real token attends to them and
they carry no label.
"""

import contextlib

import torch
from torch import Tensor

from minitune.data.batching import Batch
from minitune.device import to_device_async
from minitune.kernels.compile_ahead import finish_compiling
from minitune.memory.planner import Planner
from minitune.model.causal_lm import CausalLM
from minitune.model.loss import LossBuffers, LossRows
from minitune.model.packed_sequences import PackedSequences
from minitune.progress import warn
from minitune.training.cuda_graphs import (
    MAX_CAPTURED_TOKENS,
    CUDAGraphCache,
    bucket_size,
    capture_disabled_reason,
)
from minitune.training.forward_backward import ForwardBackward, LossFunction


class MicroStep:
    """Adds the gradients of a batch to the `.grad` of the adapters, and returns the batch's loss.

    Building the object changes nothing. The first call allocates and measures, as in `prepare`.
    """

    def __init__(self, model: CausalLM, planner: Planner | None = None, capture: bool = True):
        """Build a micro-step of `model`.

        planner: makes the plan of each pass; None takes the model's planner.
        capture: False runs everything eagerly, as a CPU always does.

        Raises: ValueError if the model has no adapter.
        """
        if model.lora is None:
            raise ValueError(
                "the model has no adapter to train; call FastLanguageModel.get_peft_model first"
            )
        self.model = model
        self.planner = planner or model.planner
        self._capture = capture and model.device.type == "cuda"
        self._build_passes()

    def _build_passes(self) -> None:
        """Build the passes over the model's present adapter."""
        self._adapter = self.model.adapters_removed
        self._passes = ForwardBackward(self.model, self.planner)
        self._prepared = False
        self._graphs: CUDAGraphCache | None = None
        if self._capture and capture_disabled_reason() is None:
            self._graphs = CUDAGraphCache(self._passes)

    def prepare(self) -> None:
        """Allocate cuBLAS's workspaces and measure the GPU, once.

        Also wait for the kernels that are being compiled. A run calls this before it plans memory,
        because all this belongs to no step's memory and time. In any case, free the memory that
        `generate` keeps between calls, which a callback may have called too.
        """
        self.model.free_generation_memory()
        if self._adapter != self.model.adapters_removed:  # graphs and passes are of another one
            self.close()
            self._build_passes()
        if self._prepared or self.model.device.type != "cuda":
            return
        self._prepared = True
        finish_compiling()
        with self.model.as_current_device():
            torch.cuda.current_blas_handle()
            self.planner.measure_rates(self.model.device)
            if self._graphs is not None:
                self._graphs.prepare()

    @torch.inference_mode(False)  # buffers and gradients outlive the caller's inference mode
    @torch.no_grad()
    def __call__(self, batch: Batch, denominator: float) -> Tensor:
        """Return the sum of the batch's token losses over `denominator`: 0-dim, on the device.

        denominator: the number of targets of the whole optimizer step.

        Raises: ValueError if an id, a label or a position is out of the model's range.
        """
        model = self.model
        model.check(batch.input_ids, batch.position_ids)
        self.prepare()
        self._drop_disabled_graphs()
        tokens = len(batch.input_ids)
        capture = self._graphs is not None and tokens <= MAX_CAPTURED_TOKENS
        size = bucket_size(tokens) if capture else tokens
        self._passes.create_missing_gradients()

        def compute_loss(s: Tensor, dresidual: Tensor, buffers: LossBuffers) -> Tensor:
            # The host finds the labelled rows here, while the GPU runs the forward pass.
            loss_rows = LossRows.from_labels(
                batch.labels, batch.position_ids, model.config.vocab_size, size
            )
            ds = dresidual[:, : model.config.hidden_size]
            return model.rows_loss(s, loss_rows.to(model.device), denominator, ds, buffers)

        run = self._graphs.run if capture else self._run_eager
        try:
            with (
                model.layer_context.weight_buffers.lock,  # a graph writes into them too
                model.as_current_device(),
            ):
                inputs, packed = self._pack_inputs(batch, size)
                loss = run(inputs, packed, compute_loss)
        except BaseException:
            self._passes.drop_offloaded()  # copies to the host may still be in flight
            raise
        self._drop_disabled_graphs()
        return loss

    def close(self) -> None:
        """Free graphs, pinned memory and resident weights; the next call allocates them again."""
        if self._graphs is not None:
            self._graphs.clear()
        self._passes.clear()

    def memory_pool(self) -> contextlib.AbstractContextManager:
        """Return a context that allocates from the graphs' pool, if there is a pool."""
        return contextlib.nullcontext() if self._graphs is None else self._graphs.memory_pool()

    def _run_eager(
        self, inputs: Tensor, packed: PackedSequences, compute_loss: LossFunction
    ) -> Tensor:
        """Run both passes eagerly, without graphs and resident weights in memory."""
        if self._graphs is not None:
            self._graphs.clear()
            self._passes.keep_resident(0)
        plan = self.planner.plan_for(self.model, packed)
        return self._passes.run(inputs, packed, plan, compute_loss)

    def _drop_disabled_graphs(self) -> None:
        """Run eagerly from now on if nothing can be captured any more."""
        if self._graphs is None or self._graphs.disabled_reason is None:
            return
        reason = self._graphs.disabled_reason
        self._graphs = None
        self._passes.clear()
        warn(f"launching without CUDA graphs from now on: {reason}", stacklevel=3)

    def _pack_inputs(self, batch: Batch, size: int) -> tuple[Tensor, PackedSequences]:
        """Pad the batch to `size` tokens and copy it to the device.

        Returns ids and the tensors of the samples, int32 (4 or more, size), and the samples as
        views of them.
        """
        ids, positions = _pad_batch(batch, size, self.model.max_seq_length)
        host = PackedSequences.from_positions(positions, self.model.windows)
        inputs = to_device_async(torch.stack([ids.int(), *host.tensors()]), self.model.device)
        return inputs, host.of_tensors(inputs[1:])


def _pad_batch(batch: Batch, size: int, max_seq_length: int) -> tuple[Tensor, Tensor]:
    """Return ids and positions (size,); all positions are below `max_seq_length`."""
    ids, positions = batch.input_ids, batch.position_ids
    count = size - len(ids)
    if count == 0:
        return ids, positions
    single_sample = not positions[1:].eq(0).any()
    if single_sample and size <= max_seq_length:
        padding = torch.arange(len(ids), size)
    else:
        padding = torch.arange(count) % max_seq_length
    return torch.cat([ids, ids.new_zeros(count)]), torch.cat([positions, padding])

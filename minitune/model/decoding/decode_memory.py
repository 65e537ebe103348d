"""The memory of the decode engine, which stays between calls: cache, buffers, weights, graphs.

The cache grows to the largest call so far, within the budget. The weights are built again only if
the model has other weights or adapters than before. The values of the adapters are read at each
call, because no counter shows every change of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitune.device import free_memory, gib_text
from minitune.kernels.backend import power_of_two
from minitune.model.adapter_switch import Adapter
from minitune.model.decoding.cpu_weights import CpuWeights
from minitune.model.decoding.decode_graphs import DecodeGraphs
from minitune.model.decoding.decode_step import StepBuffers, StepInputs, decode_step
from minitune.model.decoding.kv_cache import KVCache, NoCacheRoom, cache_pages, pages_for
from minitune.model.decoding.requests import Request
from minitune.model.decoding.step_weights import BASE, MAX_FEW_ROWS, StepWeights, new_step_weights
from minitune.model.loss import Head
from minitune.model.unchanged_tensors import KnownTensors


class DecodeMemory:
    """What the calls of one model share.

    weights: the weights of the steps; None dequantises each layer at each step.
    adapter_of_row: int32 (slots,), for the weights, as in `new_step_weights`.
    """

    cache: KVCache
    buffers: StepBuffers
    head: Head  # in the compute dtype

    def __init__(self, captures: bool):
        """Begin without memory.

        captures: True if steps on a GPU may become CUDA graphs.
        """
        self.weights: StepWeights | None = None
        self.adapter_of_row = torch.empty(0, dtype=torch.int32)
        self._captures = captures
        self._graphs: DecodeGraphs | None = None
        self._pages = 0
        self._weights_of: KnownTensors | None = None  # the tensors that gave the weights
        self._adapters: Sequence[Adapter] = ()  # that the weights know
        self._parameters = KnownTensors(())  # A and B of these adapters
        self._head_of: KnownTensors | None = None

    # ---- the cache

    def reserve(
        self, model, requests: Sequence[Request], cache_memory: int | None, max_rows: int
    ) -> int:
        """Provide a cache for a call, and return the number of its pages that the call may use.

        cache_memory: bytes of the cache; None is half of the free memory at most.

        Raises: NoCacheRoom if the budget has no room for a request.
        """
        page_nbytes = KVCache.page_nbytes(model.config, model.dtype)
        nbytes = cache_memory
        if nbytes is None:
            nbytes = (free_memory(model.device) + self._pages * page_nbytes) // 2
        budget = nbytes // page_nbytes
        _check_budget(requests, budget, page_nbytes, cache_memory)
        wanted = min(cache_pages(_needed_pages(requests, max_rows)), budget)
        if not wanted <= self._pages <= budget or self.cache.slots < max_rows:
            self._allocate(model, wanted, max(max_rows, MAX_FEW_ROWS))
        return self._pages

    def _allocate(self, model, pages: int, slots: int) -> None:
        """Allocate a cache of `pages` pages, after freeing the one before."""
        if self._pages:
            self._pages, self._graphs = 0, None
            del self.cache, self.buffers
        if len(self.adapter_of_row) < slots:
            self._weights_of = self.weights = None  # they read the tensor
            self.adapter_of_row = torch.full((slots,), BASE, dtype=torch.int32).to(model.device)
        c, width = model.config, pages_for(model.max_seq_length)
        self.cache = KVCache(c, pages, slots, width, model.dtype, model.device)
        self.buffers = StepBuffers(self.cache, c.vocab_size, self.adapter_of_row)
        self._pages = pages

    # ---- the weights

    def prepare_weights(
        self, model, adapters: Sequence[Adapter], max_rows: int
    ) -> Sequence[Adapter]:
        """Build the head and the weights of steps, unless they are those of the model already.

        Return the adapters that the weights know: those of the call, or more that an earlier call
        named, so that calls with and without an adapter may take turns.

        adapters: the adapters that rows may use, none of them empty.
        """
        self._prepare_head(model)
        if max_rows > MAX_FEW_ROWS:
            self._weights_of = self.weights = self._graphs = None
            return adapters
        frozen = [tensor for _, linear in model.linears() for tensor in linear.frozen_tensors()]
        frozen += [p for name, p in model.named_parameters() if ".lora_" not in name]
        known = self._weights_of
        kept = self.weights is not None and known is not None and known.are(frozen)
        if not self._parameters.are(_parameters(self._adapters)):  # one of them was replaced
            self._adapters = ()
        if kept and all(adapter in self._adapters for adapter in adapters):
            self.weights.refresh_()
        elif kept and isinstance(self.weights, CpuWeights):
            self.weights.use_adapters_(adapters)
            self._adapters = adapters
        else:
            self._weights_of = self.weights = self._graphs = None  # frees their memory
            weights = new_step_weights(model, adapters, self.adapter_of_row, self.head.weight)
            self.weights, self._weights_of = weights, KnownTensors(frozen)
            self._adapters = adapters
        # Their values are read at each call.
        self._parameters = KnownTensors(_parameters(self._adapters), counts_changes=False)
        return self._adapters

    def _prepare_head(self, model) -> None:
        """Keep a head in the compute dtype."""
        tensors = model.lm_head.frozen_tensors()
        if self._head_of is None or not self._head_of.are(tensors):
            self._head_of = self._weights_of = self._graphs = None
            self.head = model.head()
            self._head_of = KnownTensors(tensors)

    # ---- a step

    def step_(self, model, rows: int, width: int) -> None:
        """Run a step of the first slots, and write their logits to `buffers.logits`.

        width: columns of the page table that the rows may use.
        """

        def write_logits(rows: int) -> None:
            inputs = self.buffers.inputs(rows, width)
            self.buffers.logits[:rows] = self.logits(model, inputs)

        if self.weights is None or not self._captures or model.device.type != "cuda":
            write_logits(rows)
            return
        if self._graphs is None:
            self._graphs = DecodeGraphs()
        bucket = power_of_two(rows)
        self._graphs.run((bucket, width), lambda: write_logits(bucket), model.device)

    def logits(self, model, inputs: StepInputs) -> Tensor:
        """Return the logits (rows, V) behind the tokens of some rows, in float32."""
        return decode_step(model, self.cache, inputs, self.head, self.weights)


def _parameters(adapters: Sequence[Adapter]) -> list[Tensor]:
    """Return A and B of adapters."""
    branches = (branch for adapter in adapters for branch in adapter.values())
    return [x.weight for branch in branches for x in (branch.lora_A, branch.lora_B)]


def _needed_pages(requests: Sequence[Request], max_rows: int) -> int:
    """Return the pages of the longest `max_rows` requests, of a shared prompt, and page 0."""
    pages = sorted((pages_for(request.tokens) for request in requests), reverse=True)
    prompt = pages_for(max(len(request.prompt) for request in requests))
    return 1 + sum(pages[:max_rows]) + (prompt if len(requests) > 1 else 0)


def _check_budget(
    requests: Sequence[Request], budget: int, page_nbytes: int, cache_memory: int | None
) -> None:
    """Raise NoCacheRoom if a budget of `budget` pages has no room for a request.

    cache_memory: the bytes that the caller gave; None for the default.
    """
    longest = max(request.tokens for request in requests)
    needed = pages_for(longest) + 1
    if needed <= budget:
        return
    room, remedy = "half of the free memory is", "lower max_new_tokens, or free memory"
    if cache_memory is not None:
        room, remedy = "cache_memory is", "raise cache_memory, or lower max_new_tokens"
    raise NoCacheRoom(
        f"the keys and values of a prompt and its answer, up to {longest:,} tokens, need "
        f"{_size(needed * page_nbytes)}, but {room} {_size(budget * page_nbytes)}; {remedy}"
    )


def _size(nbytes: int) -> str:
    """Return a number of bytes in GiB, or a small one in MiB."""
    return gib_text(nbytes) if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):,.1f} MiB"

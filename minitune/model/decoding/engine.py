"""The decode engine of a model: the state that its calls share, and the room that a call needs.

decode_call.py runs a call. The cache grows to the largest call so far, within the budget.
"""

import threading
from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch

from minitune.device import free_memory, gib_text
from minitune.model.adapter_switch import Adapter, own_adapter
from minitune.model.decoding.decode_call import DecodeCall, OnToken
from minitune.model.decoding.kv_cache import KVCache, PagePool, pages_for, rounded_pages
from minitune.model.decoding.requests import Answer, Request
from minitune.model.decoding.schedule import Schedule
from minitune.model.sampling import SamplingConfig

MAX_ROWS = 64  # sequences that run at a time, by default


def decode(model, requests: Sequence[Request], config: SamplingConfig, **arguments) -> list[Answer]:
    """Return the answer to each request, as `DecodeEngine.run`, with the engine of the model."""
    return model.decode_engine.run(model, requests, config, **arguments)


class DecodeEngine:
    """The state that stays between the calls of one model: the cache of keys and values.

    One call runs at a time; other threads wait. A call from within a call, as from `on_token`, has
    an engine of its own.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._is_running = False
        self._cache: KVCache | None = None

    def __reduce__(self):
        """Copy and pickle as an engine without state; a lock cannot be copied."""
        return DecodeEngine, ()

    def free(self) -> None:
        """Free everything that stays between calls, except in the midst of one."""
        with self._lock:
            if not self._is_running:
                self._cache = None

    @torch.inference_mode(False)  # the cache outlives the caller's inference mode
    @torch.no_grad()
    def run(
        self,
        model,
        requests: Sequence[Request],
        config: SamplingConfig,
        *,
        end_tokens: Collection[int] = (),
        on_token: OnToken | None = None,
        logprobs: bool = False,
        adapters: Sequence[Adapter] | None = None,
        cache_memory: int | None = None,
        max_rows: int = MAX_ROWS,
        keep: bool = True,
    ) -> list[Answer]:
        """Return the answer to each request.

        requests: each prompt and its answer fit into the model's max_seq_length.
        on_token: called as on_token(i, token) for each new token of request i; the answer ends if
            it returns True.
        logprobs: return log-probabilities too.
        adapters: the adapters that requests may name; None is that of the model.
        cache_memory: bytes of the key/value cache; None is half of the free memory at most.
        max_rows: sequences that run at a time.
        keep: keep the cache for the next call, and the weights dequantised meanwhile.

        Raises: ValueError if the cache has no room for a request; LogitsNotFinite if the logits of
            a token are not finite.
        """
        with self._lock:
            engine = self if keep and not self._is_running else DecodeEngine()
            engine._is_running = True
            weights = model.resident_weights_if_they_fit() if keep else nullcontext()
            try:
                with weights, model.as_current_device():
                    cache, pages = engine._room(model, requests, cache_memory, max_rows)
                    schedule = Schedule(requests, PagePool(pages), max_rows, logprobs)
                    adapters = [own_adapter(model)] if adapters is None else adapters
                    call = DecodeCall(
                        model, cache, schedule, adapters, config, logprobs, end_tokens
                    )
                    return call.run(on_token)
            finally:
                engine._is_running = False

    def _room(
        self, model, requests: Sequence[Request], cache_memory: int | None, max_rows: int
    ) -> tuple[KVCache, int]:
        """Return a cache for a call, and the number of its pages that the call may use.

        Raises: ValueError if the budget has no room for a request.
        """
        page_nbytes = KVCache.page_nbytes(model.config, model.dtype)
        held = 0 if self._cache is None else self._cache.pages * page_nbytes
        given = cache_memory is not None
        nbytes = cache_memory if given else (free_memory(model.device) + held) // 2
        budget = nbytes // page_nbytes
        longest = max(request.tokens for request in requests)
        if pages_for(longest) + 1 > budget:
            least = gib_text((pages_for(longest) + 1) * page_nbytes)
            remedy = (
                "raise cache_memory, or lower max_new_tokens"
                if given
                else ("lower max_new_tokens, or free memory")
            )
            raise ValueError(
                f"a prompt and its answer of {longest:,} tokens need {least} of keys and values, "
                f"but {'cache_memory is' if given else 'half of the free memory is'} "
                f"{gib_text(nbytes)}; {remedy}"
            )
        wanted = min(rounded_pages(_needed_pages(requests, max_rows)), budget)
        fits = self._cache is not None and self._cache.slots >= max_rows
        if not fits or self._cache.pages < wanted or self._cache.pages > budget:
            self._cache = None  # frees its memory before the new one is allocated
            width = pages_for(model.max_seq_length)
            slots = max(max_rows, MAX_ROWS)
            self._cache = KVCache(model.config, wanted, slots, width, model.dtype, model.device)
        return self._cache, min(self._cache.pages, budget)


def _needed_pages(requests: Sequence[Request], max_rows: int) -> int:
    """Return the pages of the longest `max_rows` requests, with page 0 and a shared prompt."""
    pages = sorted((pages_for(request.tokens) for request in requests), reverse=True)
    prompt = pages_for(max(len(request.prompt) for request in requests))
    return 1 + sum(pages[:max_rows]) + (prompt if len(requests) > 1 else 0)

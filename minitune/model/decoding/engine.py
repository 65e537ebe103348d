"""The decode engine of a model: one call at a time, over memory that stays between the calls."""

import threading
from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch

from minitune.model.adapter_switch import Adapter, own_adapter
from minitune.model.decoding.decode_call import DecodeCall, OnToken
from minitune.model.decoding.decode_memory import DecodeMemory
from minitune.model.decoding.kv_cache import PagePool
from minitune.model.decoding.requests import Answer, Request
from minitune.model.decoding.schedule import Schedule
from minitune.model.decoding.step_weights import BASE, MAX_FEW_ROWS
from minitune.model.sampling import Sampler, SamplingConfig


def decode(model, requests: Sequence[Request], config: SamplingConfig, **arguments) -> list[Answer]:
    """Return the answer to each request, as `DecodeEngine.run`, with the engine of the model."""
    return model.decode_engine.run(model, requests, config, **arguments)


class DecodeEngine:
    """The engine of one model, which does not refer to the model itself.

    One call runs at a time; other threads wait. A call from within a call, as from `on_token`, has
    an engine of its own.
    """

    def __init__(self, captures: bool = True):
        """Begin without memory.

        captures: True if steps on a GPU may become CUDA graphs.
        """
        self._lock = threading.RLock()
        self._is_running, self._captures = False, captures
        self._memory: DecodeMemory | None = None

    def __reduce__(self):
        """Copy and pickle as an engine without state; a lock cannot be copied."""
        return DecodeEngine, ()

    def free(self) -> None:
        """Free everything that stays between calls, except in the midst of one."""
        with self._lock:
            if self._memory is not None and not self._is_running:
                self._memory = None
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()  # the graphs' pool is of no use to others

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
        max_rows: int = MAX_FEW_ROWS,
        keep: bool = True,
    ) -> list[Answer]:
        """Return the answer to each request.

        requests: each prompt and its answer fit into the model's max_seq_length.
        on_token: called as on_token(i, token) for each new token of request i; the answer ends if
            it returns True.
        logprobs: return log-probabilities too.
        adapters: the adapters that requests may name; None is that of the model.
        cache_memory: bytes of the key/value cache; None is half of the free memory at most.
        max_rows: sequences that run at a time. More than MAX_FEW_ROWS take dequantised weights.
        keep: keep cache, weights and CUDA graphs for the next call; otherwise nothing is captured
            and nothing stays.

        Raises: NoCacheRoom if the cache has no room for a request; LogitsNotFinite if the logits of
            a token are not finite.
        """
        with self._lock:
            engine = self if keep and not self._is_running else DecodeEngine(captures=False)
            engine._is_running = True
            try:
                with model.as_current_device():
                    memory = engine._memory or DecodeMemory(engine._captures)
                    engine._memory = memory
                    pages = memory.reserve(model, requests, cache_memory, max_rows)
                    given = [own_adapter(model)] if adapters is None else adapters
                    used = memory.prepare_weights(model, _distinct(given), max_rows)
                    index_of = [used.index(x) if x else BASE for x in given]
                    schedule = Schedule(requests, PagePool(pages), max_rows, logprobs)
                    vocab, device = model.config.vocab_size, model.device
                    sampler = Sampler(config, max_rows, vocab, device, logprobs, end_tokens)
                    is_slow = memory.weights is None and keep
                    with model.resident_weights_if_they_fit() if is_slow else nullcontext():
                        call = DecodeCall(model, memory, schedule, sampler, used, index_of)
                        return call.run(end_tokens, on_token)
            except (torch.OutOfMemoryError, MemoryError):
                engine._memory = None
                raise
            finally:
                engine._is_running = False


def _distinct(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters that are not the base, each once."""
    distinct: list[Adapter] = []
    for adapter in adapters:
        if adapter and adapter not in distinct:
            distinct.append(adapter)
    return distinct

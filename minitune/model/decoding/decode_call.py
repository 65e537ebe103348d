"""One call of the decode engine: continuous batching over the slots of a cache.

The active sequences occupy the slots from 0 on. One round

1. prefills waiting prompts for the free slots, which gives the logits behind these prompts,
2. chooses a token for each sequence, and fetches all tokens in a single copy,
3. ends sequences; the last active one moves into each slot that becomes free,
4. runs a decode step for the others, which gives the logits behind their tokens.

A GPU begins the step before the host has the tokens, so that it need not wait for the host. The
step of a sequence that has ended is wasted then. It writes to the sequence's own pages only.

A sequence is admitted if the cache has room for its prompt and its longest answer, so no sequence
runs out of room later.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from minitune.kernels.sample_tokens import Chosen
from minitune.model.adapter_switch import Adapter, own_adapter, switched_adapter
from minitune.model.decoding.decode_memory import DecodeMemory
from minitune.model.decoding.decode_step import float_logits
from minitune.model.decoding.kv_cache import table_width
from minitune.model.decoding.prefill import pads, prefill, prefill_batches
from minitune.model.decoding.requests import Answer
from minitune.model.decoding.schedule import Admission, PromptGroup, Schedule
from minitune.model.decoding.step_weights import BASE, PassWeights
from minitune.model.sampling import LogitsNotFinite, Sampler

OnToken = Callable[[int, int], bool | None]


def steps_begin_early(device: torch.device) -> bool:
    """Return True if a step begins before the host has the tokens that it reads."""
    return device.type == "cuda"


class FetchedTokens:
    """Tokens on their way to the host, in one copy that nothing but `wait` waits for."""

    def __init__(self, chosen: Chosen):
        columns = [chosen.tokens, chosen.finite]
        if chosen.logprobs is not None:
            columns.append(chosen.logprobs)
        rows = torch.stack([column.double() for column in columns])  # float64 holds every token
        self._event = None
        if rows.is_cuda:
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            rows = host.copy_(rows, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._rows = rows

    def wait(self) -> tuple[list[int], list[float] | None, bool]:
        """Return tokens, log-probabilities (or None), and True if all logits were finite."""
        if self._event is not None:
            self._event.synchronize()
        tokens, finite, *logprobs = self._rows.tolist()
        return list(map(int, tokens)), logprobs[0] if logprobs else None, all(finite)


class DecodeCall:
    """A running call."""

    def __init__(
        self,
        model,
        memory: DecodeMemory,
        schedule: Schedule,
        sampler: Sampler,
        adapters: Sequence[Adapter],
        index_of: Sequence[int],
    ):
        """Build a call over an empty cache.

        adapters: the adapters that the weights of the memory know.
        index_of: for each adapter that requests name, the index in `adapters`, or BASE.
        """
        self._model, self._memory, self._cache = model, memory, memory.cache
        self._schedule, self._sampler = schedule, sampler
        self._adapters, self._index_of = adapters, index_of
        self._logits = memory.buffers.logits
        own = own_adapter(model)
        self._own = BASE if not own else adapters.index(own) if own in adapters else None
        self._width = min(table_width(schedule.most_pages), self._cache.width)

    def run(self, end_tokens: Collection[int], on_token: OnToken | None) -> list[Answer]:
        """Return the answers, in the order of the requests.

        Raises: LogitsNotFinite if the logits of a sequence are not finite.
        """
        begins_early = steps_begin_early(self._model.device)
        try:
            while True:
                is_changed = self._admit()
                active = self._schedule.active
                if not active:
                    return self._schedule.answers
                if is_changed:
                    self._fill_buffers()
                chosen = self._sampler.choose(self._logits[: len(active)])
                self._memory.buffers.advance_(chosen.tokens)
                fetched = FetchedTokens(chosen)
                is_ahead = begins_early and any(x.tokens_left > 1 for x in active)
                if is_ahead:
                    self._step()
                ended = self._record(fetched, end_tokens, on_token)
                for slot in reversed(ended):
                    self._end(slot, is_ahead)
                if ended:
                    self._fill_buffers()
                if active and not is_ahead:
                    self._step()
        finally:
            self._cache.clear()

    def _step(self) -> None:
        """Write the logits behind the last token of each active sequence."""
        memory, active = self._memory, self._schedule.active
        if memory.weights is not None:
            memory.step_(self._model, len(active), self._width)
            return
        inputs = memory.buffers.inputs(len(active), self._width)
        for index in {self._index_of[sequence.request.adapter] for sequence in active}:
            slots = [i for i, x in enumerate(active) if self._index_of[x.request.adapter] == index]
            with self._switched(index):
                self._logits[slots] = memory.logits(self._model, inputs.select(slots))

    def _switched(self, index: int) -> AbstractContextManager:
        """Return a context in which the model has one of the adapters, or none for BASE."""
        if index == self._own:
            return nullcontext()
        return switched_adapter(self._model, self._adapter(index))

    def _adapter(self, index: int) -> Adapter:
        """Return one of the adapters, or none for BASE."""
        return {} if index == BASE else self._adapters[index]

    def _admit(self) -> bool:
        """Admit waiting requests, with the logits behind their prompts; return False if none."""
        first = len(self._schedule.active)
        admission = self._schedule.admit()
        if not admission.sequences:
            return False
        self._prefill(admission)
        for source, target in admission.copies:
            self._cache.copy_page(source, target)
        for slot, sequence in enumerate(admission.sequences, first):
            self._cache.assign(slot, sequence.pages)
            self._sampler.admit(slot, sequence.request.prompt, sequence.request.seed)
            self._logits[slot] = sequence.group.logits
        for sequence in admission.sequences:
            if not sequence.group.waiting:
                sequence.group.logits = None  # frees their memory
        return True

    def _prefill(self, admission: Admission) -> None:
        """Prefill the new groups of an admission, adapter by adapter."""
        by_adapter: dict[int, list] = {}
        for group, pages in admission.prefills:
            by_adapter.setdefault(self._index_of[group.adapter], []).append((group, pages))
        for index, prefills in by_adapter.items():
            weights = self._memory.weights
            if weights is not None:
                weights = weights.prefill_weights(self._adapter(index))
            with self._switched(index):
                lengths = [len(group.prompt) for group, _ in prefills]
                for some in prefill_batches(lengths, pads(self._model.device)):
                    self._prefill_pass(prefills[some], weights)

    def _prefill_pass(
        self,
        prefills: Sequence[tuple[PromptGroup, list[int]]],
        weights: PassWeights | None,
    ) -> None:
        """Prefill some groups in one pass with these weights."""
        prompts, pages = [group.prompt for group, _ in prefills], [pages for _, pages in prefills]
        s = prefill(self._model, self._cache, prompts, pages, weights)
        found = float_logits(self._memory.head, s, self._memory.weights)
        for (group, _), logits in zip(prefills, found, strict=True):
            group.logits = logits

    def _record(
        self, fetched: FetchedTokens, end_tokens: Collection[int], on_token: OnToken | None
    ) -> list[int]:
        """Add the tokens to the answers, and return the slots of the complete ones."""
        tokens, logprobs, is_finite = fetched.wait()
        if not is_finite:
            raise LogitsNotFinite.on(self._model.device)
        ended = []
        for slot, (sequence, token) in enumerate(zip(self._schedule.active, tokens, strict=True)):
            answer = sequence.answer
            answer.tokens.append(token)
            if logprobs is not None:
                answer.logprobs.append(logprobs[slot])
            stops = on_token is not None and on_token(sequence.index, token) is True
            if stops or token in end_tokens or not sequence.tokens_left:
                ended.append(slot)
        return ended

    def _end(self, slot: int, is_ahead: bool) -> None:
        """End the sequence of a slot; the last active sequence takes the slot.

        is_ahead: True if its next logits are computed already.
        """
        last = self._schedule.end(slot)
        if last == slot:
            self._cache.assign(slot, ())
            return
        self._cache.move(last, slot)
        self._sampler.move(last, slot)
        if is_ahead:
            self._logits[slot] = self._logits[last]

    def _fill_buffers(self) -> None:
        """Write the inputs of all slots anew, each at the last token that its sequence has."""
        active = self._schedule.active
        self._cache.upload()
        self._memory.buffers.fill_(
            [sequence.last_token for sequence in active],
            [sequence.position for sequence in active],
            [self._index_of[sequence.request.adapter] for sequence in active],
        )

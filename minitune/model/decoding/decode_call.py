"""One call of the decode engine: continuous batching over the slots of a cache.

The active sequences occupy the slots from 0 on. One round

1. runs a decode step for the active sequences, which gives the logits behind their last tokens,
2. prefills waiting prompts for the free slots, which gives the logits behind these prompts,
3. chooses a token for each sequence, and fetches all tokens in a single copy,
4. ends sequences; the last active one moves into each slot that becomes free.

A sequence is admitted if the cache has room for its prompt and its longest answer, so no sequence
runs out of room later.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from minitune.model.adapter_switch import Adapter, switched_adapter
from minitune.model.decoding.decode_memory import DecodeMemory
from minitune.model.decoding.decode_step import float_logits
from minitune.model.decoding.kv_cache import rounded_pages
from minitune.model.decoding.prefill import prefill, prefill_batches
from minitune.model.decoding.schedule import Admission, PromptGroup, Schedule
from minitune.model.decoding.step_weights import BASE
from minitune.model.sampling import LogitsNotFinite, Sampler

OnToken = Callable[[int, int], bool | None]


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
        self._width = min(rounded_pages(schedule.most_pages), self._cache.width)

    def run(self, end_tokens: Collection[int], on_token: OnToken | None) -> list:
        """Return the answers, in the order of the requests."""
        try:
            while True:
                stepped = len(self._schedule.active)
                if stepped:
                    self._step()
                self._admit()
                if not self._schedule.active:
                    return self._schedule.answers
                self._choose(stepped, end_tokens, on_token)
        finally:
            self._cache.clear()

    def _step(self) -> None:
        """Write the logits behind the last token of each active sequence."""
        memory, active = self._memory, self._schedule.active
        if memory.weights is not None:
            memory.step_(self._model, len(active), self._width)
            return
        used = sorted({self._index_of[sequence.request.adapter] for sequence in active})
        inputs = memory.buffers.inputs(len(active), self._width)
        for index in used:
            slots = [i for i, x in enumerate(active) if self._index_of[x.request.adapter] == index]
            with self._switched(index):
                logits = memory.logits(self._model, inputs.select(slots), None)
            self._logits[slots] = logits

    def _switched(self, index: int) -> AbstractContextManager:
        """Return a context in which the model has one of the adapters, or none for BASE."""
        return switched_adapter(self._model, {} if index == BASE else self._adapters[index])

    def _admit(self) -> None:
        """Admit waiting requests, with their logits behind the prompt."""
        first = len(self._schedule.active)
        admission = self._schedule.admit()
        if not admission.sequences:
            return
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

    def _prefill(self, admission: Admission) -> None:
        """Prefill the new groups of an admission, adapter by adapter."""
        by_adapter: dict[int, list] = {}
        for group, pages in admission.prefills:
            by_adapter.setdefault(self._index_of[group.adapter], []).append((group, pages))
        for index, prefills in by_adapter.items():
            with self._switched(index):
                for some in prefill_batches([len(group.prompt) for group, _ in prefills]):
                    self._prefill_pass(prefills[some])

    def _prefill_pass(self, prefills: Sequence[tuple[PromptGroup, list[int]]]) -> None:
        """Prefill some groups in one pass."""
        prompts, pages = [group.prompt for group, _ in prefills], [pages for _, pages in prefills]
        s = prefill(self._model, self._cache, prompts, pages)
        found = float_logits(self._memory.head, s, self._memory.weights)
        for (group, _), logits in zip(prefills, found, strict=True):
            group.logits = logits

    def _choose(self, stepped: int, end_tokens: Collection[int], on_token: OnToken | None) -> None:
        """Choose a token for each active sequence, and end the complete sequences.

        stepped: number of sequences that took part in the step.

        Raises: LogitsNotFinite if the logits of a sequence are not finite.
        """
        active = self._schedule.active
        chosen = self._sampler.choose(self._logits[: len(active)])
        tokens, finite = torch.stack([chosen.tokens, chosen.finite.long()]).tolist()
        if not all(finite):
            raise LogitsNotFinite.on(self._model.device)
        logprobs = chosen.logprobs.tolist() if chosen.logprobs is not None else None
        ended = []
        for slot, (sequence, token) in enumerate(zip(active, tokens, strict=True)):
            answer = sequence.answer
            answer.tokens.append(token)
            if logprobs is not None:
                answer.logprobs.append(logprobs[slot])
            stops = on_token is not None and on_token(sequence.index, token) is True
            if stops or token in end_tokens or len(answer.tokens) == sequence.request.limit:
                ended.append(slot)
        for slot in reversed(ended):
            self._end(slot)
        self._advance(chosen.tokens, is_same=stepped == len(active) and not ended)

    def _end(self, slot: int) -> None:
        """End the sequence of a slot; the last active sequence takes the slot."""
        last = self._schedule.end(slot)
        if last == slot:
            self._cache.assign(slot, ())
        else:
            self._cache.move(last, slot)
            self._sampler.move(last, slot)

    def _advance(self, tokens: Tensor, is_same: bool) -> None:
        """Make the chosen tokens the input of the next step.

        is_same: True if the slots hold the sequences of the step before.
        """
        if is_same:
            self._memory.buffers.advance_(tokens)
            return
        self._cache.upload()
        active = self._schedule.active
        self._memory.buffers.fill_(
            [sequence.answer.tokens[-1] for sequence in active],
            [sequence.position for sequence in active],
            [self._index_of[sequence.request.adapter] for sequence in active],
        )

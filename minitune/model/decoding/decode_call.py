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

import torch
from torch import Tensor

from minitune.model.adapter_switch import Adapter, switched_adapter
from minitune.model.decoding.decode_step import StepInputs, decode_step, float_logits
from minitune.model.decoding.kv_cache import KVCache, rounded_pages
from minitune.model.decoding.prefill import prefill, prefill_batches
from minitune.model.decoding.schedule import Admission, PromptGroup, Schedule
from minitune.model.sampling import LogitsNotFinite, Sampler, SamplingConfig

OnToken = Callable[[int, int], bool | None]


class DecodeCall:
    """A running call."""

    def __init__(
        self,
        model,
        cache: KVCache,
        schedule: Schedule,
        adapters: Sequence[Adapter],
        config: SamplingConfig,
        logprobs: bool,
        end_tokens: Collection[int],
    ):
        self._model, self._cache, self._schedule = model, cache, schedule
        self._adapters, self._head = adapters, model.head()
        vocab = model.config.vocab_size
        slots = schedule.slots
        self._end_tokens = end_tokens
        self._sampler = Sampler(config, slots, vocab, model.device, logprobs, end_tokens)
        self._logits = torch.empty((slots, vocab), dtype=torch.float32, device=model.device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self._positions = torch.zeros(slots, dtype=torch.int32, device=model.device)
        self._width = min(rounded_pages(schedule.most_pages), cache.width)

    def run(self, on_token: OnToken | None) -> list:
        """Return the answers, in the order of the requests."""
        try:
            while True:
                stepped = len(self._schedule.active)
                if stepped:
                    self._logits[:stepped] = self._step()
                self._admit()
                if not self._schedule.active:
                    return self._schedule.answers
                self._choose(stepped, on_token)
        finally:
            self._cache.clear()

    def _step(self) -> Tensor:
        """Return the logits (rows, V) behind the last token of each active sequence."""
        active = self._schedule.active
        table = self._cache.page_table[:, : self._width]
        inputs = StepInputs(self._tokens, self._positions, table).select(slice(len(active)))
        used = sorted({sequence.request.adapter for sequence in active})
        if len(used) == 1:
            return self._step_with(used[0], inputs)
        logits = self._logits[: len(active)]
        for adapter in used:
            slots = [i for i, x in enumerate(active) if x.request.adapter == adapter]
            logits[slots] = self._step_with(adapter, inputs.select(slots))
        return logits

    def _step_with(self, adapter: int, inputs: StepInputs) -> Tensor:
        """Return the logits of some rows, which all use one adapter."""
        with switched_adapter(self._model, self._adapters[adapter]):
            return decode_step(self._model, self._cache, inputs, self._head)

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
        for adapter in sorted({group.adapter for group, _ in admission.prefills}):
            of_adapter = [x for x in admission.prefills if x[0].adapter == adapter]
            with switched_adapter(self._model, self._adapters[adapter]):
                for some in prefill_batches([len(group.prompt) for group, _ in of_adapter]):
                    self._prefill_pass(of_adapter[some])

    def _prefill_pass(self, prefills: Sequence[tuple[PromptGroup, list[int]]]) -> None:
        """Prefill some groups in one pass."""
        prompts, pages = [group.prompt for group, _ in prefills], [pages for _, pages in prefills]
        s = prefill(self._model, self._cache, prompts, pages)
        for (group, _), logits in zip(prefills, float_logits(self._head, s), strict=True):
            group.logits = logits

    def _choose(self, stepped: int, on_token: OnToken | None) -> None:
        """Choose a token for each active sequence, and end the complete sequences.

        stepped: number of sequences that took part in the step.

        Raises: LogitsNotFinite if the logits of a sequence are not finite.
        """
        active = self._schedule.active
        logits = self._logits[: len(active)]
        chosen = self._sampler.choose(logits)
        tokens, finite = torch.stack([chosen.tokens, chosen.finite.long()]).tolist()
        if not all(finite):
            raise LogitsNotFinite.on(logits.device)
        logprobs = chosen.logprobs.tolist() if chosen.logprobs is not None else None
        ended = []
        for slot, (sequence, token) in enumerate(zip(active, tokens, strict=True)):
            answer = sequence.answer
            answer.tokens.append(token)
            if logprobs is not None:
                answer.logprobs.append(logprobs[slot])
            stops = on_token is not None and on_token(sequence.index, token) is True
            if stops or token in self._end_tokens or len(answer.tokens) == sequence.request.limit:
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
            self._tokens[: len(tokens)] = tokens
            self._positions[: len(tokens)] += 1
            return
        self._cache.upload()
        self._tokens.zero_()
        self._positions.zero_()
        active = self._schedule.active
        last_tokens = [sequence.answer.tokens[-1] for sequence in active]
        self._tokens[: len(active)] = torch.tensor(last_tokens, dtype=torch.int64)
        positions = [sequence.position for sequence in active]
        self._positions[: len(active)] = torch.tensor(positions, dtype=torch.int32)

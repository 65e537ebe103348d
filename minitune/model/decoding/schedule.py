"""The schedule of a call: which request is in which slot, with which pages.

Everything here is on the host. The caller does what `admit` tells: prefill, then copies of pages.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minitune.model.decoding.kv_cache import PAGE, PagePool, pages_for
from minitune.model.decoding.requests import Answer, Request


@dataclass
class PromptGroup:
    """The requests with one prompt and one adapter, which share a prefill.

    waiting: indices of the requests that are not admitted yet.
    pages: the pages of the prompt, which the group owns while requests wait; None before prefill.
    logits: (V,), the logits behind the prompt, after prefill.
    """

    prompt: Sequence[int]
    adapter: int
    waiting: deque[int] = field(default_factory=deque)
    pages: list[int] | None = None
    logits: Tensor | None = None


@dataclass
class ActiveSequence:
    """A request in a slot.

    index: index of the request in the call.
    pages: the pages of the prompt and of the longest answer.
    """

    index: int
    request: Request
    group: PromptGroup
    pages: list[int]
    answer: Answer

    @property
    def position(self) -> int:
        """Return the position of the last token."""
        return len(self.request.prompt) + len(self.answer.tokens) - 1

    @property
    def last_token(self) -> int:
        """Return the last token of the prompt and the answer."""
        return (self.answer.tokens or self.request.prompt)[-1]

    @property
    def tokens_left(self) -> int:
        """Return how many tokens the answer may still get."""
        return self.request.limit - len(self.answer.tokens)


@dataclass
class Admission:
    """The sequences that enter the next free slots, in this order.

    prefills: groups to prefill, each with the pages of its prompt.
    copies: (source, target) of pages to copy after prefill.
    """

    sequences: list[ActiveSequence] = field(default_factory=list)
    prefills: list[tuple[PromptGroup, list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Schedule:
    """The waiting groups, the active sequences by slot, and the pages of a cache.

    slots: the most active sequences.
    most_pages: pages of the longest sequence.
    """

    def __init__(self, requests: Sequence[Request], pool: PagePool, slots: int, logprobs: bool):
        """Group the requests by prompt and adapter, in the order of their first appearance.

        pool: has enough pages for each request alone.
        logprobs: True if the answers hold log-probabilities.
        """
        self.active: list[ActiveSequence] = []
        self.answers = [Answer(logprobs=[] if logprobs else None) for _ in requests]
        self._requests, self._pool, self.slots = requests, pool, slots
        self.most_pages = max(pages_for(request.tokens) for request in requests)
        groups: dict[tuple, PromptGroup] = {}
        for i, request in enumerate(requests):
            key = (tuple(request.prompt), request.adapter)
            group = groups.setdefault(key, PromptGroup(request.prompt, request.adapter))
            group.waiting.append(i)
        self._groups = deque(groups.values())

    def admit(self) -> Admission:
        """Admit waiting requests in turn while there are free slots and free pages."""
        admission = Admission()
        while self._groups and len(self.active) < self.slots:
            if not self._admit_next(self._groups[0], admission):
                break
            if not self._groups[0].waiting:
                self._groups.popleft()
        return admission

    def _admit_next(self, group: PromptGroup, admission: Admission) -> bool:
        """Admit the next request of a group; return False if pages lack.

        The last request of a group takes the pages of the prompt over. The others share the full
        pages, and get a copy of the last page if it is not full.
        """
        request = self._requests[group.waiting[0]]
        T, total = len(group.prompt), pages_for(request.tokens)
        of_prompt, full = pages_for(T), T // PAGE
        missing = of_prompt if group.pages is None else 0
        takes_over = len(group.waiting) == 1
        own = total - (of_prompt if takes_over else full)
        if missing + own > self._pool.free:
            if self.active:
                return False  # until a sequence ends
            # The request fits alone. A later one of the group is prefilled again.
            takes_over, own = True, total - of_prompt
        if group.pages is None:
            group.pages = self._pool.allocate(of_prompt)
            admission.prefills.append((group, list(group.pages)))
        if takes_over:
            pages, group.pages = group.pages, None
        else:
            pages = group.pages[:full]
            self._pool.share(pages)
        pages = pages + self._pool.allocate(own)
        if not takes_over and full < of_prompt:
            admission.copies.append((group.pages[full], pages[full]))
        index = group.waiting.popleft()
        sequence = ActiveSequence(index, request, group, pages, self.answers[index])
        admission.sequences.append(sequence)
        self.active.append(sequence)
        return True

    def end(self, slot: int) -> int:
        """End the sequence of a slot, which the last active one takes; return the last slot."""
        self._pool.release(self.active[slot].pages)
        last = self.active.pop()
        if slot < len(self.active):
            self.active[slot] = last
        return len(self.active)

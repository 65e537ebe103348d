"""The key/value cache: pages of PAGE tokens, and a table of the pages of each slot.

    keys, values   (layers, pages, PAGE, G, K) in the compute dtype; keys are stored after RoPE
    page_table     (slots, width): token t of a slot lies in page page_table[slot, t // PAGE],
                   at offset t % PAGE

Sequences that begin with the same prompt share the full pages of the prompt. A shared page is never
written: the last page of a prompt is copied if it has room for new tokens. Page 0 belongs to no
sequence. Slots without a sequence read and write it.

A token of an 8B Llama takes 128 KiB in bf16, a page 8 MiB.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitune.config.model_config import ModelConfig
from minitune.kernels.backend import cdiv, power_of_two

PAGE = 64  # tokens
MIN_PAGES = 16  # of a cache and of a row of the table, so that a chat may grow for a while


class NoCacheRoom(ValueError):
    """A request that needs more keys and values than the budget of the cache allows."""


def pages_for(tokens: int) -> int:
    """Return the number of pages that hold `tokens` tokens."""
    return cdiv(tokens, PAGE)


def cache_pages(pages: int) -> int:
    """Return the pages of a cache for `pages` pages: up to a quarter more, so that few sizes exist.

    The size is a multiple of an eighth of the next power of two, and of MIN_PAGES.
    """
    step = max(power_of_two(pages) // 8, MIN_PAGES)
    return cdiv(pages, step) * step


def table_width(pages: int) -> int:
    """Return the columns of the page table for sequences of `pages` pages: a power of two."""
    return max(power_of_two(pages), MIN_PAGES)


class PagePool:
    """The free pages, and the number of owners of each page in use. Page 0 is never free.

    pages: number of pages, page 0 included.
    """

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, 0, -1))
        self._owners = [0] * pages

    @property
    def free(self) -> int:
        """Return the number of free pages."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """Return the number of owners of a page."""
        return self._owners[page]

    def allocate(self, count: int) -> list[int]:
        """Return `count` free pages, which have one owner from now on."""
        assert 0 <= count <= len(self._free), f"{count} pages wanted, {len(self._free)} are free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Give each page in use one more owner."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free and cannot be shared"
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take one owner from each page; a page without owners is free.

        They are allocated again in their order, because a CPU reads consecutive pages faster.
        """
        for page in reversed(pages):
            assert self._owners[page] > 0, f"page {page} is free already"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)


class KVCache:
    """The pages of all layers, and the page table of all slots.

    pages: number of pages, page 0 included.
    slots: rows of the table.
    width: columns of the table, the most pages of a sequence.
    """

    def __init__(
        self,
        c: ModelConfig,
        pages: int,
        slots: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (c.num_hidden_layers, pages, PAGE, c.num_key_value_heads, c.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self._host_table = torch.zeros((slots, width), dtype=torch.int32)
        self.page_table = self._host_table.to(device, copy=True)
        self._is_stale = False

    @staticmethod
    def page_nbytes(c: ModelConfig, dtype: torch.dtype) -> int:
        """Return the bytes of a page of all layers."""
        width = c.num_key_value_heads * c.head_dim
        return 2 * c.num_hidden_layers * PAGE * width * dtype.itemsize

    @property
    def pages(self) -> int:
        """Return the number of pages, page 0 included."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """Return the rows of the table."""
        return self._host_table.shape[0]

    @property
    def width(self) -> int:
        """Return the columns of the table."""
        return self._host_table.shape[1]

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """Give a slot these pages, in the order of its tokens; none takes its pages away."""
        self._host_table[slot].zero_()
        self._host_table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._is_stale = True

    def move(self, source: int, target: int) -> None:
        """Give the pages of one slot to another one."""
        self._host_table[target] = self._host_table[source]
        self.assign(source, ())

    def clear(self) -> None:
        """Take the pages of all slots away."""
        self._host_table.zero_()
        self._is_stale = True

    def upload(self) -> None:
        """Copy the table to the device if it changed."""
        if self._is_stale:
            copy_async_(self.page_table, self._host_table)
            self._is_stale = False

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of a page in all layers."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


def copy_async_(target: Tensor, host: Tensor) -> None:
    """Copy a host tensor into a tensor on any device, without waiting for a GPU."""
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)


def places_of(pages: Sequence[int], tokens: int) -> Tensor:
    """Return the places (tokens,) int64 of a sequence's first tokens: page * PAGE + offset."""
    first = torch.tensor(pages[: pages_for(tokens)], dtype=torch.int64) * PAGE
    return (first[:, None] + torch.arange(PAGE)).flatten()[:tokens]

"""Streamers: they receive the tokens of `generate` and show the text in whole characters.

model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
"""

import sys
from collections.abc import Iterator
from queue import Queue
from typing import Any

from torch import Tensor

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.incremental_text import IncrementalText
from minitune.streams import LenientStream


class TextStreamer:
    """A streamer that prints the text to stdout as its tokens are chosen.

    skip_prompt: leave out the prompt, which comes first.
    decode_kwargs: arguments of tokenizer.decode, such as skip_special_tokens=True.
    """

    def __init__(self, tokenizer: Tokenizer, skip_prompt: bool = False, **decode_kwargs: Any):
        self.tokenizer, self.skip_prompt, self.decode_kwargs = tokenizer, skip_prompt, decode_kwargs
        self._start()

    def _start(self) -> None:
        self._text = IncrementalText(self._decode)
        self._is_prompt = True

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs)

    def put(self, value: Tensor) -> None:
        """Take the prompt, (T,) or (1, T), or after it new tokens, (1,).

        Raises: ValueError if there is more than one prompt.
        """
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(f"a streamer shows one answer, but it got {len(value)} prompts")
        is_prompt, self._is_prompt = self._is_prompt, False
        if is_prompt and self.skip_prompt:
            return
        new = self._text.add(value.flatten().tolist())
        if not self._text.unfinished:
            self.on_finalized_text(new)

    def end(self) -> None:
        """Hand on the rest of the text, and get ready for another answer."""
        rest = self._text.rest()
        self._start()
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a stretch of text; the end is followed by a newline.

        A stdout that is missing, closed or failing shows nothing; `generate` returns the answer.
        """
        print(text, end="\n" if stream_end else "", file=LenientStream(sys.stdout), flush=True)


class TextIteratorStreamer(TextStreamer):
    """A streamer that another thread iterates over: it yields the text in stretches.

    timeout: seconds to wait for a stretch; None waits as long as it takes.

    Raises: queue.Empty from the iteration if the time is over.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self._queue: Queue[str | None] = Queue()  # None is the end

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue a stretch of text."""
        self._queue.put(text)
        if stream_end:
            self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next stretch of text."""
        text = self._queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text

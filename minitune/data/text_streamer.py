"""Streamers: they receive the tokens of `generate` and show the text in whole characters.

model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
"""

import sys
from collections.abc import Iterator
from queue import Queue
from typing import Any

from torch import Tensor

from minitune.data.tokenization.tokenizer import Tokenizer
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
        self._ids: list[int] = []
        self._shown = ""  # text of the ids that was handed on
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, (T,) or (1, T), or after it new tokens, (1,).

        Raises: ValueError if there is more than one prompt.
        """
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(f"a streamer shows one answer, but it got {len(value)} prompts")
        is_prompt, self._is_prompt = self._is_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self._ids += value.flatten().tolist()
        text = self.tokenizer.decode(self._ids, **self.decode_kwargs)
        # U+FFFD ends the text while a character lacks some of its bytes.
        if not text.endswith("\ufffd"):
            new, self._shown = text[len(self._shown) :], text
            self.on_finalized_text(new)

    def end(self) -> None:
        """Hand on the rest of the text, and get ready for another answer."""
        text = self.tokenizer.decode(self._ids, **self.decode_kwargs)
        rest = text[len(self._shown) :]
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

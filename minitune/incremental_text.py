"""The text of a growing list of token ids, in whole characters and in linear time.

    text = IncrementalText(tokenizer.decode)
    text.add([5, 9])      the characters that these ids complete
    text.unfinished       what the bytes of an incomplete character decode to
    text.rest()           the same at the end

A token's text can depend on the tokens before it: a character may span several tokens, and a
decoder may strip the space before the first token of a text. So the last tokens are decoded again
together with each new one. The others are dropped at a place that passes two tests: the tokens kept
decode to the end of the text, and hold a character that is whole.
"""

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # ends a text while a character lacks some of its bytes
CONTEXT = 8  # tokens that are kept, or more, up to a character's first byte
WINDOW = 40  # tokens that are decoded at a time, unless no place passes the tests


class IncrementalText:
    """The text of ids that come one after the other.

    decode: returns the text of a list of ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # the last ids
        self._returned = ""  # the part of their text that `add` returned
        self._limit = WINDOW
        self.unfinished = ""

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that ids complete; "" in the midst of a character."""
        self._ids += ids
        text = self._decode(self._ids)
        new = text[len(self._returned) :]
        if text.endswith(INCOMPLETE):
            self.unfinished = new
            return ""
        self._returned, self.unfinished = text, ""
        if len(self._ids) > self._limit:
            self._drop_first_ids()
        return new

    def rest(self) -> str:
        """Return the text at the end that `add` has not returned."""
        return self._decode(self._ids)[len(self._returned) :]

    def _drop_first_ids(self) -> None:
        """Keep the last ids alone, if the text behind them will be the same."""
        for count in range(CONTEXT, 2 * CONTEXT):
            kept = self._ids[-count:]
            text = self._decode(kept)
            if text.strip() and INCOMPLETE not in text and self._returned.endswith(text):
                self._ids, self._returned, self._limit = kept, text, WINDOW
                return
        self._limit = 2 * len(self._ids)

"""The result of calling a tokenizer: ids and attention masks, as lists or tensors.

    inputs = tokenizer(["one", "two three"], padding=True, return_tensors="pt").to("cuda")
    model.generate(**inputs)

The lengths follow transformers: `max_length` counts the special tokens, and truncation takes them
from the text. Padding has the mask 0.
"""

from collections import UserDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

LARGEST_LENGTH = 10**20  # a model_max_length above this means that there is none
PADDINGS = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
TRUNCATIONS = (True, "longest_first", "only_first")
SIDES = ("left", "right")


class BatchEncoding(UserDict):
    """A mapping of names to lists or tensors, such as input_ids and attention_mask.

    A value is an attribute too. Beyond transformers' class, an index that is no text takes from
    input_ids, and `shape` is that of input_ids, as if the encoding were the tensor itself.
    """

    def __getitem__(self, key: Any) -> Any:
        return self.data[key] if isinstance(key, str) else self.data["input_ids"][key]

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # a copy has no data at first
        if name not in data:
            raise AttributeError(f"the encoding has no {name!r}; it holds {', '.join(data)}")
        return data[name]

    @property
    def shape(self) -> torch.Size:
        """Return the shape (B, T) of the ids, which are a tensor."""
        return self.data["input_ids"].shape

    def to(self, device: Any, non_blocking: bool = False) -> "BatchEncoding":
        """Move the tensors to a device, and return the encoding itself."""
        for key, value in self.data.items():
            if isinstance(value, torch.Tensor):
                self.data[key] = value.to(device, non_blocking=non_blocking)
        return self


class Lengths(NamedTuple):
    """The lengths that a call of a tokenizer asks for.

    longest: texts are cut to this many tokens; None cuts nothing.
    padded: texts are padded to this many tokens; 0 is the longest text, None pads nothing.
    """

    longest: int | None
    padded: int | None


def read_lengths(padding: Any, truncation: Any, max_length: int | None, model_max: int) -> Lengths:
    """Return the lengths that the arguments of a call mean.

    model_max: the tokenizer's model_max_length, which counts if max_length is missing.

    Raises: ValueError if an argument has an unknown value, or max_length would change nothing.
    """
    if isinstance(padding, bool | None):
        padding = PADDINGS[padding]
    if padding not in ("longest", "max_length", "do_not_pad"):
        raise ValueError(
            f"padding is {padding!r}; choose True, False, 'longest', 'max_length' or 'do_not_pad'"
        )
    if truncation is None and max_length is not None and padding == "do_not_pad":
        truncation = True
    cuts = truncation in TRUNCATIONS
    if not cuts and truncation not in (None, False, "do_not_truncate"):
        raise ValueError(
            f"truncation is {truncation!r}; choose True, False, 'longest_first', 'only_first' or "
            "'do_not_truncate'"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; expected at least 1")
    if max_length is not None and not cuts and padding != "max_length":
        raise ValueError(f"max_length {max_length} needs truncation=True or padding='max_length'")
    if max_length is None and model_max <= LARGEST_LENGTH:
        max_length = model_max
    padded = {"longest": 0, "max_length": max_length, "do_not_pad": None}[padding]
    return Lengths(max_length if cuts else None, padded)


def padded_encoding(
    rows: Sequence[list[int]], width: int | None, pad_token_id: int | None, side: str
) -> BatchEncoding:
    """Return rows of ids with their attention mask as lists.

    width: smallest length of a row; 0 is that of the longest row, None pads nothing.
    side: "left" or "right", the side of the padding.

    Raises: ValueError if padding is asked for and there is no pad token.
    """
    if side not in SIDES:
        raise ValueError(f"padding_side is {side!r}; choose 'left' or 'right'")
    if width is None:
        return BatchEncoding(input_ids=list(rows), attention_mask=[[1] * len(row) for row in rows])
    if pad_token_id is None:
        raise ValueError(
            "padding needs a pad token, which this tokenizer lacks; set tokenizer.pad_token = "
            "tokenizer.eos_token"
        )
    width = width or max(map(len, rows), default=0)
    ids, masks = [], []
    for row in rows:
        fill = max(0, width - len(row))
        padding, mask = [pad_token_id] * fill, [1] * len(row)
        ids.append([*padding, *row] if side == "left" else [*row, *padding])
        masks.append([0] * fill + mask if side == "left" else mask + [0] * fill)
    return BatchEncoding(input_ids=ids, attention_mask=masks)


def as_tensors(encoding: BatchEncoding) -> BatchEncoding:
    """Return an encoding of lists as tensors (B, T).

    Raises: ValueError if the rows differ in length.
    """
    lengths = sorted({len(row) for row in encoding["input_ids"]})
    if len(lengths) > 1:
        raise ValueError(
            f"the texts have {lengths[0]} to {lengths[-1]} tokens, and a tensor has rows of one "
            "length; add padding=True, or truncation=True with max_length and padding='max_length'"
        )
    return BatchEncoding({key: torch.tensor(rows).long() for key, rows in encoding.items()})

"""Padding of tokenized samples for a loop of your own, in the form of transformers' collator.

SFTTrainer packs its samples and needs no collator.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minitune.config.foreign_arguments import ANYTHING, Foreign, foreign_arguments
from minitune.data.tokenization.batch_encoding import BatchEncoding
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.kernels.cross_entropy import IGNORE_INDEX


@foreign_arguments(
    model=Foreign("labels are not shifted here", neutral=ANYTHING),
    padding=Foreign("a batch is padded to its longest sample", neutral=(True, "longest")),
    max_length=Foreign("cut the samples with tokenizer(..., truncation=True)"),
    return_tensors=Foreign("tensors are those of torch", neutral=("pt", None)),
)
class DataCollatorForSeq2Seq:
    """A callable that makes a padded batch of samples.

    Samples are padded on the tokenizer's padding_side.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pad_to_multiple_of: int | None = None,
        label_pad_token_id: int = IGNORE_INDEX,
    ):
        """Take the tokenizer, whose pad token fills the ids.

        pad_to_multiple_of: the padded length becomes a multiple of this.
        label_pad_token_id: the label of padding.

        Raises: ValueError if the tokenizer has no pad token.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token first")
        self.tokenizer, self.multiple = tokenizer, pad_to_multiple_of or 1
        self.label_pad_token_id = label_pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Return input_ids, attention_mask and labels, each (B, T), int64.

        features: mappings with input_ids, and labels in all of them or in none.

        Raises: ValueError if a key is missing or unknown.
        """
        known = {"input_ids", "attention_mask", "labels"}
        keys = set(features[0])
        if "input_ids" not in keys or not keys <= known or any(set(f) != keys for f in features):
            raise ValueError(
                f"the samples have the keys {sorted(set().union(*features))}; expected input_ids, "
                "attention_mask and labels, the same in each"
            )
        masks = [f.get("attention_mask", [1] * len(f["input_ids"])) for f in features]
        pad = self.tokenizer.pad_token_id
        batch = {"input_ids": self._padded([f["input_ids"] for f in features], pad)}
        batch["attention_mask"] = self._padded(masks, 0)
        if "labels" in keys:
            labels = [f["labels"] for f in features]
            batch["labels"] = self._padded(labels, self.label_pad_token_id)
        return BatchEncoding(batch)

    def _padded(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        """Return the rows as a tensor (B, T), filled up with `fill`."""
        length = -(-max(map(len, rows)) // self.multiple) * self.multiple
        batch = torch.full((len(rows), length), fill, dtype=torch.int64)
        for i, row in enumerate(rows):
            begin = length - len(row) if self.tokenizer.padding_side == "left" else 0
            batch[i, begin : begin + len(row)] = torch.as_tensor(row)
        return batch

"""The importance matrix: for each linear, the mean square of each column of its inputs.

    importance[j] = mean over tokens of x[j]^2        x: the inputs (tokens, width) of one linear

A quantiser that is given the importance minimises the error of the outputs instead of the error of
the weights: it weighs the error of column j with importance[j]. Linears that share an input, such
as q, k and v, have the same importance.

importance_collection.py measures a matrix; imatrix_files.py reads and writes llama.cpp's files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.config.model_config import ModelConfig
from minitune.gguf.model_metadata import gguf_name

CHUNK_TOKENS = 512  # of llama-imatrix's default context
# Types whose quantisers read the importance. Q8_0 and the float types have one way to round.
WEIGHTED_TYPES = frozenset(
    {
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q5_0,
        GGMLType.Q5_1,
        GGMLType.Q2_K,
        GGMLType.Q3_K,
        GGMLType.Q4_K,
        GGMLType.Q5_K,
        GGMLType.Q6_K,
        GGMLType.IQ4_NL,
        GGMLType.IQ4_XS,
    }
)


@dataclass(frozen=True)
class ImportanceMatrix:
    """The importance of the columns of each linear, and its origin.

    values: name of a tensor in the GGUF file -> mean squares of its inputs, float32 (width,).
    tokens: tokens that the means were taken over; 0 if the file does not say.
    chunks: tokens in chunks of a context, as llama-imatrix counts them; 0 if unknown.
    dataset: name of the text or data that the tokens came from; "" if unknown.
    file: the file that the matrix was read from; "" if it was collected.
    """

    values: dict[str, Tensor]
    tokens: int = 0
    chunks: int = 0
    dataset: str = ""
    file: str = ""

    @property
    def source(self) -> str:
        """Return the name of the matrix in messages."""
        return self.file or f"importance matrix of {self.dataset or 'samples'}"

    def __str__(self) -> str:
        tokens = f" from {self.tokens:,} tokens" if self.tokens else ""
        return f"{self.source}: the inputs of {len(self.values)} tensors{tokens}"

    def metadata(self) -> dict[str, str | int]:
        """Return the keys that llama-quantize writes into a file that it quantises with a matrix.

        A key is left out if its value is unknown.
        """
        keys = {
            "quantize.imatrix.file": self.file,
            "quantize.imatrix.dataset": self.dataset,
            "quantize.imatrix.entries_count": len(self.values),
            "quantize.imatrix.chunks_count": self.chunks,
        }
        return {key: value for key, value in keys.items() if value}

    def check_values(self) -> None:
        """Raise ValueError if there is no value, or one is not finite or negative."""
        if not self.values:
            raise ValueError(f"{self.source}: holds no importance values")
        for name, values in self.values.items():
            if not torch.isfinite(values).all():
                raise ValueError(f"{self.source}: {name} has values that are not finite")
            if (values < 0).any():
                raise ValueError(
                    f"{self.source}: {name} has the negative value {values.min().item():g}, "
                    "but mean squares are at least 0"
                )

    def check_model(self, config: ModelConfig) -> list[str]:
        """Return notes about the linears of a model that have no values.

        They are quantised without importance, as by llama-quantize.

        Raises: ValueError if a tensor is not the model's, or its width differs.
        """
        widths = tensor_widths(config)
        unknown = [name for name in self.values if name not in widths]
        if len(unknown) == len(self.values):
            raise ValueError(
                f"{self.source}: none of its {len(unknown)} tensors is one of this model's; "
                f"the first is {unknown[0]!r}"
            )
        if unknown:
            raise ValueError(
                f"{self.source}: this model has no tensor {unknown[0]!r}; "
                "the matrix must be collected with this model"
            )
        for name, values in self.values.items():
            if len(values) != widths[name]:
                raise ValueError(
                    f"{self.source}: {name} has {len(values)} values, but the tensor has "
                    f"{widths[name]} columns; the matrix must be collected with this model"
                )
        # The embedding is no linear, and llama-imatrix leaves out the head.
        missing = [name for name in widths if name.startswith("blk.") and name not in self.values]
        if not missing:
            return []
        return [
            f"{self.source} has no values for {len(missing)} of the model's tensors, which are "
            f"quantised without importance; the first is {missing[0]}"
        ]


def tensor_widths(config: ModelConfig) -> dict[str, int]:
    """Return the columns of each matrix of a model, under its name in the GGUF file."""
    return {
        gguf_name(name, config.architecture): shape[1]
        for name, shape in config.tensor_shapes().items()
        if len(shape) == 2
    }


def unused_note(types: Iterable[GGMLType], method: str) -> list[str]:
    """Return a note if no tensor of a file has a type that reads the importance.

    types: storage types of the file's tensors.
    """
    if WEIGHTED_TYPES.isdisjoint(types):
        return [
            f"the importance matrix changes no weight of a {method} file, which has no use of it"
        ]
    return []

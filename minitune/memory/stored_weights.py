"""The bytes of a model's frozen weights as they are stored.

Linears are in NF4, in 16 bit, or in the types of a GGUF file. A head in another form than the
compute dtype is converted as a whole before the loss of a micro-step, into a buffer (V, D).
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from minitune.config.model_config import EMBEDDING, HEAD, ModelConfig
from minitune.model.causal_lm import CausalLM
from minitune.model.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE

# Bytes of a parameter in NF4: half a byte, one byte of scale a block, a float32 for 256 scales.
NF4_BYTES = 0.5 + 1 / BLOCKSIZE + 4 / (BLOCKSIZE * NESTED_BLOCKSIZE)


@dataclass(frozen=True)
class StoredWeights:
    """The bytes of a model's frozen weights, and their formats.

    formats: names of the formats of the linears, such as "NF4", those of most bytes first; empty
        for a folder in 16 bit.
    linears: bytes of the linears of all layers.
    embedding: bytes of the embedding.
    head: bytes of the head; those of the embedding if the head is the embedding.
    vectors: bytes of norms and biases.
    converts_head: True if the head is not stored in the compute dtype.
    """

    formats: tuple[str, ...]
    linears: int
    embedding: int
    head: int
    vectors: int
    converts_head: bool = False

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        nbytes: Callable[[str, tuple[int, ...]], float],
        formats: tuple[str, ...],
        converts_head: bool,
    ) -> "StoredWeights":
        """Return the weights of a model.

        nbytes: returns the bytes of a tensor from its name and shape.
        """
        total = Counter()
        for name, shape in config.tensor_shapes().items():
            group = "linears" if len(shape) == 2 else "vectors"
            total[{EMBEDDING: "embedding", HEAD: "head"}.get(name, group)] += nbytes(name, shape)
        if config.tie_word_embeddings:
            total["head"] = total["embedding"]
        sizes = (int(total[name]) for name in ("linears", "embedding", "head", "vectors"))
        return cls(formats, *sizes, converts_head)

    @classmethod
    def of_folder(
        cls,
        config: ModelConfig,
        itemsize: int,
        load_in_4bit: bool = True,
        converts_head: bool = False,
    ) -> "StoredWeights":
        """Return the weights of a folder.

        itemsize: bytes of an element of the folder's tensors.
        load_in_4bit: True if the linears are quantised to NF4.
        converts_head: True if the tensors do not have the compute dtype.
        """

        def nbytes(name: str, shape: tuple[int, ...]) -> float:
            is_nf4 = load_in_4bit and len(shape) == 2 and name not in (EMBEDDING, HEAD)
            return math.prod(shape) * (NF4_BYTES if is_nf4 else itemsize)

        return cls.of(config, nbytes, ("NF4",) if load_in_4bit else (), converts_head)

    @classmethod
    def of_model(cls, model: CausalLM) -> "StoredWeights":
        """Return the weights of a loaded model."""

        def nbytes(name: str, _: tuple[int, ...]) -> int:
            module_name, _, kind = name.rpartition(".")
            module = model.get_submodule(module_name)
            quantized = getattr(module, "quantized", None) if kind == "weight" else None
            return (quantized or getattr(module, kind)).nbytes

        return cls.of(model.config, nbytes, model.weight_formats, model.converts_head)

    def __str__(self) -> str:
        """Return the formats of the linears in words."""
        return " and ".join(self.formats) or "16 bit"

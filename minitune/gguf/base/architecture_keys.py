"""The keys of an architecture in a GGUF file, such as `llama.block_count`, with a check of each.

A key that nobody reads may change what llama.cpp computes. Such a key is refused, unless its value
is neutral: llama.cpp then computes as without the key.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minitune.config.numbers import LARGEST_WHOLE, number, shown, whole

LARGEST_NUMBER = 1e30  # config_values.py has narrower bounds for each field
# Key -> the values with which llama.cpp computes as without the key; () if no value changes
# anything.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "vocab_size": (),  # the rows of the embedding count
    "tensor_data_layout": (),
    "rope.scaling.finetuned": (),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attention.sliding_window_pattern": (),  # without a window
    "attn_logit_softcapping": (0,),
    "deepstack_mapping": (),  # only an image has embeddings to add
    "embedding_length_out": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (-1, 0),
    "residual_scale": (0, 1),
    "use_parallel_residual": (),  # older Qwen 2 files have it; no supported family computes so
}


class ArchitectureKeys:
    """The keys of a file's architecture. Each key that is read is remembered.

    metadata: all keys of the file.
    name: general.architecture, the prefix of the keys.

    Raises: ValueError, in each method, if a value has another type or is out of range.
    """

    def __init__(self, metadata: dict[str, Any], name: str):
        self.metadata, self.name = metadata, name
        self.read: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default without the key."""
        self.read.add(key)
        return self.metadata.get(f"{self.name}.{key}", default)

    def whole(
        self, key: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST_WHOLE
    ) -> int:
        """Return a whole number. Without a default the key is required."""
        value, bounds = self.value(key, default), whole(minimum, maximum)
        if not bounds.hold(value):
            raise self.error(key, value, str(bounds))
        return value

    def whole_of_layers(self, key: str, layers: int, default: int | None = None) -> int:
        """Return a whole number that may be given for each layer, if all layers have the same."""
        value = self.value(key)
        if not isinstance(value, list):
            return self.whole(key, default)
        if len(value) != layers or any(entry != value[0] for entry in value):
            raise self.error(key, value, f"one number for all {layers} layers")
        self.metadata = self.metadata | {f"{self.name}.{key}": value[0]}
        return self.whole(key)

    def number(self, key: str, default: float | None = None, minimum: float = 0.0) -> float:
        """Return a number, as the shortest decimal number that float32 rounds to the same value.

        Without a default the key is required.
        """
        value, bounds = self.value(key, default), number(minimum, LARGEST_NUMBER)
        if not bounds.hold(value):
            raise self.error(key, value, str(bounds))
        return shortest(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.value(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: str, choices: Sequence[str]) -> str:
        """Return one of some words."""
        value = self.value(key, default)
        if value not in choices:
            raise self.error(key, value, f"one of {', '.join(choices)}")
        return value

    def expect(self, key: str, expected: float | bool, tolerance: float = 1e-6) -> None:
        """Raise ValueError if the file has the key with another value than the expected one.

        tolerance: relative difference that is accepted.
        """
        value = self.value(key, expected)
        is_number = type(value) in (int, float, bool)
        if not is_number or not math.isclose(value, expected, rel_tol=tolerance):
            raise self.error(key, value, f"{expected}; other values are not supported")

    def check_all_read(self) -> None:
        """Raise ValueError if a key was not read, and its value is not neutral."""
        for key, value in self.metadata.items():
            own = key.removeprefix(f"{self.name}.")
            if own == key or own in self.read:
                continue
            neutral = NEUTRAL.get(own)
            if neutral is None or (neutral and value not in neutral):
                raise ValueError(
                    f"{key} is {shown(value)}, which is not supported for models of the "
                    f"architecture {self.name}; use the file of a model without this key"
                )

    def error(self, key: str, value: Any, expected: str) -> ValueError:
        """Return the error of a key with a wrong value; None stands for a missing key."""
        found = "is missing" if value is None else f"is {shown(value)}"
        return ValueError(f"{self.name}.{key} {found}; expected {expected}")


def shortest(value: float) -> float:
    """Return the shortest decimal number that float32 rounds to the same value: 1e-05."""
    return float(str(np.float32(value)))

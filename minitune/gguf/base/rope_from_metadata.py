"""The rotary position embedding of a GGUF file, as the fields of a config.json.

llama.cpp rotates pair i by the angle

    t * theta^(-2i / R) / (factor * divisor_i)

`factor` is the key rope.scaling.factor, and the divisors are tensors of the file. YaRN replaces the
factor of some pairs (model/rope.py). The key rope.scaling.attn_factor scales cos and sin.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minitune.config.architectures import Architecture
from minitune.config.rope_config import QUERY_GROWTH, RopeConfig
from minitune.gguf.base.architecture_keys import ArchitectureKeys, shortest
from minitune.gguf.model_metadata import LLAMA_CPP_YARN, ORIGINAL
from minitune.model.rope import rope_divisors, rope_scale

DEFAULT_THETA = 10000.0
ROPE_FREQS = "rope_freqs.weight"
ROPE_FACTORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}
ROPE_TENSORS = (ROPE_FREQS, *ROPE_FACTORS.values())
SCALING_TYPES = ("none", "linear", "yarn", "longrope")
# low_freq_factor and high_freq_factor of every published model with llama3's scaling
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
LLAMA3_CONTEXTS = tuple(1 << power for power in (13, *range(4, 22)))  # original ones, tokens
ROUNDING = 1e-6  # relative; the converter computes the divisors in another precision


def rope_fields(
    keys: ArchitectureKeys,
    family: Architecture,
    divisors: Mapping[str, Tensor],
    head_dim: int,
    positions: int,
) -> dict:
    """Return the fields of config.json for the rotation: theta, scaling, rotated columns.

    divisors: name -> values of those of ROPE_TENSORS that the file holds.

    Raises: ValueError that names the key or the tensor if the rotation is not supported.
    """
    theta = keys.number("rope.freq_base", DEFAULT_THETA, minimum=2.0)
    fields: dict = {"rope_theta": theta}
    rotary_dim = keys.whole("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if not family.partial_rotary or rotary_dim % 2 or rotary_dim > head_dim:
            raise keys.error("rope.dimension_count", rotary_dim, f"{head_dim}, the width of a head")
        fields["partial_rotary_factor"] = _fraction(rotary_dim, head_dim)
    keys.expect("rope.dimension_count_swa", rotary_dim)
    original = keys.whole("rope.scaling.original_context_length", positions)
    growth = keys.number("attention.temperature_scale", 0.0) if family.query_growth else 0.0
    rope = RopeConfig(theta, rotary_dim, None, growth)
    found = _Scaling(keys, family, rope, original, positions).read(divisors)
    if growth:
        found |= {QUERY_GROWTH: growth}
    elif family.query_growth and found is None:  # a missing scaling stands for Ministral's own
        found = {"rope_type": "default", "rope_theta": theta}
    if family.partial_rotary:
        fields[ORIGINAL] = original
    fields["rope_scaling"] = found
    return fields


def _fraction(rotary_dim: int, head_dim: int) -> float:
    """Return the partial_rotary_factor of which config.json's reader makes `rotary_dim`."""
    fraction = rotary_dim / head_dim
    return fraction if int(head_dim * fraction) == rotary_dim else math.nextafter(fraction, 1.0)


class _Scaling:
    """The scaling of a file's rotation.

    rope: the rotation without its scaling, with the growth of its queries.
    original, positions: the context before and after the scaling, tokens.
    """

    def __init__(
        self,
        keys: ArchitectureKeys,
        family: Architecture,
        rope: RopeConfig,
        original: int,
        positions: int,
    ):
        self.keys, self.family, self.rope = keys, family, rope
        self.original, self.positions = original, positions

    def read(self, divisors: Mapping[str, Tensor]) -> dict | None:
        """Return config.json's rope_scaling, or None without a scaling."""
        keys = self.keys
        kind = keys.text("rope.scaling.type", "linear", SCALING_TYPES)
        factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0)
        factor = factor if factor and kind != "none" else 1.0
        attention = keys.number("rope.scaling.attn_factor", 1.0)
        lists = self._lists(kind, divisors)
        if kind == "yarn":
            if lists:
                raise ValueError(
                    f"{next(iter(divisors))} together with YaRN is not supported; use the file of "
                    "a model with one scaling of RoPE"
                )
            return self._yarn(factor, attention)
        if len(lists) == 2:
            scaled = {key: self._numbers(values * factor) for key, values in lists.items()}
            return self._longrope(scaled, attention)
        freqs = lists.get(ROPE_FREQS, torch.ones(self.rope.rotary_dim // 2))
        if attention != 1 or self.rope.query_growth:  # only a list comes with an original context
            return self._listed(freqs * factor, attention)
        if (freqs == 1).all():
            return None if factor == 1 else {"rope_type": "linear", "factor": factor}
        return self._llama3(freqs) if factor == 1 else self._listed(freqs * factor, attention)

    def _listed(self, divisors: Tensor, attention: float) -> dict:
        """Return the scaling that divides by given divisors in every context.

        attention: factor of cos and sin.
        """
        numbers = self._numbers(divisors)
        return self._longrope(dict.fromkeys(ROPE_FACTORS, numbers), attention)

    def _lists(self, kind: str, divisors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the divisors that llama.cpp applies, by config.json's names or ROPE_FREQS."""
        reads_factors = self.family.partial_rotary or kind == "longrope"
        read = ROPE_FACTORS if reads_factors else {ROPE_FREQS: ROPE_FREQS}
        for name, values in divisors.items():
            if name not in read.values() or not self.family.gguf.rope_tensors:
                raise ValueError(f"the tensor {name} does not belong to the model")
            if values.shape != (self.rope.rotary_dim // 2,):
                raise ValueError(
                    f"{name} has the shape {tuple(values.shape)}; "
                    f"expected ({self.rope.rotary_dim // 2},)"
                )
            if not (values > 0).all() or not values.isfinite().all():
                raise ValueError(f"{name} has a divisor that is not above 0")
        lists = {key: divisors[name] for key, name in read.items() if name in divisors}
        if lists and len(lists) != len(read):
            missing = next(name for key, name in read.items() if key not in lists)
            raise ValueError(f"the tensor {missing} is missing")
        return lists

    def _longrope(self, lists: dict[str, list[float]], attention: float) -> dict:
        return {
            "rope_type": "longrope",
            **lists,
            "attention_factor": attention,
            ORIGINAL: self.original,
        }

    def _numbers(self, divisors: Tensor) -> list[float]:
        return [shortest(value) for value in divisors.tolist()]

    def _llama3(self, divisors: Tensor) -> dict:
        """Return llama3's scaling if it has these divisors, otherwise their list."""
        factor = shortest(divisors.max().item())
        for original in LLAMA3_CONTEXTS:
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                ORIGINAL: original,
            }
            rope = RopeConfig(self.rope.theta, self.rope.rotary_dim, scaling)
            if torch.allclose(rope_divisors(rope, self.positions), divisors, ROUNDING, 0.0):
                return scaling
        return self._listed(divisors, 1.0)

    def _yarn(self, factor: float, attention: float) -> dict:
        """Return YaRN's scaling with the values that llama.cpp computes with."""
        keys = self.keys
        scaling: dict = {"rope_type": "yarn", "factor": factor, ORIGINAL: self.original}
        for name in ("beta_fast", "beta_slow"):
            key, built_in = f"rope.scaling.yarn_{name}", LLAMA_CPP_YARN[name]
            if self.family.query_growth:
                scaling[name] = keys.number(key, built_in)
            elif keys.value(key) is not None:
                keys.expect(key, built_in)
                scaling[name] = built_in
        weight = 0.0
        if self.family.query_growth:
            weight = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
        if weight:
            scaling |= {"mscale": 1.0, "mscale_all_dim": weight}
        numbers = dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), 0.0) | scaling
        scale = rope_scale(RopeConfig(self.rope.theta, self.rope.rotary_dim, numbers))
        keys.expect("rope.scaling.yarn_attn_factor", scale, tolerance=1e-4)
        if attention != 1:
            scaling["attention_factor"] = shortest(scale * attention)
        return scaling

"""The rotary position embedding of a model, as config.json describes it."""

from dataclasses import dataclass
from typing import NamedTuple

from minitune.config.architectures import Architecture
from minitune.config.config_values import read_flag, read_number, read_numbers
from minitune.config.family_defaults import ROPE_KEYS
from minitune.config.layer_kinds import FULL, SLIDING
from minitune.config.numbers import shown

# Kind of scaling -> the numbers that it needs, and those that may be missing; 0 stands for these.
REQUIRED_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
OPTIONAL_KEYS = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
DIVISOR_LISTS = ("short_factor", "long_factor")  # of longrope
QUERY_GROWTH = "llama_4_scaling_beta"


@dataclass(frozen=True)
class RopeConfig:
    """The rotation of the heads in some layers of a model.

    theta: base of the periods.
    rotary_dim: columns of a head that are rotated, from the first on; the others stay.
    scaling: None, or {"rope_type": "linear", "llama3", "yarn" or "longrope", ...}.
    query_growth: beta of the factor 1 + beta ln(1 + floor(position / original)) of the queries; 0
        for none. `original` is the scaling's original_max_position_embeddings.
    """

    theta: float
    rotary_dim: int
    scaling: dict | None
    query_growth: float = 0.0

    @property
    def kind(self) -> str | None:
        """Return the kind of the scaling, or None without one."""
        return self.scaling["rope_type"] if self.scaling else None


class RopeReader(NamedTuple):
    """The values of a model that its rotation depends on."""

    family: Architecture
    raw: dict
    head_dim: int
    max_position_embeddings: int

    def read_all(self) -> tuple[RopeConfig, ...]:
        """Return the rotation of the layers, or those of full and of sliding layers.

        The layouts of config.json are rope_theta and rope_scaling, or the rope_parameters of
        transformers 5, which may hold an object for each type of layer.

        Raises: ValueError that names the field.
        """
        parameters = self._parameters()
        is_nested = FULL in parameters or SLIDING in parameters
        if not self.family.two_ropes:
            if is_nested:
                raise ValueError(
                    "rope_parameters has an object for each type of layer, which models of type "
                    f"{self.family.model_type} do not have"
                )
            return (self._read(parameters),)
        full, sliding = parameters, {}
        if is_nested:
            full, sliding = (parameters.get(kind) or {} for kind in (FULL, SLIDING))
        if not isinstance(full, dict) or not isinstance(sliding, dict):
            raise ValueError("rope_parameters of a type of layer is not an object")
        local = {"rope_theta": self.raw.get("rope_local_base_freq")}
        return self._read(full), self._read(local | sliding)

    def _parameters(self) -> dict:
        """Return rope_parameters or rope_scaling, whichever config.json has."""
        new, old = (self.raw.get(key) or {} for key in ROPE_KEYS)
        for key, value in zip(ROPE_KEYS, (new, old), strict=True):
            if not isinstance(value, dict):
                raise ValueError(f"{key} is {shown(value)}; expected an object")
        same = new.get(FULL) or new
        if new and (differing := [key for key in old if old[key] != same.get(key)]):
            raise ValueError(
                f"rope_parameters and rope_scaling differ in {differing[0]}; "
                "remove the one that does not count"
            )
        return new or old

    def _read(self, parameters: dict) -> RopeConfig:
        """Return the rotation of some layers."""
        raw = self.raw
        default_theta = read_number(raw, "rope_theta", 10000.0)
        theta = float(read_number(parameters, "rope_theta", default_theta))
        rotary_dim = self._rotary_dim(parameters)
        scaling = self._scaling(parameters, rotary_dim)
        growth = 0.0
        if self.family.query_growth:
            growth = float(read_number(parameters, QUERY_GROWTH, 0.0))
        if growth and scaling is None:
            raise ValueError(f"{QUERY_GROWTH} is {growth}, but there is no rope scaling to go with")
        return RopeConfig(theta, rotary_dim, scaling, growth)

    def _rotary_dim(self, parameters: dict) -> int:
        """Return the rotated columns of a head."""
        outer = read_number(self.raw, "partial_rotary_factor", 1.0)
        fraction = read_number(parameters, "partial_rotary_factor", outer)
        if fraction == 1:
            return self.head_dim
        rotary_dim = int(self.head_dim * fraction)
        if not self.family.partial_rotary:
            raise ValueError(
                f"partial_rotary_factor {fraction} is not supported for models of type "
                f"{self.family.model_type}; their whole heads are rotated"
            )
        if not 0 < rotary_dim < self.head_dim or rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {fraction} rotates {rotary_dim} of {self.head_dim} columns "
                "of a head; expected an even number of them"
            )
        return rotary_dim

    def _scaling(self, parameters: dict, rotary_dim: int) -> dict | None:
        """Return the kind of the scaling and its numbers, or None without one."""
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        kind = self.family.rope_type_names.get(str(kind), str(kind))
        if kind == "default":
            return None
        if kind not in REQUIRED_KEYS:
            raise ValueError(
                f"rope scaling {shown(kind)} is not supported; "
                f"supported are default, {', '.join(REQUIRED_KEYS)}"
            )
        if not read_flag(parameters, "truncate", True):
            raise ValueError("truncate false of rope scaling is not supported; only true is")
        # Phi-3 has this field beside the scaling, not in it.
        original = "original_max_position_embeddings"
        outer = {original: self.raw[original]} if self.raw.get(original) else {}
        parameters = parameters | outer
        values: dict = {key: float(read_number(parameters, key)) for key in REQUIRED_KEYS[kind]}
        if kind == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
            raise ValueError(
                f"high_freq_factor is {values['high_freq_factor']:g}; expected more than the "
                f"low_freq_factor {values['low_freq_factor']:g}"
            )
        for key in OPTIONAL_KEYS.get(kind, ()):
            values[key] = float(read_number(parameters, key, 0.0))
        if kind == "longrope":
            for key in DIVISOR_LISTS:
                values[key] = read_numbers(parameters, key, rotary_dim // 2)
            values["factor"] = values["factor"] or self.max_position_embeddings / values[original]
        return {"rope_type": kind, **values}

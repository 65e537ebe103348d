"""What differs between the layers of one model: the sliding window and the rotation of heads."""

from typing import NamedTuple

from minitune.config.architectures import Architecture
from minitune.config.config_values import read_flag, read_list, read_number
from minitune.config.numbers import check_number, shown, whole

FULL, SLIDING = "full_attention", "sliding_attention"


class LayerKind(NamedTuple):
    """The values of one decoder layer in which it may differ from the others.

    window: tokens that a token sees, itself included and back from it; None for its whole sample.
    rope: index of the rotation in `ModelConfig.ropes`; None if heads are not rotated. With two
        rotations the second is that of the sliding layers.
    """

    window: int | None
    rope: int | None


def periodic(layers: int, period: int) -> list[bool]:
    """Return False for every period-th layer, and True for the others."""
    return [(i + 1) % period != 0 for i in range(layers)]


def read_layer_kinds(family: Architecture, raw: dict, layers: int) -> tuple[LayerKind, ...]:
    """Return the kind of each layer of a config.json.

    Raises: ValueError that names the field.
    """
    rotated = _rotated_layers(family, raw, layers)
    window, sliding = _window(family, raw), [False] * layers
    if window is not None:
        sliding = _sliding_layers(family, raw, rotated)
    return tuple(
        LayerKind(
            window=window if slides else None,
            rope=int(family.two_ropes and slides) if rotates else None,
        )
        for slides, rotates in zip(sliding, rotated, strict=True)
    )


def _window(family: Architecture, raw: dict) -> int | None:
    """Return the tokens that a sliding layer sees, or None if no layer slides."""
    if family.sliding_layers == "none":
        return None
    if family.window_switch is not None and not read_flag(raw, family.window_switch, False):
        return None
    return read_number(raw, "sliding_window", 0) or None


def _sliding_layers(family: Architecture, raw: dict, rotated: list[bool]) -> list[bool]:
    """Return for each layer whether the sliding window counts for it."""
    layers = len(rotated)
    types = read_list(raw, "layer_types", layers)
    if types is not None and not family.reads_layer_types and FULL in types:
        raise ValueError(
            f"layer_types has {FULL!r}, but all layers of a {family.model_type} model have its "
            "sliding_window; remove layer_types, or set sliding_window to null"
        )
    if types is not None:
        if wrong := [kind for kind in types if kind not in (FULL, SLIDING)]:
            raise ValueError(f"layer_types has {shown(wrong[0])}; expected {FULL!r} or {SLIDING!r}")
        return [kind == SLIDING for kind in types]
    if family.sliding_layers == "unrotated":
        return [not rotates for rotates in rotated]
    if family.sliding_layers == "periodic":
        return periodic(layers, read_number(raw, "sliding_window_pattern"))
    if family.sliding_layers == "last":
        first = read_number(raw, "max_window_layers")
        return [i >= first for i in range(layers)]
    return [True] * layers


def _rotated_layers(family: Architecture, raw: dict, layers: int) -> list[bool]:
    """Return for each layer whether its heads are rotated."""
    if family.unrotated_period_key is None:
        return [True] * layers
    listed = read_list(raw, "no_rope_layers", layers)
    if listed is not None:  # despite its name, 1 stands for a layer with RoPE
        return [bool(check_number("no_rope_layers", value, whole(0, 1))) for value in listed]
    return periodic(layers, read_number(raw, family.unrotated_period_key))

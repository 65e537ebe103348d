"""The fields of a config.json that decide the model, with the type and the bounds of each."""

from typing import Any

from minitune.config.numbers import Bounds, check_number, number, shown, whole

# The largest published models have 126 layers and widths of 53,248. These bounds are those of a
# plan without weights; with weights, the tensors decide (checkpoints/check_tensors.py).
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 1024, 1 << 20, 1 << 24
FACTOR = number()
# Numbers of config.json, of rope_scaling and of rope_parameters.
NUMBERS: dict[str, Bounds] = {
    "vocab_size": whole(1, MAX_VOCABULARY),
    "hidden_size": whole(1, MAX_WIDTH),
    "intermediate_size": whole(1, MAX_WIDTH),
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": whole(1, MAX_WIDTH),
    "num_key_value_heads": whole(1, MAX_WIDTH),
    "head_dim": whole(1, MAX_WIDTH),
    "max_position_embeddings": whole(1),
    "rms_norm_eps": number(1e-30, 1),
    "query_pre_attn_scalar": FACTOR,
    "attn_logit_softcapping": FACTOR,
    "final_logit_softcapping": FACTOR,
    "attention_multiplier": FACTOR,
    "embedding_multiplier": FACTOR,
    "residual_multiplier": FACTOR,
    "logits_scaling": FACTOR,
    "sliding_window": whole(1),
    "sliding_window_pattern": whole(1),
    "max_window_layers": whole(0),
    "no_rope_layer_interval": whole(1),
    # YaRN divides by the logarithms of the base and of the context.
    "rope_theta": number(2, 1e30),
    "rope_local_base_freq": number(2, 1e30),
    "original_max_position_embeddings": number(2, 1e10),
    "partial_rotary_factor": number(maximum=1),
    "factor": FACTOR,
    "low_freq_factor": FACTOR,
    "high_freq_factor": FACTOR,
    "beta_fast": FACTOR,
    "beta_slow": FACTOR,
    "attention_factor": FACTOR,
    "mscale": FACTOR,
    "mscale_all_dim": FACTOR,
    "short_factor": FACTOR,
    "long_factor": FACTOR,
    "llama_4_scaling_beta": FACTOR,
}


def read_number(raw: dict, name: str, default: float | None = None) -> Any:
    """Return a number of config.json, or the default if the field is missing or null.

    Raises: ValueError if the number is missing without a default, or is not within its bounds.
    """
    if (value := raw.get(name)) is not None:
        return check_number(name, value, NUMBERS[name])
    if default is None:
        raise ValueError(f"{name} is missing; expected {NUMBERS[name]}")
    return default


def read_flag(raw: dict, name: str, default: bool) -> bool:
    """Return a switch of config.json, or the default if the field is missing or null.

    Raises: ValueError if the value is neither true nor false.
    """
    if (value := raw.get(name)) is None:
        return default
    if type(value) is not bool:
        raise ValueError(f"{name} is {shown(value)}; expected true or false")
    return value


def read_list(raw: dict, name: str, length: int) -> list | None:
    """Return a list of `length` entries of config.json, or None if it is missing or null.

    Raises: ValueError if the field is no list, or has another length.
    """
    if (value := raw.get(name)) is None:
        return None
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} entries" if isinstance(value, list) else shown(value)
        raise ValueError(f"{name} is {found}; expected a list of {length} entries")
    return value


def read_numbers(raw: dict, name: str, length: int) -> tuple[float, ...]:
    """Return a list of numbers of config.json.

    Raises: ValueError if the field is missing, has another length, or holds anything that is not
        within the bounds.
    """
    values = read_list(raw, name, length)
    if values is None:
        raise ValueError(f"{name} is missing; expected a list of {length} numbers")
    return tuple(float(check_number(name, value, NUMBERS[name])) for value in values)

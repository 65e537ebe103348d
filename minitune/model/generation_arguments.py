"""The arguments of `generate`: prompts with and without padding, lengths, the sampling rule.

The names and their meaning are those of transformers. A setting that the call leaves out comes from
generation_config.json of the model's folder, otherwise from transformers' defaults.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.config.foreign_arguments import ANYTHING, Foreign, Renamed
from minitune.config.numbers import check_number, shown, whole
from minitune.config.training_config import MAX_BYTES, parse_bytes
from minitune.model.sampling import SamplingConfig
from minitune.read_files import read_json

# With do_sample; generation_config.json and the call override them.
SAMPLING_DEFAULTS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}
MAX_NEW_TOKENS = 128  # by default
WHEN_GREEDY = ("repetition_penalty", "min_new_tokens")  # settings that count without a draw
NEUTRAL = {"top_k": 0, "top_p": 1, "min_p": 0}  # values that keep every token
ONE_ANSWER = "beams are not searched; call with do_sample=True and num_return_sequences"
PER_CALL = "pass its values by name, such as max_new_tokens=64"
LOGPROBS = (
    "return_logprobs=True gives the log-probability of each chosen token, and "
    "model(input_ids=ids).logits all logits"
)
FOREIGN = {
    "input_ids": Renamed("prompts"),
    "inputs": Renamed("prompts"),
    "eos_token_id": Renamed("eos_token_ids"),
    "use_cache": Foreign("the key/value cache is always used", ANYTHING),
    "cache_implementation": Foreign("there is one kind of key/value cache", ANYTHING),
    "past_key_values": Foreign("a call starts with an empty cache; pass the whole text"),
    "token_type_ids": Foreign("these models read none; leave it out"),
    "position_ids": Foreign("positions follow from the attention_mask"),
    "inputs_embeds": Foreign("pass token ids"),
    "generation_config": Foreign(PER_CALL),
    "num_beams": Foreign(ONE_ANSWER, (None, 1)),
    "num_beam_groups": Foreign(ONE_ANSWER, (None, 1)),
    "length_penalty": Foreign(ONE_ANSWER, (None, 1, 1.0)),
    "early_stopping": Foreign(ONE_ANSWER, (None, False)),
    "diversity_penalty": Foreign(ONE_ANSWER, (None, 0.0)),
    "penalty_alpha": Foreign("use do_sample, top_p or min_p"),
    "typical_p": Foreign("use top_p or min_p", (None, 1.0)),
    "epsilon_cutoff": Foreign("use min_p", (None, 0.0)),
    "eta_cutoff": Foreign("use min_p", (None, 0.0)),
    "no_repeat_ngram_size": Foreign("use repetition_penalty", (None, 0)),
    "bad_words_ids": Foreign("use repetition_penalty, or filter the answers"),
    "logits_processor": Foreign("use temperature, top_k, top_p, min_p and repetition_penalty"),
    "prefix_allowed_tokens_fn": Foreign("use temperature, top_k, top_p and min_p"),
    "min_length": Foreign("use min_new_tokens", (None, 0)),
    "max_time": Foreign("use max_new_tokens"),
    "stopping_criteria": Foreign("use stop_strings, or an on_token that returns True"),
    "assistant_model": Foreign("there is no speculative decoding"),
    "output_scores": Foreign(LOGPROBS, (None, False)),
    "output_logits": Foreign(LOGPROBS, (None, False)),
    "output_attentions": Foreign("attention weights are never computed", (None, False)),
    "output_hidden_states": Foreign("hidden states are not returned", (None, False)),
    "guidance_scale": Foreign("there is no guidance", (None, 1, 1.0)),
    "renormalize_logits": Foreign("scores are not returned", (None, False)),
    "remove_invalid_values": Foreign("logits that are not finite are an error", (None, False)),
    "suppress_tokens": Foreign("filter the answers"),
    "begin_suppress_tokens": Foreign("use min_new_tokens against an early end"),
    "sequence_bias": Foreign("use repetition_penalty"),
    "disable_compile": Foreign("nothing is compiled by torch", ANYTHING),
    "lora_request": Foreign("use adapter=model.read_adapter(folder)"),
    "sampling_params": Foreign(PER_CALL),
    "synced_gpus": Foreign("the model is on one GPU", (None, False)),
}


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """Return the settings that a model folder names for `generate`, without null values.

    pad_token_id is that of generation_config.json or config.json, otherwise the first EOS token.

    Raises: ValueError if a file cannot be read, or pad_token_id is no whole number.
    """
    config = read_json(folder / "config.json", default={})
    own = read_json(folder / "generation_config.json", default={})
    found = {key: config.get(key) for key in ("pad_token_id", "eos_token_id")} | own
    eos = found.get("eos_token_id")
    if found.get("pad_token_id") is None:
        found["pad_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
    elif type(found["pad_token_id"]) is not int:
        name = "generation_config.json" if own.get("pad_token_id") is not None else "config.json"
        raise ValueError(
            f"{folder / name}: pad_token_id is {found['pad_token_id']!r:.60}; expected a token's id"
        )
    return {key: value for key, value in found.items() if value is not None}


class Prompts(NamedTuple):
    """The prompts of a request.

    ids: the token ids of each prompt, without padding.
    grid: the ids as a tensor (B, T) with padding, or None if they were given as lists.
    """

    ids: list[list[int]]
    grid: Tensor | None

    def repeated(self, times: int) -> "Prompts":
        """Return each prompt `times` times, one behind the other.

        Raises: ValueError if `times` is no whole number from 1 on.
        """
        times = whole_number("num_return_sequences", times)
        ids = [prompt for prompt in self.ids for _ in range(times)]
        grid = None if self.grid is None else self.grid.repeat_interleave(times, 0)
        return Prompts(ids, grid)


def read_prompts(
    prompts: Any, attention_mask: Any, pad_token_id: int | None, end_tokens: Sequence[int]
) -> Prompts:
    """Return the prompts of a call.

    prompts: lists of token ids, a tensor (B, T), or a mapping with input_ids and attention_mask.
    attention_mask: (B, T), 0 for padding, on either side. If there is none, a pad token that ends
        nothing is padding.

    Raises: ValueError if the form is wrong, or a mask is given for lists.
    """
    if isinstance(prompts, Mapping):
        if attention_mask is None:
            attention_mask = prompts.get("attention_mask")
        if "input_ids" not in prompts:
            raise ValueError(f"prompts holds {', '.join(map(str, prompts))}, but no input_ids")
        prompts = prompts["input_ids"]
    if not isinstance(prompts, Tensor):
        if attention_mask is not None:
            raise ValueError(
                "attention_mask belongs to a tensor of prompts; pass input_ids as a tensor too, "
                'as tokenizer(texts, padding=True, return_tensors="pt") makes both'
            )
        return Prompts(_checked_lists(prompts), None)
    if prompts.dim() != 2 or prompts.is_floating_point():
        raise ValueError(
            f"input_ids has the shape {tuple(prompts.shape)} and the dtype {prompts.dtype}; "
            "expected token ids (B, T), as ids[None] for a single prompt"
        )
    host = prompts.cpu()
    if attention_mask is None:
        infers = pad_token_id is not None and pad_token_id not in end_tokens
        mask = host != pad_token_id if infers else torch.ones_like(host, dtype=torch.bool)
    else:
        mask = torch.as_tensor(attention_mask).cpu().bool()
    if mask.shape != host.shape:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} and input_ids {tuple(host.shape)} differ in shape"
        )
    ids = [row[kept].tolist() for row, kept in zip(host, mask, strict=True)]
    return Prompts(ids, prompts)


def _checked_lists(prompts: Any) -> list[list[int]]:
    """Return prompts given as lists.

    Raises: ValueError if they are none, or one of them is no list of token ids.
    """
    listed = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    for prompt in listed:
        is_list = isinstance(prompt, Sequence)
        if not is_list or not all(issubclass(kind, int) for kind in set(map(type, prompt))):
            raise ValueError(
                "prompts are lists of token ids, one for each prompt, "
                "as tokenizer.apply_chat_template makes them"
            )
    return list(map(list, listed))


def check_prompts(model, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if the model cannot continue these prompts."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no empty one")
    if (longest := max(map(len, prompts))) >= model.max_seq_length:
        raise ValueError(
            f"a prompt has {longest} tokens, but the model was loaded for {model.max_seq_length}; "
            "load it with a larger max_seq_length"
        )
    vocab = model.config.vocab_size
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if not 0 <= low <= high < vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"a prompt holds id {wrong}, but the vocabulary has {vocab} rows")


def new_token_limits(
    prompts: Prompts, context: int, max_new_tokens: int | None, max_length: int | None
) -> list[int]:
    """Return the largest number of new tokens of each prompt.

    context: the model's max_seq_length, which ends an answer too.
    max_length: counts a prompt with its padding, as transformers does.

    Raises: ValueError if a limit leaves no room for a token or is no whole number, or both limits
        are given.
    """
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} and max_length {max_length} limit the same thing; "
            "keep max_new_tokens, which leaves the prompt out"
        )
    rooms = [context - len(prompt) for prompt in prompts.ids]
    if max_length is None:
        given = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        limit = whole_number("max_new_tokens", given)
        return [min(limit, room) for room in rooms]
    max_length = whole_number("max_length", max_length)
    widths = [len(row) for row in (prompts.ids if prompts.grid is None else prompts.grid)]
    if max_length <= max(widths):
        raise ValueError(
            f"max_length {max_length} counts the prompt too, which has {max(widths)} tokens; "
            "raise it, or use max_new_tokens"
        )
    return [min(max_length - width, room) for width, room in zip(widths, rooms, strict=True)]


def whole_number(name: str, value: Any) -> int:
    """Return a whole number from 1 on, also one of NumPy or PyTorch.

    Raises: ValueError that names the argument if the value is none.
    """
    return check_number(name, _plain(value), whole(1))


def end_token_ids(given: Any, of_model: Sequence[int]) -> tuple[int, ...]:
    """Return the end tokens of a call: one id or several; None takes those of the model.

    Raises: ValueError if one of them is no whole number.
    """
    if given is None:
        return tuple(of_model)
    ids = given.tolist() if hasattr(given, "tolist") else given
    ids = list(map(_plain, ids)) if isinstance(ids, Iterable) else [ids]
    if not all(type(token) is int for token in ids):
        raise ValueError(
            f"eos_token_ids is {shown(given)}; expected a token's id, or a list of ids"
        )
    return tuple(ids)


def _plain(value: Any) -> Any:
    """Return a whole number in Python's form; any other value stays."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def check_least(min_new_tokens: int, limits: Sequence[int]) -> None:
    """Raise ValueError if no answer has room for its smallest number of tokens."""
    if min_new_tokens > max(limits):
        raise ValueError(
            f"min_new_tokens {min_new_tokens} is more than the {max(limits)} tokens that an answer "
            "may have; lower it, or raise max_new_tokens"
        )


def cache_nbytes(cache_memory: int | str | None) -> int | None:
    """Return the bytes of a cache that is given in bytes or as a size; None stays.

    Raises: ValueError if it is neither.
    """
    if cache_memory is None:
        return None
    nbytes = parse_bytes(cache_memory) if isinstance(cache_memory, str) else cache_memory
    return check_number("cache_memory", nbytes, whole(1, MAX_BYTES))


def sampling_config(
    do_sample: bool | None, named: Mapping[str, Any], defaults: Mapping[str, Any]
) -> SamplingConfig:
    """Return the rule that chooses a token.

    do_sample: True draws, False takes the likeliest token. None draws if the call names a
        temperature above 0, top_k, top_p or min_p, otherwise if `defaults` says do_sample.
    named: the settings of the call under SamplingConfig's names; None if left out.
    defaults: the settings of the model's folder.

    Raises: ValueError if a setting is out of range, or would change nothing.
    """
    if do_sample not in (None, True, False):
        raise ValueError(f"do_sample is {shown(do_sample)}; expected True, False or None")
    named = {key: value for key, value in named.items() if value is not None}
    temperature = named.get("temperature")
    narrowed = [key for key, neutral in NEUTRAL.items() if named.get(key, neutral) != neutral]
    if do_sample is None:
        if temperature is not None:
            do_sample = temperature != 0
        else:
            do_sample = bool(narrowed) or bool(defaults.get("do_sample"))
    known = {key: defaults[key] for key in SAMPLING_DEFAULTS if key in defaults}
    values = SAMPLING_DEFAULTS | known | named
    if do_sample:
        if values["temperature"] == 0:
            raise ValueError(
                "do_sample=True draws a token and temperature 0 takes the likeliest; "
                "name a temperature above 0, or do_sample=False"
            )
        return SamplingConfig(**values)
    unused = narrowed + (["temperature"] if temperature not in (None, 0, 1) else [])
    if unused:
        settings = ", ".join(f"{key}={named[key]}" for key in unused)
        cause = "temperature 0" if temperature == 0 else "do_sample=False"
        raise ValueError(
            f"{cause} takes the likeliest token, so {settings} would change nothing; leave it out, "
            "or set temperature above 0"
        )
    return SamplingConfig(**{name: values[name] for name in WHEN_GREEDY if name in values})

"""The adapter of each prompt of a call of `generate`."""

from collections.abc import Mapping, Sequence
from typing import Any

from minitune.model.adapter_switch import Adapter, own_adapter


def read_adapter_choice(model, choice: Any, prompts: int) -> tuple[list[Adapter], list[int]]:
    """Return the adapters of a call, and the index of each prompt's adapter.

    choice: None for the model's own adapter, False for the base without one, or an adapter of
        `model.read_adapter`; or a list with one of these for each prompt.
    prompts: number of prompts.

    Raises: ValueError if the choice is none of these, or a list of another length.
    """
    choices = list(choice) if isinstance(choice, Sequence) and not isinstance(choice, str) else None
    if choices is not None and len(choices) != prompts:
        raise ValueError(
            f"adapter lists {len(choices)}, but there are {prompts} prompts; list one for each "
            "prompt, or pass a single one"
        )
    own = own_adapter(model)
    linears = {linear for fused in model.fused_linears() for linear in fused.linears}
    adapters: list[Adapter] = []
    indices = []
    for one in [choice] * prompts if choices is None else choices:
        adapter = own if one is None else {} if one is False else one
        if not isinstance(adapter, Mapping) or not linears.issuperset(adapter):
            raise ValueError(
                f"adapter is {_kind(adapter)}; expected None (the model's own), False (the base), "
                "or what model.read_adapter(folder) of the same model returns"
            )
        if adapter not in adapters:
            adapters.append(adapter)
        indices.append(adapters.index(adapter))
    return adapters, indices


def _kind(adapter: Any) -> str:
    """Return a value in a few words."""
    return "another model's" if isinstance(adapter, Mapping) else repr(adapter)[:80]

"""A check that two model configs compute the same, whatever their config.json files say."""

import dataclasses

import torch

from minitune.config.model_config import ModelConfig
from minitune.config.rope_config import RopeConfig
from minitune.model.rope import RopeTables


def check_same_model(found: ModelConfig, expected: ModelConfig, rounding: float = 0.0) -> None:
    """Check that the config of a GGUF file computes what the config of its folder computes.

    A sliding window that llama.cpp has no key for is not expected.

    rounding: accepted difference of cos and sin.
    """
    kinds = expected.layer_kinds
    if expected.architecture.gguf.window is None:
        kinds = tuple(kind._replace(window=None) for kind in kinds)
    assert found.layer_kinds == kinds
    for rope, other in zip(found.ropes, expected.ropes, strict=True):
        _check_same_rotation(rope, other, rounding)
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    for name in names - {"raw", "ropes", "layer_kinds", "architecture"}:
        assert getattr(found, name) == getattr(expected, name), name
    assert found.architecture.gguf.name == expected.architecture.gguf.name
    assert found.tensor_shapes() == expected.tensor_shapes()


def _check_same_rotation(rope: RopeConfig, expected: RopeConfig, rounding: float) -> None:
    cpu = torch.device("cpu")
    for positions in (1, 8, 9, 256, 2000):
        ours, theirs = (RopeTables.build(r, positions, cpu) for r in (rope, expected))
        assert torch.allclose(ours.cos, theirs.cos, 0.0, rounding)
        assert torch.allclose(ours.sin, theirs.sin, 0.0, rounding)
        assert (ours.query_scale is None) == (theirs.query_scale is None)
        if theirs.query_scale is not None:
            assert torch.equal(ours.query_scale, theirs.query_scale)

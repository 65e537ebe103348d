"""The config.json of a GGUF file is that of the folder that was exported."""

import dataclasses
import warnings

import pytest
import torch
from gguf_files import LLAMA3_ROPE
from tiny import make_tiny_model
from tiny_families import FAMILIES, make_tiny_family

from minitune.config.model_config import ModelConfig
from minitune.gguf.export import convert_folder
from minitune.gguf.open_gguf import open_gguf, read_config
from minitune.model.rope import RopeTables

# Cases that llama.cpp cannot express (tests/test_gguf_refused.py).
INEXPRESSIBLE = {
    "qwen3 with biases",
    "olmo2 tied",
    "olmo3 with two thetas",
    "gemma3 untied",
    "gemma3 with a scale",
}
LLAMAS = {
    "plain": {},
    "a head of its own, biases, wide heads": {
        "tie": False,
        "attention_bias": True,
        "head_dim": 32,
    },
    "llama3": {"rope_scaling": LLAMA3_ROPE, "head_dim": 64},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def exported(folder, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows that llama.cpp ignores
        return convert_folder(folder, path, "f16", verify=False)


def check_same_model(folder, path):
    """Check that the config of a file computes what the config of its folder computes."""
    ours = ModelConfig.from_dict(read_config(open_gguf(path)))
    theirs = ModelConfig.from_folder(folder)
    kinds = theirs.layer_kinds
    if theirs.architecture.gguf.window is None:  # llama.cpp computes without the window
        kinds = tuple(kind._replace(window=None) for kind in kinds)
    assert ours.layer_kinds == kinds
    assert len(ours.ropes) == len(theirs.ropes)
    for rope, expected in zip(ours.ropes, theirs.ropes, strict=True):
        check_same_rotation(rope, expected)
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    for name in names - {"raw", "ropes", "layer_kinds", "architecture"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.architecture.gguf.name == theirs.architecture.gguf.name
    assert ours.tensor_shapes() == theirs.tensor_shapes()


def check_same_rotation(rope, expected):
    for positions in (1, 8, 9, 256, 2000):
        ours, theirs = (RopeTables.build(r, positions, "cpu") for r in (rope, expected))
        assert torch.equal(ours.cos, theirs.cos)
        assert torch.equal(ours.sin, theirs.sin)
        assert (ours.query_scale is None) == (theirs.query_scale is None)
        if theirs.query_scale is not None:
            assert torch.equal(ours.query_scale, theirs.query_scale)


@pytest.mark.parametrize("case", sorted(FAMILIES.keys() - INEXPRESSIBLE))
def test_a_family_comes_back_from_its_file(tmp_path, case):
    folder = make_tiny_family(tmp_path / "base", case)
    check_same_model(folder, exported(folder, tmp_path / "x.gguf"))


@pytest.mark.parametrize("case", LLAMAS)
def test_a_llama_comes_back_from_its_file(tmp_path, case):
    folder = make_tiny_model(tmp_path / "base", **LLAMAS[case])
    path = exported(folder, tmp_path / "x.gguf")
    check_same_model(folder, path)
    raw = read_config(open_gguf(path))
    assert raw["rms_norm_eps"] == 1e-5
    if case == "llama3":
        assert raw["rope_scaling"] == LLAMA3_ROPE

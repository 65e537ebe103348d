"""Compiled steps of the searches: used for large models with a compiler, and never an error."""

import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from referees.ggml_quantizers import seeded_importance, seeded_inputs

from minitune.gguf.quantization import fusion
from minitune.gguf.quantization.k_searches import EAGER_STEPS, Steps
from minitune.gguf.quantization.quantize import dequantize, quantize

CPU = torch.device("cpu")
LARGE = {GGMLType.Q4_K: fusion.VALUES_A_THREAD * 1024}


@pytest.fixture
def traced(monkeypatch):
    """Return steps that PyTorch traces but does not compile, and offer them as the compiled."""
    steps = Steps(*(torch.compile(step, backend="eager", dynamic=True) for step in EAGER_STEPS))
    monkeypatch.setattr(fusion, "compiled_steps", lambda: steps)
    monkeypatch.setattr(fusion.shutil, "which", lambda name: "/usr/bin/g++")
    return steps


@pytest.mark.parametrize("with_importance", [False, True])
def test_a_large_model_is_quantised_with_compiled_steps(traced, with_importance):
    steps = fusion.choose_steps(LARGE, CPU, with_importance)
    assert steps is traced
    values = torch.from_numpy(seeded_inputs()["Gaussian"]).view(-1, 256)
    importance = torch.from_numpy(seeded_importance())[:256] if with_importance else None
    eager = quantize(values, GGMLType.Q4_K, importance)
    fused = quantize(values, GGMLType.Q4_K, importance, steps)
    assert (fused == eager).all(1).float().mean() >= 0.95
    errors = [
        dequantize(data, GGMLType.Q4_K).sub(values).square().mean() for data in (eager, fused)
    ]
    torch.testing.assert_close(errors[1], errors[0], rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("counts", "device"),
    [
        ({GGMLType.Q4_K: 1 << 20}, CPU),
        ({GGMLType.Q8_0: fusion.VALUES_A_THREAD * 1024}, CPU),
        (LARGE, torch.device("cuda")),
    ],
)
def test_small_models_other_types_and_gpus_keep_eager_steps(traced, counts, device):
    assert fusion.choose_steps(counts, device, False) is EAGER_STEPS


def test_without_a_compiler_the_steps_are_eager(traced, monkeypatch):
    monkeypatch.setattr(fusion.shutil, "which", lambda name: None)
    assert fusion.choose_steps(LARGE, CPU, False) is EAGER_STEPS


def test_a_compiler_that_fails_leaves_the_steps_eager(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("g++: error: no space left on device")

    monkeypatch.setattr(fusion.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(fusion, "compiled_steps", lambda: Steps(*[fail] * len(EAGER_STEPS)))
    assert fusion.choose_steps(LARGE, CPU, False) is EAGER_STEPS

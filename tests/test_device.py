"""The choice of device and dtype, and the free memory of a host with limits."""

import pytest
import torch

from minitune import device
from minitune.device import choose_device, choose_dtype, free_memory, is_bfloat16_supported

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch):
    """Make torch report two GPUs of compute capability 7.5, the second one current."""
    for name, value in {
        "is_available": True,
        "device_count": 2,
        "current_device": 1,
        "get_device_capability": (7, 5),
        "get_device_name": "Tesla T4",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")],
)
def test_a_gpu_is_chosen_with_its_index(two_gpus, asked, chosen):
    assert choose_device(asked) == torch.device(chosen)


def test_a_gpu_that_torch_does_not_see_is_refused(two_gpus):
    with pytest.raises(ValueError, match="cuda:2 was asked for, but torch sees 2 CUDA GPUs"):
        choose_device("cuda:2")


def test_dtypes_are_taken_by_name_or_chosen_for_the_device(two_gpus):
    assert choose_dtype("float16", CPU) == torch.float16
    assert choose_dtype(None, CPU) == torch.float32
    for wrong in ("int8", "half precision", torch.float64):
        with pytest.raises(ValueError, match=r"not supported; choose one of torch\.float32, "):
            choose_dtype(wrong, CPU)


def test_bfloat16_is_refused_on_a_gpu_without_it(two_gpus):
    gpu = torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"Tesla T4 has no bfloat16.*; pass dtype='float16'"):
        choose_dtype("bfloat16", gpu)
    for asked in (None, "float16", torch.float16):
        assert choose_dtype(asked, gpu) == torch.float16
    assert choose_dtype("float32", gpu) == torch.float32
    assert not is_bfloat16_supported(gpu)


def test_the_default_of_a_gpu_with_bfloat16_is_bfloat16(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert choose_dtype(None, torch.device("cuda:1")) == torch.bfloat16


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (3, 7)])
def test_a_gpu_that_the_kernels_do_not_run_on_is_refused_by_name(two_gpus, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    number = ".".join(map(str, capability))
    message = f"Tesla T4 has compute capability {number}, but .* need 7.5, .* or device='cpu'"
    for asked in (None, "cuda", "cuda:0"):
        with pytest.raises(ValueError, match=message):
            choose_device(asked)
    assert choose_device("cpu") == CPU


def test_free_host_memory_lies_within_the_limits_of_all_cgroups(tmp_path, monkeypatch):
    limits = {"inner": ("max\n", "0\n"), "outer": (f"{96 << 20}\n", f"{32 << 20}\n")}
    for name, (limit, used) in limits.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.max").write_text(limit)
        (tmp_path / name / "memory.current").write_text(used)
    folders = [tmp_path / "inner", tmp_path / "outer", tmp_path]
    monkeypatch.setattr(device, "cgroup_folders", lambda controller: folders)
    assert free_memory(CPU) == 64 << 20

"""Tests of the machine's rates: measured once, cached in a file, which may be broken."""

import pytest
import torch

from minitune.kernels import backend
from minitune.memory import device_rates
from minitune.memory.device_rates import DeviceRates, machine_rates

FOUND = {"matmul": 2e14, "copy": 1e12, "to_host": 2e10, "from_host": 3e10}


def test_rates_are_measured_once_and_a_broken_cache_is_measured_again(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(backend, "has_tensor_core_kernels", lambda device: True)
    monkeypatch.setattr(device_rates, "measure", lambda device: measured.append(device) or FOUND)
    for content in (
        None,
        None,
        "not JSON",
        '{"A100, torch": 3}',
        f'{{"A100, torch {torch.__version__}": {{"copy": 1}}}}',
    ):
        if content:
            (tmp_path / "minitune" / "rates.json").write_text(content)
        machine_rates.cache_clear()
        assert machine_rates(torch.device("cuda:0")) == DeviceRates(**FOUND)
    assert len(measured) == 4
    machine_rates.cache_clear()


def test_attention_is_slower_beside_matmuls_on_a_gpu_without_kernels_for_its_tensor_cores(
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(device_rates, "measure", lambda device: FOUND)
    monkeypatch.setattr(backend, "has_tensor_core_kernels", lambda device: False)
    found = machine_rates.__wrapped__(torch.device("cuda:0"))
    assert found.attention == found.cudnn == device_rates.FMA_ATTENTION < DeviceRates().attention
    assert found.matmul == FOUND["matmul"]


def test_a_cpu_has_the_default_rates():
    assert machine_rates(torch.device("cpu")) == DeviceRates()


@pytest.mark.gpu
def test_rates_of_a_real_gpu_are_within_those_of_known_gpus():
    found = device_rates.measure(torch.device("cuda"))
    print(found)
    assert 1e13 < found["matmul"] < 5e15
    assert 1e11 < found["copy"] < 2e13
    assert 1e9 < found["to_host"] < 1e12
    assert 1e9 < found["from_host"] < 1e12

"""The command `minitune doctor`: table, JSON, exit codes, and the rows of the machine."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model
from training_runs import make_smallest_model, new_trainer
from weight_folders import edit_json, edit_tensors

from minitune.commands import doctor
from minitune.doctor import examine, machine, random_model, report, versions
from minitune.doctor.report import FAIL, PASS, SKIPPED, Finding, Report, passed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture
def few_checks(monkeypatch):
    """Leave one check of a model, and make the random model smaller."""
    kept = {"kernel rms_norm": examine.KERNELS["kernel rms_norm"]}
    for name, checks in (("KERNELS", kept), ("TRAINING", {}), ("FILES", {})):
        monkeypatch.setattr(examine, name, checks)
    monkeypatch.setattr(random_model, "CONFIG", random_model.CONFIG | SMALL)


@pytest.fixture
def empty_tmp(tmp_path, monkeypatch):
    """Make an empty folder the temporary one, and return it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def rows_of(capsys, *arguments):
    """Run the command with --json; return its exit code and its rows by name."""
    code = doctor.main(["--device", "cpu", "--json", *map(str, arguments)])
    found = capsys.readouterr()
    assert found.err == ""
    content = json.loads(found.out)
    assert content["passed"] == (code == 0)
    return code, {row["name"]: row for row in content["checks"]}


# ---- the command


def test_all_checks_pass_without_a_model_and_no_file_stays(monkeypatch, capsys, empty_tmp):
    monkeypatch.setattr(random_model, "CONFIG", random_model.CONFIG | SMALL)
    assert doctor.main(["--device", "cpu"]) == 0
    found = capsys.readouterr()
    *rows, last = found.out.splitlines()
    names = [*examine.MODEL, *examine.KERNELS, *examine.TRAINING, *examine.FILES]
    assert [row[: report.NAME_WIDTH].strip() for row in rows[-len(names) :]] == names
    assert all(row[report.NAME_WIDTH :].startswith((PASS, SKIPPED)) for row in rows)
    assert " 0 failed, " in last and last.endswith(" s")
    assert not list(empty_tmp.glob("minitune-doctor-*"))


def test_a_failed_check_gives_exit_code_1_and_its_message(few_checks, monkeypatch, capsys):
    def broken(subject):
        raise RuntimeError("no kernel\nimage for this GPU")

    monkeypatch.setattr(examine, "KERNELS", {"kernel x": broken})
    code, rows = rows_of(capsys)
    assert code == 1
    assert rows["kernel x"]["status"] == FAIL
    assert rows["kernel x"]["text"] == "RuntimeError: no kernel image for this GPU"
    assert doctor.main(["--device", "cpu"]) == 1
    assert "kernel x                            FAIL     RuntimeError: no kernel image for" in (
        capsys.readouterr().out
    )


def test_a_model_that_does_not_load_fails_its_row_and_skips_the_others(
    few_checks, capsys, tmp_path
):
    folder = make_tiny_model(tmp_path / "m")
    edit_json(folder / "config.json", hidden_size=96)
    code, rows = rows_of(capsys, "--model", folder)
    assert code == 1 and rows["model"]["status"] == FAIL
    assert "model.safetensors" in rows["model"]["text"]
    assert rows["kernel rms_norm"]["text"] == "the model was not loaded"


def test_a_run_is_checked_with_the_settings_of_its_adapter(few_checks, capsys, tmp_path):
    folder = make_smallest_model(tmp_path / "m")
    new_trainer(folder, tmp_path / "run", max_steps=1).train()
    capsys.readouterr()
    code, rows = rows_of(capsys, "--model", tmp_path / "run")
    assert code == 0
    assert "r 4 on all linears" in rows["model"]["text"]
    other = make_tiny_model(tmp_path / "other")
    code, rows = rows_of(capsys, "--model", other, "--adapter", tmp_path / "run")
    assert code == 1 and "adapter_model.safetensors: lacks " in rows["model"]["text"]


def test_a_damaged_weight_is_named(few_checks, capsys, tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    code, rows = rows_of(capsys, "--model", folder)
    assert code == 1 and "model.norm.weight" in rows["model"]["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder/m"], "model folder no/such/folder/m does not exist"),
        (["--adapter", "runs/1"], "--adapter needs its base model"),
        (["--device", "tpu"], "expected cpu, cuda"),
        (["--dtype", "int8"], "dtype is 'int8'; expected one of float32"),
        (["--jsn"], "did you mean --json?"),
        (["--r", "0"], "r is 0"),
    ],
)
def test_wrong_usage_gives_exit_code_2_and_one_line(capsys, arguments, message):
    assert doctor.main(arguments) == 2
    found = capsys.readouterr()
    assert found.out == "" and message in found.err and found.err.count("\n") == 1


def test_checks_that_begin_too_late_are_skipped_by_name():
    late = Report(show=lambda row: None, limit=-1)
    found = late.check("row", lambda: passed("in time"))
    assert found.status == SKIPPED and "not begun" in found.text and not late.has_failed


def test_a_row_prints_nothing_of_its_own(capsys):
    def loud() -> Finding:
        print("on stdout")
        return passed("quiet")

    Report(show=lambda row: None).check("row", loud)
    assert capsys.readouterr().out == ""


# ---- versions


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("2.10.0", ">=2.10", True),
        ("2.9.1+cu126", ">=2.10", False),
        ("3.6", ">=3.6,<3.10", True),
        ("3.10.0", ">=3.6,<3.10", False),
        ("3.9.1rc1", ">=3.6,<3.10", True),
        ("1.0", "!=1.0.0", False),
        ("1", "==1.0", True),
        ("5.0", "", True),
    ],
)
def test_versions_are_compared_number_by_number(version, bounds, expected):
    assert versions.is_within(version, bounds) == expected


def test_the_bounds_are_those_of_pyproject_and_of_the_installed_metadata(monkeypatch):
    bounds = versions.stated_bounds()
    assert bounds["torch"].startswith(">=2.") and bounds["triton"] == ">=3.6,<3.10"
    assert set(bounds) >= {"python", *versions.PACKAGES}

    class Installed:
        requires = ("torch>=9.1", "triton<3.10,>=3.6; sys_platform == 'linux' and extra == 'test'")
        metadata = {"Requires-Python": ">=3.11"}  # noqa: RUF012

    monkeypatch.setattr(versions, "PYPROJECT", Path("missing"))
    monkeypatch.setattr(versions, "distribution", lambda name: Installed)
    expected = {"python": ">=3.11", "torch": ">=9.1", "triton": "<3.10,>=3.6"}
    assert versions.stated_bounds() == expected
    assert versions.check_version("torch", CPU).status == FAIL


def test_a_missing_package_fails_and_a_missing_triton_fails_on_a_gpu_only(monkeypatch):
    def missing(name):
        raise versions.PackageNotFoundError

    monkeypatch.setattr(versions, "version", missing)
    monkeypatch.setattr(versions, "triton", None)
    assert versions.check_version("gguf", CPU).text == "not installed; expected >=0.17"
    assert versions.check_version("gguf", CPU).status == FAIL
    assert versions.check_version("triton", CPU).status == SKIPPED
    assert versions.check_version("triton", GPU).status == FAIL


# ---- the machine


@pytest.fixture
def other_gpu(monkeypatch):
    """Let torch see a GPU of capability 7.5 with a driver for CUDA 12, and CUDA 13 in torch."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(machine, "_supported_cuda", lambda: 12080)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_gpu_without_bfloat16_and_an_old_driver_fail(other_gpu):
    assert machine.check_gpu(GPU, torch.bfloat16).status == FAIL
    assert machine.check_gpu(GPU, torch.float32).status == PASS
    found = machine.check_driver(GPU)
    assert found.status == FAIL and "CUDA 12; torch is built for CUDA 13.0" in found.text


def test_the_version_of_the_driver_is_read_from_its_line(monkeypatch, tmp_path):
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build"
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    assert machine._driver_version() == "driver of unknown version"
    machine.DRIVER.write_text(f"{line}  (root@host)\nGCC version: gcc 13.3.0\n")
    assert machine._driver_version() == "driver 580.159.04"


def test_a_gpu_that_torch_does_not_see_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    found = machine.check_gpu(CPU, torch.float32)
    assert found.status == FAIL and "install a CUDA build of torch" in found.text


def test_memory_that_is_used_up_fails(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 1 << 20)
    total = type("Properties", (), {"total_memory": 1 << 34})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    assert machine.check_host_memory().status == FAIL
    assert machine.check_gpu_memory(GPU).status == FAIL


def test_a_full_disk_fails(monkeypatch, tmp_path):
    assert machine.check_disk(tmp_path, 1).status == PASS
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5}))
    assert machine.check_disk(tmp_path, 6).status == FAIL


def test_a_missing_compiler_fails(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert machine.check_compiler(GPU).text == "/usr/bin/gcc"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert machine.check_compiler(GPU).status == FAIL
    monkeypatch.setenv("CC", "tcc")
    assert machine.check_compiler(GPU).text.startswith("$CC is tcc, which is not found")


def test_folders_that_are_not_writable_fail(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    assert machine.check_triton_cache(GPU).status == PASS
    assert machine.check_temporary_folder().status == PASS

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    for found in (machine.check_triton_cache(GPU), machine.check_temporary_folder()):
        assert found.status == FAIL and "is not writable (Read-only file system); set" in found.text

    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert machine.check_temporary_folder().status == FAIL

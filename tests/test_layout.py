"""The package as it is laid out: the kernels' door, the public names, what a wheel holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path, *options: str) -> str:
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


def test_kernels_are_imported_through_the_door_and_leave_their_plain_name_free(tmp_path):
    code = f"""import sys; sys.path.append({str(ROOT)!r})
import minitune.kernels.rms_norm as m; print(m.__file__); print("kernels" in sys.modules)"""
    assert run(code, tmp_path).split() == [str(ROOT / "kernels" / "rms_norm.py"), "False"]


def test_public_names_are_those_of_the_snippet():
    import minitune

    assert {"FastLanguageModel", "SFTTrainer", "SFTConfig"} <= set(minitune.__all__)
    assert all(hasattr(minitune, name) for name in minitune.__all__)


def test_a_wheel_holds_the_kernels_inside_the_package_and_imports_from_there(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for name in ("minitune", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(f"import setuptools.build_meta as b; b.build_wheel({str(wheels)!r})", source)
    site = tmp_path / "site"
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(site)
    assert {p.name for p in site.iterdir() if p.suffix != ".dist-info"} == {"minitune"}
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import minitune.kernels.rms_norm as m; print(m.__file__)"
    assert Path(run(code, tmp_path, "-B").strip()) == site / "minitune" / "kernels" / "rms_norm.py"

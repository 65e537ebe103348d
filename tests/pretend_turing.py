"""A GPU that stands in for one of compute capability 7.5, such as a T4.

PyTorch reports the capability, and the kernels get 64 KiB of shared memory. Triton lowers kernels
for sm_75 if TRITON_OVERRIDE_ARCH says so, and then assembles them for the GPU that is there. So
products become fused multiply-adds, and no load is asynchronous. Products of bfloat16 are refused,
because cuBLAS has none on such a GPU.

    python -m pytest -p pretend_turing ...      runs tests on the stand-in
    python tests/pretend_turing.py MODEL OUT    trains, resumes, generates and exports on it

The program needs --as-it-is to do the same on the GPU as it is. It prints a JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import adapter_bytes, new_trainer, read_metrics

from minitune.kernels import backend

CAPABILITY = (7, 5)
SHARED_MEMORY = 64 << 10  # bytes
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
PROMPT = "3 lamps to Oslo"


class NoBfloat16Products(TorchDispatchMode):
    """A mode that refuses products of bfloat16 on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Run the operation.

        Raises: AssertionError if it is a product of bfloat16 on a GPU.
        """
        if func.overloadpacket.__name__ in PRODUCTS:
            tensors = [x for x in args if isinstance(x, torch.Tensor) and x.is_cuda]
            assert torch.bfloat16 not in {x.dtype for x in tensors}, f"{func} in bfloat16"
        return func(*args, **(kwargs or {}))


def pretend_turing() -> None:
    """Make PyTorch and the kernels see a GPU of compute capability 7.5."""
    triton.runtime.driver.active.get_current_target()  # Triton keeps the function of the true GPU
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    backend.shared_memory_limit = lambda device: SHARED_MEMORY
    assert not backend.has_tensor_core_kernels(torch.device("cuda", 0))


def pytest_configure(config) -> None:
    """Run all tests on the stand-in."""
    pretend_turing()


def run_everything(folder: Path, output: Path) -> dict[str, Any]:
    """Train in NF4, resume, generate, merge and write GGUF files; return what came out.

    folder: model that is trained.
    output: folder that all files go to.
    """
    dtype = None if torch.cuda.get_device_capability() == CAPABILITY else "float16"
    settings = {
        "model_options": {"device": "cuda", "dtype": dtype, "load_in_4bit": True},
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    run = output / "run"
    trainer = new_trainer(folder, run, **settings)
    trainer.train()
    expected, losses = adapter_bytes(run), [r["loss"] for r in read_metrics(run) if "loss" in r]
    resumed = new_trainer(folder, run, **settings)
    resumed.train(resume_from_checkpoint=run / "checkpoint-2")
    model, tokenizer = resumed.model, resumed.processing_class
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    answer = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    model.save_pretrained_merged(output / "merged", tokenizer, save_method="merged_16bit")
    methods = ["f16", "q8_0", "q4_k_m"]
    files = model.save_pretrained_gguf(output / "gguf", tokenizer, quantization_method=methods)
    return {
        "dtype": str(model.dtype),
        "losses": losses,
        "same bits": adapter_bytes(run) == expected,
        "new tokens": answer.shape[1] - ids.shape[1],
        "files": len(files),
        "merged": sorted(path.suffix for path in (output / "merged").glob("*.safetensors")),
    }


if __name__ == "__main__":
    if "--as-it-is" not in sys.argv:
        pretend_turing()
    with NoBfloat16Products():
        print(json.dumps(run_everything(Path(sys.argv[1]), Path(sys.argv[2]))))

"""Every kernel compiles for every supported GPU and fits its shared memory, shown without a GPU.

This file is also the program that compiles, in a process of its own, because the other tests may
have imported Triton as an interpreter. It calls the public functions on tensors without data
("meta") with the shapes of real models. Launches are recorded instead of run, with the arguments,
block sizes, warps and stages of a real launch, and then compiled.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from kernel_launches import EMBEDDING_TYPES, MetaTensors, launch_all

from minitune.kernels import (
    backend,
)
from minitune.kernels.ggml_reference import BLOCK_SIZES

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # sm -> KiB of a program
KERNELS = {
    "_adamw",
    "_add_few_row_sums",
    "_add_splits",
    "_attention_dkdv",
    "_attention_dq",
    "_attention_fwd",
    "_attention_sum",
    "_choose_among_blocks",
    "_choose_in_blocks",
    "_cross_entropy",
    "_decode_attention",
    "_dequantize",
    "_dequantize_ggml",
    "_embed",
    "_embed_ggml",
    "_few_row_products",
    "_gated_activation_bwd",
    "_gated_activation_fwd",
    "_qk_norm_rope",
    "_rms_norm_bwd",
    "_rms_norm_fwd",
    "_root_of_sum",
    "_rope",
    "_square_sums",
    "_store_keys_values",
    "_write_adapters",
}
# Kernels with blocks of the model's widths.
SHAPED = r"_attention|_decode_attention|_qk_norm_rope|_rope|_rms_norm"
# The same without a soft cap, which takes no shared memory.
UNCAPPED = rf"(?!.*'TANH_SCALE': 0\.0*[1-9])(?:{SHAPED})"
# (model, dtype, rows, pattern of kernels) for every GPU with bfloat16, and further ones for some
CASES = [("Llama-3.1-8B", torch.bfloat16, 2048, "")]
CASES_WITHOUT_BFLOAT16 = [("Llama-3.1-8B", torch.float16, 2048, "")]
MORE_CASES = {
    75: [
        ("SmolLM2-135M", torch.float16, 2048, UNCAPPED),
        ("heads of 256", torch.float16, 2048, UNCAPPED),
        ("heads of 256", torch.float32, 2048, UNCAPPED),
    ],
    86: [
        ("SmolLM2-135M", torch.bfloat16, 2048, UNCAPPED),
        ("SmolLM2-135M", torch.float32, 2048, ""),
    ],
    90: [
        ("SmolLM2-135M", torch.bfloat16, 2048, ""),
        ("heads of 96", torch.bfloat16, 2048, UNCAPPED),
        ("heads of 256", torch.bfloat16, 2048, SHAPED),
        ("SmolLM2-135M", torch.float16, 1, ""),
    ],
}
# A launch depends on the GPU through its shared memory, and in attention alone. So a GPU with as
# much as sm 86 has the launches of sm 86, and compiles one of each kernel. sm 80 compiles all of
# attention too.
FEW_LAUNCHES = {80: ("_attention",), 89: (), 120: ()}


def recorded_launches(
    arch: int, model: str, dtype: torch.dtype, rows: int, ggml_types: Iterable[str]
) -> dict[str, tuple]:
    """Return name -> (source, target, options) of each distinct launch."""
    target = GPUTarget("cuda", arch, 32)
    compiler = make_backend(target)
    launches = {}

    def record(self, *args, grid, warmup, **kwargs):
        kwargs["debug"] = False
        binder = jit.create_function_from_signature(self.signature, self.params, compiler)
        bound, specialization, options = binder(*args, **kwargs)
        packed = self._pack_args(compiler, kwargs, bound, specialization, options)
        options, signature, constants, attributes = packed
        named = {self.arg_names[path[0]]: value for path, value in constants.items()}
        types = ", ".join(map(str, signature.values()))
        name = f"{self.__name__}({types}) {named} {options.num_warps}x{options.num_stages}"
        source = ASTSource(self, signature, constants, attributes)
        launches[name] = source, target, options.__dict__

    jit.JITFunction.run = record
    backend.use_triton = lambda x: True
    backend.shared_memory_limit = lambda device: SHARED_MEMORY[arch] * 1024
    backend.has_tensor_core_kernels = lambda device: arch >= 80
    backend.has_dependent_launches = lambda device: arch >= 90
    launch_all(MetaTensors(model, dtype, rows), ggml_types)
    return launches


def compile_all(arch: int, first: int | None, pattern: str = "") -> dict[str, int]:
    """Return launch -> its bytes of shared memory, compiled for one GPU.

    first: number of cases that are compiled, or None for all.
    pattern: regular expression that the compiled launches match from their begin.
    """
    launches = {}
    for_all = CASES if arch >= 80 else CASES_WITHOUT_BFLOAT16
    for case in [*for_all, *MORE_CASES.get(arch, ())][:first]:
        *tensors, kernels = case
        # The code of a type hardly depends on the model or the GPU: two GPUs compile all types.
        all_types = case == for_all[0] and arch in (75, 90) and first is None
        types = BLOCK_SIZES if all_types else EMBEDDING_TYPES
        found = recorded_launches(arch, *tensors, types)
        launches |= {name: launch for name, launch in found.items() if re.match(kernels, name)}
    if arch in FEW_LAUNCHES:
        launches = few_launches(launches, FEW_LAUNCHES[arch])
    return {
        name: triton.compile(source, target=target, options=options).metadata.shared
        for name, (source, target, options) in launches.items()
        if re.match(pattern, name)
    }


def few_launches(launches: dict[str, tuple], all_of: tuple[str, ...]) -> dict[str, tuple]:
    """Return the first launch of each kernel, and all of kernels whose names begin so."""
    firsts = {name.split("(")[0]: name for name in reversed(launches)}.values()
    return {
        name: launch
        for name, launch in launches.items()
        if name in firsts or name.startswith(all_of)
    }


@pytest.fixture
def triton_cache(pytestconfig):
    """Return the folder of kernels that earlier runs of the same sources compiled."""
    return pytestconfig.cache.mkdir("triton")


def compiled_sizes(arch, cache, *arguments):
    """Return `compile_all` of these arguments, computed in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(arch), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check_that_all_compile(arch, cache, *first):
    compiled = compiled_sizes(arch, cache, *first)
    assert {name.split("(")[0] for name in compiled} == KERNELS
    limit = SHARED_MEMORY[arch] * 1024
    assert not {name: shared for name, shared in compiled.items() if shared > limit}


def test_every_kernel_compiles_for_one_model_and_the_least_shared_memory(triton_cache):
    check_that_all_compile(86, triton_cache, 1)


def test_attention_fits_into_the_shared_memory_of_a_gpu_without_bfloat16(triton_cache):
    # Those with a soft cap take as much.
    compiled = compiled_sizes(75, triton_cache, 1, "_attention.*'TANH_SCALE': 0.0,")
    assert len(compiled) == 3
    assert max(compiled.values()) <= SHARED_MEMORY[75] * 1024


@pytest.mark.slow  # a minute or two each
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_compiles_and_fits_into_shared_memory(arch, triton_cache):
    check_that_all_compile(arch, triton_cache)


def test_the_list_of_kernels_holds_every_launch_in_the_sources():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    launched = set(re.findall(r"^ +(_\w+)\[.+\]\(", sources, flags=re.MULTILINE))
    assert launched == KERNELS


if __name__ == "__main__":
    first = int(sys.argv[2]) if sys.argv[2:] else None
    print(json.dumps(compile_all(int(sys.argv[1]), first, *sys.argv[3:])))

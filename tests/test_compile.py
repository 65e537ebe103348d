"""Every kernel compiles for every supported GPU and fits its shared memory, shown on a machine without any.

This file is also the program that does it, in processes of their own, since the other tests may have imported Triton
as an interpreter. The public functions are called on tensors without data ("meta") of real models' shapes; launches
are recorded instead of run, with the very arguments, block sizes, warps and stages of a real one, and then compiled.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a program may use
MODELS = {  # D, H, G, K, F, V
    "SmolLM2-135M": (576, 9, 3, 64, 1536, 49152),
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336, 128256),
    "heads of 96": (576, 6, 2, 96, 1536, 49152),
    "heads of 256": (512, 2, 1, 256, 1536, 49152),
}
KERNELS = {
    "_adamw", "_embed", "_root_of_sum", "_square_sums",
    "_attention_dkdv", "_attention_dq", "_attention_fwd", "_attention_sum", "_cross_entropy", "_dequantize",
    "_rms_norm_bwd", "_rms_norm_fwd", "_rope", "_swiglu_bwd", "_swiglu_fwd", "_write_adapters",
}  # fmt: skip
TASKS = [(arch, model, "bfloat16", 2048) for arch in SHARED_MEMORY for model in list(MODELS)[:2]]
TASKS += [(90, model, "bfloat16", 2048) for model in list(MODELS)[2:]]
TASKS += [(86, "SmolLM2-135M", "float32", 2048), (90, "SmolLM2-135M", "float16", 1)]
ROOT = Path(__file__).parents[1]


def forward_and_backward(model, dtype, rows):
    """Launches every kernel as a decoder layer and the loss do."""
    import torch

    from minitune.kernels import (
        adamw,
        attention,
        cross_entropy,
        dequantize,
        embedding,
        lora_linear,
        rms_norm,
        rope,
        swiglu,
    )

    D, H, G, K, F, V = MODELS[model]
    N, R = rows, 16

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = D * F // 64
    nested = (
        new(-(-blocks // 256), dtype=torch.float32),
        new(256, dtype=torch.float32),
        new(dtype=torch.float32),
    )
    packed, code = new(D * F // 2, dtype=torch.uint8), new(16, dtype=torch.float32)
    plain = dequantize.QuantizedWeight(packed, new(blocks, dtype=torch.float32), code, (F, D))
    double = dequantize.QuantizedWeight(
        packed, new(blocks, dtype=torch.uint8), code, (F, D), 64, *nested
    )
    dequantize.dequantize_nf4(plain, dtype)
    for weights in ([double], [double] * 2, [double] * 3):
        dequantize.dequantize_nf4(weights, dtype, out=new(len(weights) * F, D + R)[:, :D])
    x, weight, bound = new(N, D), new(D), new(N, dtype=torch.int32)
    embedding.embed(bound, new(V, D), dtype)
    stream = new(N, D, dtype=torch.float32)
    rms_norm.rms_norm(stream, weight, 1e-5, out=x)
    rstd = rms_norm.add_rms_norm_(x, x, weight, 1e-5, residual=stream)[1]
    rms_norm.rms_norm_backward(x, x, weight, rstd, x, addend=x)
    adapter = new(R, D, dtype=torch.float32), new(F, R, dtype=torch.float32), F
    targets = []
    for parts in (1, 2, 3, 1):
        spare = lora_linear.padded_rank(parts * R)
        targets.append((new(parts * F + spare, D + spare), [adapter] * parts, parts * F, D))
        lora_linear.write_adapters_(targets)
    q, k = new(N, H, K), new(N, G, K)
    rope.rope_(q, k, *[new(2048, K // 2, dtype=torch.float32)] * 2, new(N, dtype=torch.int64))
    for max_seqlen in (1000, 4096):
        out, lse = attention.attention(q, k, k, bound, bound, K**-0.5, max_seqlen=max_seqlen)
        attention.attention_backward(
            out, q, k, k, out, lse, bound, bound, K**-0.5, max_seqlen=max_seqlen
        )
    swiglu.swiglu_backward(new(N, F), new(N, F), swiglu.swiglu(new(N, F), new(N, F)))
    cross_entropy.linear_cross_entropy(x, new(V, D), new(N, dtype=torch.int64), N)
    flat, absmax, tables = (
        new(*shape, dtype=torch.float32) for shape in ((R * D,), (R * D // 256,), (4, 256))
    )
    codes, norm = new(R * D, dtype=torch.uint8), adamw.global_norm(flat)
    settings = {
        "lr": 1.0,
        "step": 1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    adamw.adamw_(flat, flat, flat, flat, norm, **settings)
    adamw.adamw_8bit_(flat, flat, codes, codes, absmax, absmax, tables, norm, **settings)


def recorded_launches(arch, model, dtype, rows):
    """name -> what to compile, one for each distinct kernel, signature, constants and options."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import jit

    from minitune.kernels import backend

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
        launches[name] = (
            ASTSource(self, signature, constants, attributes),
            target,
            options.__dict__,
        )

    jit.JITFunction.run = record
    backend.use_triton = lambda x: True
    backend.shared_memory_limit = lambda device: SHARED_MEMORY[arch] * 1024
    forward_and_backward(model, getattr(torch, dtype), rows)
    return launches


def compile_all(task):
    """[arch, launch, its bytes of shared memory] for each launch of the task."""
    import triton

    return [
        [task[0], name, triton.compile(source, target=target, options=options).metadata.shared]
        for name, (source, target, options) in recorded_launches(*task).items()
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """arch -> {launch: bytes of shared memory}"""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = {arch: {} for arch in SHARED_MEMORY}
    for arch, name, shared in json.loads(done.stdout):
        result[arch][name] = shared
    return result


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_compiles_and_fits_into_shared_memory(arch, compiled):
    assert {name.split("(")[0] for name in compiled[arch]} == KERNELS
    too_large = {
        name: shared
        for name, shared in compiled[arch].items()
        if shared > SHARED_MEMORY[arch] * 1024
    }
    assert not too_large


def test_the_list_of_kernels_is_all_that_are_launched():
    """A kernel that is added to kernels/ has to be launched in forward_and_backward as well."""
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    launched = set(re.findall(r"^ +(_\w+)\[.+\]\(", sources, flags=re.MULTILINE))
    assert launched == KERNELS


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        print(
            json.dumps([launch for launches in pool.map(compile_all, TASKS) for launch in launches])
        )

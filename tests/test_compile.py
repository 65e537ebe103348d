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

from minitune.kernels import (
    adamw,
    attention,
    backend,
    cross_entropy,
    decode_attention,
    dequantize_ggml,
    dequantize_nf4,
    embedding,
    few_row_linear,
    few_row_weights,
    gated_activation,
    global_norm,
    lora_linear,
    qk_norm_rope,
    rms_norm,
    rope,
    sample_tokens,
)
from minitune.kernels.ggml_reference import BLOCK_SIZES

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # sm -> KiB of a program
MODELS = {  # D, H, G, K, F, V
    "SmolLM2-135M": (576, 9, 3, 64, 1536, 49152),
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336, 128256),
    "heads of 96": (576, 6, 2, 96, 1536, 49152),
    "heads of 256": (512, 2, 1, 256, 1536, 49152),
}
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
LORA_RANK = 16
EMBEDDING_TYPES = ("Q4_K", "Q6_K", "Q8_0")  # of most files; the other types share their code


class MetaTensors:
    """Arguments of the kernels for one model, without data."""

    def __init__(self, model: str, dtype: torch.dtype, rows: int):
        self.D, self.H, self.G, self.K, self.F, self.V = MODELS[model]
        self.N, self.dtype = rows, dtype

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor of this shape, by default in the model's dtype."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def float32(self, *shape: int) -> torch.Tensor:
        """Return a float32 tensor of this shape."""
        return self.new(*shape, dtype=torch.float32)


def dequantise_and_write_adapters(t: MetaTensors) -> None:
    """Launch the kernels that fill the extended weights of a layer."""
    blocks = t.D * t.F // 64
    packed, code = t.new(t.D * t.F // 2, dtype=torch.uint8), t.float32(16)
    plain = dequantize_nf4.NF4Storage(packed, t.float32(blocks), code, (t.F, t.D))
    absmax = t.new(blocks, dtype=torch.uint8)
    scales = t.float32(-(-blocks // 256)), t.float32(256), t.float32()
    nested = dequantize_nf4.NF4Storage(packed, absmax, code, (t.F, t.D), 64, *scales)
    dequantize_nf4.dequantize_nf4(plain, t.dtype)
    for weights in ([nested], [nested] * 2, [nested] * 3):
        out = t.new(len(weights) * t.F, t.D + LORA_RANK)[:, : t.D]
        dequantize_nf4.dequantize_nf4(weights, t.dtype, out=out)
    adapter = t.float32(LORA_RANK, t.D), t.float32(t.F, LORA_RANK), t.F
    targets = []
    for linears in (1, 2, 3, 1):
        R, out_features = lora_linear.padded_rank(linears * LORA_RANK), linears * t.F
        weight = t.new(out_features + R, t.D + R)
        targets.append((weight, [adapter] * linears, out_features, t.D))
        lora_linear.write_adapters_(targets)


def dequantise_ggml_types(t: MetaTensors, names: Iterable[str]) -> None:
    """Launch the kernels of GGUF types that a linear or an embedding of the model can have."""
    ids = t.new(t.N, dtype=torch.int64)
    for name in names:
        width, size = BLOCK_SIZES[name]
        # A type of wide blocks falls back to another one in narrow models.
        in_features = t.F if t.D % width else t.D
        blocks = t.new(t.N, in_features // width * size, dtype=torch.uint8)
        weight = dequantize_ggml.GgmlStorage(blocks, name, (t.N, in_features))
        for count in (1, 2, 3) if name == "Q4_K" else (2,):
            out = t.new(count * t.N, in_features + LORA_RANK)[:, :in_features]
            dequantize_ggml.dequantize_ggml([weight] * count, t.dtype, out=out)
        if name in EMBEDDING_TYPES:
            dequantize_ggml.embed_ggml(ids, weight, t.dtype, 12.0 if name == "Q6_K" else 1.0)


def run_layer(t: MetaTensors) -> None:
    """Launch the kernels of a decoder layer, of the embedding and of the loss."""
    x, weight = t.new(t.N, t.D), t.new(t.D)
    index = t.new(t.N, dtype=torch.int32)
    positions = targets = t.new(t.N, dtype=torch.int64)
    for multiplier in (1.0, 12.0):
        embedding.embed(index, t.new(t.V, t.D), t.dtype, multiplier)

    residual = t.float32(t.N, t.D)
    for offset in (0.0, 1.0):
        rms_norm.rms_norm(residual, weight, 1e-5, out=x, offset=offset)
        _, rstd = rms_norm.add_rms_norm_(x, x, weight, 1e-5, residual=residual, offset=offset)
        rms_norm.rms_norm_backward(x, x, weight, rstd, x, addend=x, offset=offset)

    q, k, table = t.new(t.N, t.H, t.K), t.new(t.N, t.G, t.K), t.float32(2048, t.K // 2)
    rope.rope_(q, k, table, table, positions)
    heads, norms = t.new(t.N, t.H + t.G, t.K), (t.new(t.K), t.new(t.K))
    for offset in (0.0, 1.0):
        rest = t.H, *norms, 1e-6, table, table, positions, offset
        qk_norm_rope.qk_norm_rope_backward_(qk_norm_rope.qk_norm_rope(heads, *rest), heads, *rest)
    for max_seqlen, softcap in ((1000, 0.0), (4096, 0.0), (4096, 50.0)):
        rest, options = (index, index, t.K**-0.5), {"max_seqlen": max_seqlen, "softcap": softcap}
        out, lse = attention.attention(q, k, k, *rest, **options)
        attention.attention_backward(out, q, k, k, out, lse, *rest, **options)

    gate, up = t.new(t.N, t.F), t.new(t.N, t.F)
    for activation in gated_activation.ACTIVATIONS:
        m = gated_activation.gated_activation(gate, up, activation=activation)
        for out in (m, None):
            gated_activation.gated_activation_backward(m, gate, up, out=out, activation=activation)
    for softcap in (0.0, 30.0):
        cross_entropy.linear_cross_entropy(x, t.new(t.V, t.D), targets, t.N, softcap=softcap)


def nested_nf4(t: MetaTensors, out_features: int, in_features: int) -> dequantize_nf4.NF4Storage:
    """Return an NF4 weight with nested scales."""
    blocks = out_features * in_features // 64
    return dequantize_nf4.NF4Storage(
        t.new(blocks * 32, dtype=torch.uint8),
        t.new(blocks, dtype=torch.uint8),
        t.float32(16),
        (out_features, in_features),
        64,
        t.float32(-(-blocks // 256)),
        t.float32(256),
        t.float32(),
    )


def run_few_row_linears(t: MetaTensors) -> None:
    """Launch the products of a decode step, straight from NF4 and from 16 bit."""
    code = tuple(i / 8 - 1 for i in range(16))
    for rows in (1, 64):
        few_row_linear.few_row_logits(t.new(rows, t.D), t.new(t.V, t.D))
        for out, in_features, parts in ((t.F, t.D, 3), (t.D, t.F, 1)):
            lora = few_row_weights.FewRowAdapters(
                t.new(parts * LORA_RANK, in_features),
                t.new(1, parts * out, LORA_RANK),
                t.float32(1),
                t.new(rows, dtype=torch.int32),
            )
            for weights in ([nested_nf4(t, out, in_features)], [t.new(out, in_features)]):
                weight = few_row_weights.FewRowWeight(tuple(weights * parts), code)
                x = t.new(rows, in_features)
                if parts > 1:
                    few_row_linear.few_row_linear(x, weight, lora)
                else:
                    total = t.float32(rows, out)
                    few_row_linear.few_row_linear(x, weight, None, 0.5, add_to=total)


def run_decode_step(t: MetaTensors) -> None:
    """Launch the kernels of a decode step."""
    if t.dtype != torch.float32:
        run_few_row_linears(t)
    q, k, pages = t.new(64, t.H, t.K), t.new(64, t.G, t.K), t.new(1024, 64, t.G, t.K)
    table, lengths, places = (
        t.new(*shape, dtype=dtype)
        for shape, dtype in (((64, 32), torch.int32), ((64,), torch.int32), ((64,), torch.int64))
    )
    decode_attention.store_keys_values(k, k, pages, pages, places)
    for softcap, window, new in ((0.0, None, (k, k)), (50.0, 1000, None)):
        options = {"scale": t.K**-0.5, "softcap": softcap, "window": window, "new": new}
        decode_attention.decode_attention(q, pages, pages, table, lengths, **options)
    scores, temperatures = t.float32(64, t.V), t.float32(64)
    for logits, floors in ((None, temperatures), (scores, None), (t.float32(64, t.V), None)):
        rest = places, places, temperatures
        sample_tokens.sample_tokens(scores, *rest, floors=floors, logits=logits)


def run_optimizer(t: MetaTensors) -> None:
    """Launch the kernels of an optimizer step."""
    P = LORA_RANK * t.D
    flat, absmax, tables = t.float32(P), t.float32(P // 256), t.float32(4, 256)
    codes, norm = t.new(P, dtype=torch.uint8), global_norm.global_norm(flat)
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
    tensors = MetaTensors(model, dtype, rows)
    dequantise_and_write_adapters(tensors)
    dequantise_ggml_types(tensors, ggml_types)
    run_layer(tensors)
    run_decode_step(tensors)
    run_optimizer(tensors)
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

"""Launches of all kernels with the shapes of real models, on tensors without data ("meta").

test_compile.py records them instead of running them.
"""

from collections.abc import Iterable

import torch

from minitune.kernels import (
    adamw,
    attention,
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

MODELS = {  # D, H, G, K, F, V
    "SmolLM2-135M": (576, 9, 3, 64, 1536, 49152),
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336, 128256),
    "heads of 96": (576, 6, 2, 96, 1536, 49152),
    "heads of 256": (512, 2, 1, 256, 1536, 49152),
}
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
    for logits in (None, scores, t.float32(64, t.V)):
        sample_tokens.sample_tokens(scores, places, places, temperatures, logits=logits)


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


def launch_all(t: MetaTensors, ggml_types: Iterable[str]) -> None:
    """Launch every kernel of the package."""
    dequantise_and_write_adapters(t)
    dequantise_ggml_types(t, ggml_types)
    run_layer(t)
    run_decode_step(t)
    run_optimizer(t)

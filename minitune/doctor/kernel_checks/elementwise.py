"""Norms, rotations, the activation of the MLP and the embedding, in the widths of the model."""

import torch
from torch import Tensor

from minitune.doctor.kernel_checks.results import same_bits, three_ways
from minitune.doctor.report import Finding, skipped
from minitune.doctor.subject import Subject
from minitune.kernels.dequantize_ggml import embed_ggml, embed_ggml_reference
from minitune.kernels.embedding import embed, embed_reference
from minitune.kernels.gated_activation import (
    gated_activation,
    gated_activation_backward,
    gated_activation_backward_reference,
    gated_activation_reference,
)
from minitune.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_backward_,
    qk_norm_rope_backward_reference,
    qk_norm_rope_reference,
)
from minitune.kernels.rms_norm import (
    add_rms_norm_,
    add_rms_norm_reference_,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from minitune.kernels.rope import rope_, rope_reference_
from minitune.model.packed_sequences import PackedSequences


def check_rms_norm(s: Subject) -> Finding:
    """Compare the norm of rows, its backward, and the norm of a sum."""
    norm, D = s.model.model.norm, s.model.config.hidden_size
    tensors = [s.normal(len(s.batch.input_ids), D, seed=seed) for seed in range(4)]

    def run(dtype, forward, backward, add_):
        x, dy, dresidual, addend = (t.to(dtype) for t in tensors)
        options = {"offset": norm.offset}
        y, rstd = forward(x, norm.weight, norm.eps, **options)
        dx = backward(dy, x, norm.weight, rstd, dresidual=dresidual, **options)
        residual = x.clone()
        of_sum, _ = add_(x, addend, norm.weight, norm.eps, residual=residual, **options)
        return y, dx, of_sum, residual

    kernels = rms_norm, rms_norm_backward, add_rms_norm_
    references = rms_norm_reference, rms_norm_backward_reference, add_rms_norm_reference_
    return three_ways(run, kernels, references, s.model.dtype)


def check_rope(s: Subject) -> Finding:
    """Compare the rotation of queries and keys, and the rotation back."""
    c, tables = s.model.config, s.model.layer_context.ropes[0]
    positions = packed_samples(s).positions
    queries = s.normal(len(positions), c.num_attention_heads, tables.rotary_dim)
    keys = s.normal(len(positions), c.num_key_value_heads, tables.rotary_dim)

    def run(dtype, rotate_):
        results = []
        for inverse in (False, True):
            q, k = queries.to(dtype, copy=True), keys.to(dtype, copy=True)
            angles = tables_in(dtype, tables.cos, tables.sin)
            rotate_(q, k, *angles, positions, inverse, tables.query_scale)
            results += [q, k]
        return results

    return three_ways(run, (rope_,), (rope_reference_,), s.model.dtype)


def check_qk_norm_rope(s: Subject) -> Finding:
    """Compare the norm and the rotation of each head in one launch, and their backward."""
    c, attention = s.model.config, s.model.model.layers[0].self_attn
    if attention.qk_norm != "head":
        return skipped("the model has no norm of each head")
    tables = s.model.layer_context.ropes[0]
    H, heads = c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads
    positions = packed_samples(s).positions
    inputs, gradients = (s.normal(len(positions), heads, c.head_dim, seed=i) for i in range(2))
    norm, weights = attention.q_norm, (attention.q_norm.weight, attention.k_norm.weight)

    def run(dtype, forward, backward):
        angles = tables_in(dtype, tables.cos, tables.sin)
        arguments = H, *weights, norm.eps, *angles, positions, norm.offset
        x, dy = inputs.to(dtype), gradients.to(dtype, copy=True)
        y = forward(x, *arguments)
        dx = backward(dy, x, *arguments)
        return y, dy if dx is None else dx  # the kernel writes dx into dy

    kernels = qk_norm_rope, qk_norm_rope_backward_
    references = qk_norm_rope_reference, qk_norm_rope_backward_reference
    return three_ways(run, kernels, references, s.model.dtype)


def check_gated_activation(s: Subject) -> Finding:
    """Compare the activation of gate and up, and its backward."""
    c, N = s.model.config, len(s.batch.input_ids)
    tensors = [s.normal(N, c.intermediate_size, seed=seed) for seed in range(3)]
    options = {"activation": c.architecture.activation}

    def run(dtype, forward, backward):
        gate, up, dout = (t.to(dtype) for t in tensors)
        dgate, dup, *_ = backward(dout, gate, up, **options)
        return forward(gate, up, **options), dgate, dup

    kernels = gated_activation, gated_activation_backward
    references = gated_activation_reference, gated_activation_backward_reference
    return three_ways(run, kernels, references, s.model.dtype)


def check_embedding(s: Subject) -> Finding:
    """Compare the rows of the embedding, which are the same bits."""
    embedding, dtype = s.model.model.embed_tokens, s.model.dtype
    ids, factor = s.batch.input_ids.to(s.model.device), embedding.multiplier
    if embedding.quantized is None:
        found, expected = (f(ids, embedding.table, dtype, factor) for f in (embed, embed_reference))
    else:
        arguments = ids, embedding.quantized, dtype, factor
        found, expected = (f(*arguments) for f in (embed_ggml, embed_ggml_reference))
    return same_bits(found, expected, "values differ from the reference")


def packed_samples(s: Subject) -> PackedSequences:
    """Return the subject's samples on the device, with max_seqlen."""
    packed = PackedSequences.from_positions(s.batch.position_ids)
    positions, start, end = (t.to(s.model.device) for t in packed.tensors()[:3])
    return PackedSequences(positions, start, end, max_seqlen=packed.max_seqlen)


def tables_in(dtype: torch.dtype, *tables: Tensor) -> list[Tensor]:
    """Return RoPE's tables: in float64 for values in float64, and otherwise in float32."""
    return [table.double() if dtype == torch.float64 else table for table in tables]

"""Dequantisation of the model's weights and the optimizer's kernels."""

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.doctor.kernel_checks.results import compare, same_bits
from minitune.doctor.report import PASS, Finding, judged, within
from minitune.doctor.subject import Subject
from minitune.gguf.quantization.quantize import quantize
from minitune.kernels.adamw import (
    MOMENT_BLOCKSIZE,
    AdamWScalars,
    adamw_,
    adamw_8bit_,
    adamw_8bit_reference_,
    adamw_reference_,
)
from minitune.kernels.backend import cdiv
from minitune.kernels.dequantize_ggml import dequantize_ggml, dequantize_ggml_reference
from minitune.kernels.dequantize_nf4 import dequantize_nf4, dequantize_nf4_reference
from minitune.kernels.global_norm import global_norm
from minitune.model.ggml_weight import GgmlWeight
from minitune.model.nf4 import NF4
from minitune.training.optimizer import moment_tables

USUAL_TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")  # of a model that is no GGUF file
PARAMETERS = 17_001  # no multiple of a block
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
RATE, STEP = 1e-3, 3
NORM_BOUND = 1e-5
# Codes of 8-bit moments that may differ by one: values on the border of two codes.
BORDER_CODES = PARAMETERS // 1000


def check_nf4(s: Subject) -> Finding:
    """Compare the dequantised values of a weight in NF4, which are the same bits."""
    linear = next(linear for _, linear in s.model.linears())
    stored = linear.quantized
    if not isinstance(stored, NF4):
        stored = NF4.quantize(s.normal(linear.out_features, linear.in_features))
    found = dequantize_nf4(stored, s.model.dtype)
    expected = dequantize_nf4_reference(stored, s.model.dtype)
    return same_bits(found, expected, "values differ from the reference")


def check_ggml(s: Subject) -> Finding:
    """Compare the dequantised values of GGUF's types: of the model's file, or the usual ones."""
    weights = {w.type: w for _, linear in s.model.linears() if _is_ggml(w := linear.quantized)}
    if not weights:
        weights = {name: _random_weight(s, name) for name in USUAL_TYPES}
    dtype, different = s.model.dtype, {}
    for name, weight in weights.items():
        found, expected = dequantize_ggml(weight, dtype), dequantize_ggml_reference(weight, dtype)
        different[name] = int((found != expected).sum())
    wrong = [name for name, count in different.items() if count]
    text = f"{', '.join(weights)}: {sum(different.values()):,} values differ from the reference"
    return judged(not wrong, text, different=different)


def _is_ggml(weight: object) -> bool:
    return isinstance(weight, GgmlWeight)


def _random_weight(s: Subject, name: str) -> GgmlWeight:
    kind = GGMLType[name]
    rows = s.normal(16, 2 * GGML_QUANT_SIZES[GGMLType.Q4_K][0])
    return GgmlWeight.of(quantize(rows, kind), name)


def check_adamw(s: Subject) -> Finding:
    """Compare the parameters and the moments after an update."""
    found, plain, exact = (_state(s, kind) for kind in (torch.float32, None, torch.float64))
    values, grads, *moments, norm = found
    adamw_(values, grads, *moments, norm, lr=RATE, step=STEP, **SETTINGS)
    for state in (plain, exact):
        adamw_reference_(*state, AdamWScalars.of_step(STEP, RATE, **SETTINGS))
    results = ([state[0], state[2], state[3]] for state in (found, plain, exact))
    return compare(*results)


def _state(s: Subject, dtype: torch.dtype | None) -> list[Tensor]:
    """Return parameters, gradients, both moments and the norm, in a dtype or in float32."""
    vectors = [s.normal(PARAMETERS, seed=seed).to(dtype or torch.float32) for seed in range(4)]
    return [*vectors[:3], vectors[3].square(), vectors[1].norm()]


def check_adamw_8bit(s: Subject) -> Finding:
    """Compare the parameters after two updates with moments in 8 bits, and the moments' codes."""
    found, expected = _eight_bit_state(s), _eight_bit_state(s)
    tables, grads = moment_tables(s.model.device), s.normal(PARAMETERS, dtype=torch.float32)
    norm = grads.norm()
    for step in (1, 2):
        values, *moments = found
        adamw_8bit_(values, grads, *moments, tables, norm, lr=RATE, step=step, **SETTINGS)
        values, *moments = expected
        scalars = AdamWScalars.of_step(step, RATE, **SETTINGS)
        adamw_8bit_reference_(values, grads, *moments, tables, norm, scalars)
    codes = [(a.int() - b.int()).abs() for a, b in zip(found[1:3], expected[1:3], strict=True)]
    moved, largest = sum(int(x.sum()) for x in codes), max(int(x.max()) for x in codes)
    error = float((found[0] - expected[0]).abs().max() / expected[0].abs().max())
    of_values = within(error, RATE * 1e-2, "of the largest value")
    text = f"{of_values.text}; {moved} codes on a border, bound {BORDER_CODES}"
    is_good = of_values.status == PASS and moved <= BORDER_CODES and largest <= 1
    return judged(is_good, text, **of_values.values, codes=moved)


def _eight_bit_state(s: Subject) -> list[Tensor]:
    """Return parameters, then codes and scales of both moments, which are zero."""
    device, blocks = s.model.device, cdiv(PARAMETERS, MOMENT_BLOCKSIZE)
    codes = [torch.zeros(PARAMETERS, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros(blocks, device=device) for _ in range(2)]
    return [s.normal(PARAMETERS, seed=1, dtype=torch.float32), *codes, *scales]


def check_global_norm(s: Subject) -> Finding:
    """Compare the norm of a flat vector with its value in float64."""
    x = s.normal(PARAMETERS).float()
    exact = x.double().norm()
    return within(float((global_norm(x) - exact).abs() / exact), NORM_BOUND, "of the norm")

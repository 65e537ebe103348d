"""Bugs of the kernels and of their PyTorch references."""

from mutations.mutation import Mutation

ELEMENTWISE = "test_kernels_elementwise.py::"
NORM = ELEMENTWISE + "test_rms_norm_and_its_backward_err_at_most_twice_as_much_as_pytorch"
SUM = ELEMENTWISE + "test_the_norm_of_a_sum_does_not_round_the_sum_and_adds_to_the_residual"
ROPE = ELEMENTWISE + "test_rope_rotates_q_and_k_of_a_fused_projection_in_place_and_back"
ROPE_SCALE = ELEMENTWISE + "test_rope_scales_queries_at_each_position_and_no_keys"
HEADS = ELEMENTWISE + "test_norm_and_rope_of_heads_err_at_most_twice_as_much_as_pytorch"
GATED = (
    ELEMENTWISE + "test_a_gated_activation_and_its_backward_err_at_most_twice_as_much_as_pytorch"
)
ATTENTION = (
    "test_kernels_attention.py::"
    "test_attention_and_its_backward_err_at_most_twice_as_much_as_pytorch"
)
CAPPED = (
    "test_kernels_attention_softcap.py::"
    "test_capped_attention_and_its_backward_err_at_most_twice_as_much_as_pytorch"
)
WINDOW = (
    "test_kernels_attention_windows.py::"
    "test_attention_with_a_window_errs_at_most_twice_as_much_as_pytorch"
)
LINEAR_AND_LOSS = "test_kernels_linear_and_loss.py::"
LOSS = LINEAR_AND_LOSS + "test_linear_cross_entropy_errs_at_most_twice_as_much_as_pytorch"
LORA = (
    LINEAR_AND_LOSS + "test_lora_linears_and_their_gradients_err_at_most_twice_as_much_as_pytorch"
)
MULTIPLIED = (
    LINEAR_AND_LOSS + "test_the_multiplier_of_a_lora_linear_scales_its_output_and_every_gradient"
)
WRITTEN = LINEAR_AND_LOSS + "test_the_adapters_of_several_weights_are_written_in_one_launch"
CAPPED_LOSS = (
    "test_kernels_loss_options.py::"
    "test_scaled_and_capped_logits_err_at_most_twice_as_much_as_pytorch"
)
OLDER = "test_turing.py::test_blocks_of_attention_fit_into_64_kib_at_every_head_width"
TENSOR_CORES = "test_turing.py::test_triton_multiplies_on_tensor_cores_from_capability_8_0_on"
NF4_KERNEL = "test_kernels_dequantize.py::test_dequantize_kernel_equals_the_reference_bit_for_bit"
NF4_REFERENCE = (
    "test_kernels_dequantize.py::test_dequantize_reference_equals_bitsandbytes_bit_for_bit"
)
GGML = "test_kernels_dequantize_ggml.py::test_values_of_the_kernel_are_those_of_gguf_rounded_once"
ADAMW = "test_kernels_adamw.py::test_adamw_kernel_equals_pytorch"
CODES = "test_kernels_adamw.py::test_codes_are_those_of_the_nearest_values_everywhere"

KERNEL_BUGS = (
    Mutation(
        "the norm divides by the width of its block",
        "kernels/rms_norm.py",
        "tl.sum(x * x, axis=0) / D + eps",
        "tl.sum(x * x, axis=0) / BLOCK_D + eps",
        (NORM,),
    ),
    Mutation(
        "the norm's backward forgets the gradient past the norm",
        "kernels/rms_norm.py",
        "dx += load_row(dresidual_ptr, row, dresidual_row_stride, columns, mask)",
        "dx += 0 * load_row(dresidual_ptr, row, dresidual_row_stride, columns, mask)",
        (NORM,),
    ),
    Mutation(
        "the norm of a sum adds the sum to the residual",
        "kernels/rms_norm.py",
        "columns, residual + addend, mask)",
        "columns, residual + x, mask)",
        (SUM,),
    ),
    Mutation(
        "RoPE's second half rotates the other way",
        "kernels/rope.py",
        "(x2 * cos + x1 * sin).to(x_ptr.dtype.element_ty)",
        "(x2 * cos - x1 * sin).to(x_ptr.dtype.element_ty)",
        (ROPE,),
    ),
    Mutation(
        "RoPE's inverse leaves the sign",
        "kernels/rope.py",
        "    if INVERSE:\n        sin = -sin",
        "    if INVERSE:\n        sin = sin",
        (ROPE,),
    ),
    Mutation(
        "RoPE's factor of the queries scales cos alone",
        "kernels/rope.py",
        "        cos *= scale\n        sin *= scale\n",
        "        cos *= scale\n",
        (ROPE_SCALE,),
    ),
    Mutation(
        "the first key head takes no weight of its norm",
        "kernels/qk_norm_rope.py",
        "mask=mask & (head >= H), other=0.0",
        "mask=mask & (head > H), other=0.0",
        (HEADS,),
    ),
    Mutation(
        "the slope of GELU's cubic term lacks its factor",
        "kernels/gated_activation.py",
        "slope = FACTOR * (1.0 + 3 * CUBIC * square)",
        "slope = FACTOR * (1.0 + CUBIC * square)",
        (GATED,),
    ),
    Mutation(
        "the loss does not rescale its sum at a new maximum",
        "kernels/cross_entropy.py",
        "sums = sums * tl.exp(lane_max - base) + tl.exp(x - base)",
        "sums = sums + tl.exp(x - base)",
        (LOSS,),
    ),
    Mutation(
        "the loss's target counts twice",
        "kernels/cross_entropy.py",
        'x = tl.where(first + columns == target, float("-inf"), x)',
        'x = tl.where(first + columns == V, float("-inf"), x)',
        (LOSS,),
    ),
    Mutation(
        "capped logits have no mask at the end of the vocabulary",
        "kernels/cross_entropy.py",
        'x = tl.where(mask, SOFTCAP * tanh, float("-inf"))',
        "x = SOFTCAP * tanh",
        (CAPPED_LOSS,),
    ),
    Mutation(
        "the target's gradient lacks the slope of the cap",
        "kernels/cross_entropy.py",
        "tl.store(row_ptr + target, (gradient * target_slope).to(dtype), mask=valid)",
        "tl.store(row_ptr + target, gradient.to(dtype), mask=valid)",
        (CAPPED_LOSS,),
    ),
    Mutation(
        "the loss's gradient lacks the multiplier of the logits",
        "kernels/cross_entropy.py",
        "gradient_scale = inverse if multiplier == 1.0 else inverse * multiplier",
        "gradient_scale = inverse",
        (CAPPED_LOSS,),
    ),
    Mutation(
        "attention does not shrink its sum of values",
        "kernels/attention.py",
        "acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision",
        "acc = tl.dot(p.to(v.dtype), v, acc, input_precision",
        (ATTENTION,),
    ),
    Mutation(
        "older GPUs take attention's blocks for tensor cores",
        "kernels/attention_common.py",
        "on_tensor_cores = itemsize == 2 and is_pipelined",
        "on_tensor_cores = itemsize == 2",
        (OLDER,),
    ),
    Mutation(
        "older GPUs keep attention's rows in 16 bit",
        "kernels/attention_common.py",
        "outer * outer_tensors * row_bytes * 4 // itemsize",
        "outer * outer_tensors * row_bytes",
        (OLDER,),
    ),
    Mutation(
        "GPUs of capability 8.0 have no tensor cores",
        "kernels/backend.py",
        "get_device_capability(device.index) >= TENSOR_CORE_CAPABILITY",
        "get_device_capability(device.index) > TENSOR_CORE_CAPABILITY",
        (TENSOR_CORES,),
    ),
    Mutation(
        "attention sees the sequence before",
        "kernels/attention.py",
        "seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None])",
        "seen = keys[None, :] <= rows[:, None]",
        (ATTENTION,),
    ),
    Mutation(
        "attention masks too few blocks on the diagonal",
        "kernels/attention.py",
        "(key + BLOCK_N > first + 1)",
        "(key + BLOCK_N > last + 1)",
        (ATTENTION,),
    ),
    Mutation(
        "attention's dq lacks the scale",
        "kernels/attention_backward.py",
        "store_rows(dq_ptr, dq * scale, first",
        "store_rows(dq_ptr, dq, first",
        (ATTENTION,),
    ),
    Mutation(
        "attention's dq ignores the begin of a window",
        "kernels/attention_backward.py",
        "seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= start[:, None])",
        "seen = keys[None, :] <= rows[:, None]",
        (WINDOW,),
    ),
    Mutation(
        "attention's dk lacks the slope of the soft cap",
        "kernels/attention_dkdv.py",
        "- delta[None, :]) * slope",
        "- delta[None, :])",
        (CAPPED,),
    ),
    Mutation(
        "attention's dk and dv leave the diagonal out",
        "kernels/attention_dkdv.py",
        "seen = (keys[:, None] <= rows[None, :])",
        "seen = (keys[:, None] < rows[None, :])",
        (ATTENTION,),
    ),
    Mutation(
        "each split of a group sums the same heads",
        "kernels/attention_dkdv.py",
        "head, row = g * GROUP + split * HEADS, first",
        "head, row = g * GROUP + split * 0, first",
        (ATTENTION,),
    ),
    Mutation(
        "NF4's nibbles are swapped in the kernel",
        "kernels/dequantize_nf4.py",
        "even = tl.load(code_ptr + (byte >> 4))",
        "even = tl.load(code_ptr + (byte & 15))",
        (NF4_KERNEL,),
    ),
    Mutation(
        "NF4's nested scale is that of the program's own blocks",
        "kernels/dequantize_nf4.py",
        "(first + block) // NESTED_BLOCKSIZE",
        "block // NESTED_BLOCKSIZE",
        (NF4_KERNEL,),
    ),
    Mutation(
        "NF4's scales lack their mean in the reference",
        "kernels/dequantize_nf4.py",
        "weight.nested_code[absmax.int()] * nested + weight.nested_offset",
        "weight.nested_code[absmax.int()] * nested",
        (NF4_REFERENCE,),
    ),
    Mutation(
        "Q4_K's minimums take the high bits of the scales",
        "kernels/ggml_blocks.py",
        "(third >> 4) | ((second >> 2) & 48)",
        "(third >> 4) | ((first >> 2) & 48)",
        (f"{GGML}",),
    ),
    Mutation(
        "Q6_K's scales are unsigned",
        "kernels/ggml_blocks.py",
        "tl.load(block_ptr + 192 + (part >> 1)).to(tl.int8, bitcast=True)",
        "tl.load(block_ptr + 192 + (part >> 1))",
        (f"{GGML}",),
    ),
    Mutation(
        "the LoRA gradient of B lacks the multiplier",
        "kernels/lora_linear.py",
        "dB = matmul_accumulated(dy[:, row : row + out].t(), x[:, columns], multiplier)",
        "dB = matmul_accumulated(dy[:, row : row + out].t(), x[:, columns])",
        (MULTIPLIED,),
    ),
    Mutation(
        "the LoRA columns lack the scaling",
        "kernels/lora_linear.py",
        "a.t(), beta=0, alpha=scaling)",
        "a.t(), beta=0)",
        (LORA,),
    ),
    Mutation(
        "the second adapter of a fused weight overwrites the first",
        "kernels/lora_linear.py",
        "lora_row = (out_features + first_rank + rank).to(tl.int64)",
        "lora_row = (out_features + rank).to(tl.int64)",
        (WRITTEN,),
    ),
    Mutation(
        "clipping enlarges small gradients",
        "kernels/adamw.py",
        "g *= tl.where(scale >= 1.0, 1.0, scale)",
        "g *= scale",
        (ADAMW,),
    ),
    Mutation(
        "codes of negative moments are off by one",
        "kernels/adamw.py",
        "below = tl.where(x < 0.0, 126 - below, 127 + below)",
        "below = tl.where(x < 0.0, 128 - below, 127 + below)",
        (CODES,),
    ),
)

"""Bugs of the files that leave a run: merged folders, adapters, GGUF."""

from mutations.mutation import Mutation

MERGED = "test_merge.py::test_every_merged_weight_is_the_float64_sum_rounded_once"
TWICE = "test_merge.py::test_the_same_adapter_is_not_merged_twice"
LIKE_PEFT = "test_checkpoint.py::test_adapter_that_peft_wrote_computes_the_same_logits_here"
IN_PEFT = "test_checkpoint.py::test_peft_computes_the_same_logits_with_our_adapter"
PAIRED = "test_gguf.py::test_the_tensors_are_the_merged_ones_with_q_and_k_rows_paired"
KEYS = "test_gguf.py::test_the_metadata_says_what_llama_cpp_needs"
TYPES = "test_gguf_types.py::test_every_tensor_has_the_type_that_llama_quantize_chooses"
ADAPTER = "test_gguf_adapter.py::test_llama_cpp_computes_the_trained_model_from_base_and_adapter"
BLOCKS = "test_quantizers.py::test_bytes_equal_those_of_ggml"
K_BLOCKS = "test_k_quants.py::test_blocks_and_errors_equal_those_of_ggml"
DEQUANTIZED = "test_dequantizers.py::test_values_equal_those_of_gguf_to_the_bit"
FROM_FILE = "test_gguf_config.py::test_a_llama_comes_back_from_its_file"
IMPORTANCE = (
    "test_importance.py::"
    "test_the_importance_is_the_mean_square_of_each_linears_inputs_with_the_adapter"
)
BATCHES = "test_importance.py::test_the_result_does_not_depend_on_the_batches"
VOCABULARY = "test_gguf_tokenizer.py::test_added_tokens_keep_their_ids_and_kinds"
BY_SCALES = "test_save_4bit.py::test_the_saved_base_is_the_model_that_was_quantised_on_loading"

EXPORT_BUGS = (
    Mutation(
        "the merge forgets the scaling",
        "minitune/checkpoints/merge.py",
        "torch.addmm(base.float(), B, A, alpha=linear.scaling)",
        "torch.addmm(base.float(), B, A)",
        (MERGED,),
    ),
    Mutation(
        "the merge rounds the adapter to 16 bit first",
        "minitune/checkpoints/merge.py",
        "torch.addmm(base.float(), B, A, alpha=linear.scaling)",
        "base.float() + (linear.scaling * (B @ A)).to(torch.bfloat16)",
        (MERGED,),
    ),
    Mutation(
        "the digest of an adapter ignores its scaling",
        "minitune/checkpoints/merge.py",
        'f"{name} {linear.scaling}".encode()',
        "name.encode()",
        ("test_merge.py::test_an_adapter_with_another_scaling_is_another_one",),
    ),
    Mutation(
        "a merged folder forgets the adapters merged before",
        "minitune/checkpoints/merge.py",
        "    digests = _merged_adapters(_stored_weights(model))\n",
        "    digests = []\n",
        (TWICE,),
    ),
    Mutation(
        "a loaded adapter is never rank-stabilised",
        "minitune/checkpoints/adapter.py",
        'use_rslora=config.get("use_rslora", False)',
        "use_rslora=False",
        (LIKE_PEFT,),
    ),
    Mutation(
        "a saved adapter is never rank-stabilised",
        "minitune/checkpoints/adapter.py",
        '"use_rslora": lora.use_rslora',
        '"use_rslora": False',
        (IN_PEFT,),
    ),
    Mutation(
        "GGUF's q and k rows keep their order",
        "minitune/gguf/tensor_layout.py",
        "tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2)",
        "tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2)",
        (PAIRED,),
    ),
    Mutation(
        "GGUF's k rows are paired by the query heads",
        "minitune/gguf/tensor_layout.py",
        '"k_proj": config.num_key_value_heads}',
        '"k_proj": config.num_attention_heads}',
        (PAIRED,),
    ),
    Mutation(
        "Gemma's norms lack their offset in GGUF",
        "minitune/gguf/tensor_layout.py",
        "tensor = tensor.float() + family.norm_offset",
        "tensor = tensor.float()",
        (
            "test_families.py::test_the_merged_folder_and_its_gguf_file_give_the_same_logits_everywhere",
        ),
    ),
    Mutation(
        "a GGUF adapter pairs the rows of A",
        "minitune/gguf/lora_adapter.py",
        'if factor != "lora_B":',
        'if factor != "lora_A":',
        (ADAPTER,),
    ),
    Mutation(
        "offsets of GGUF tensors are not aligned",
        "minitune/gguf/writer.py",
        "offset += _padded(info.nbytes)",
        "offset += info.nbytes",
        ("test_gguf.py::test_tensors_of_odd_sizes_begin_at_aligned_offsets",),
    ),
    Mutation(
        "sizes of GGUF tensors begin with the slowest axis",
        "minitune/gguf/writer.py",
        "sizes = info.shape[::-1]",
        "sizes = info.shape",
        (PAIRED,),
    ),
    Mutation(
        "GGUF counts the key heads as query heads",
        "minitune/gguf/model_metadata.py",
        '"attention.head_count_kv": config.num_key_value_heads',
        '"attention.head_count_kv": config.num_attention_heads',
        (KEYS,),
    ),
    Mutation(
        "GGUF's context is the width of the MLP",
        "minitune/gguf/model_metadata.py",
        '"context_length": config.max_position_embeddings',
        '"context_length": config.intermediate_size',
        (KEYS,),
    ),
    Mutation(
        "another third of the layers is sensitive",
        "minitune/gguf/mixtures.py",
        "(layer - first) % 3 == 2",
        "(layer - first) % 3 == 1",
        (TYPES,),
    ),
    Mutation(
        "the last eighth of the layers begins one layer late",
        "minitune/gguf/mixtures.py",
        "layer >= last or",
        "layer > last or",
        (TYPES,),
    ),
    Mutation(
        "Q4_0 rounds its levels down",
        "minitune/gguf/quantization/simple_blocks.py",
        "torch.where((inverse == 0) & (scale != 0), 0.0, half + 0.5)",
        "torch.where((inverse == 0) & (scale != 0), 0.0, half)",
        (BLOCKS,),
    ),
    Mutation(
        "Q8_0 divides by 128",
        "minitune/gguf/quantization/simple_blocks.py",
        "blocks.new_tensor(127.0)",
        "blocks.new_tensor(128.0)",
        (BLOCKS,),
    ),
    Mutation(
        "the high bits of Q4_K's scales are off by one place",
        "minitune/gguf/quantization/k_packing.py",
        "part[:, :4] | part[:, 4:] >> 4 << 6",
        "part[:, :4] | part[:, 4:] >> 3 << 6",
        (K_BLOCKS,),
    ),
    Mutation(
        "Q6_K's low bits are packed in pairs of runs",
        "minitune/gguf/quantization/k_packing.py",
        "_pack_pairs(low[:, :, 0], low[:, :, 1])",
        "_pack_pairs(low[:, :, 1], low[:, :, 0])",
        (K_BLOCKS,),
    ),
    Mutation(
        "the importance is a mean over samples",
        "minitune/gguf/importance/importance_collection.py",
        "            tokens += len(ids)\n",
        "            tokens += len(batch)\n",
        (IMPORTANCE,),
    ),
    Mutation(
        "the importance is that of the last tile alone",
        "minitune/gguf/importance/importance_collection.py",
        "sums[fused] += x[rows].float().square().sum(0)",
        "sums[fused] = x[rows].float().square().sum(0)",
        (BATCHES,),
    ),
)

"""Bugs of the model: weights, packing, loss rows, rotation tables, adapters, answers."""

from mutations.mutation import Mutation

NF4_BYTES = "test_nf4.py::test_quantized_weight_equals_bitsandbytes"
NF4_TIES = (
    "test_nf4.py::test_values_on_a_tie_and_blocks_of_zeros_are_quantised_as_bitsandbytes_does"
)
FIRST_LABEL = "test_model.py::test_a_samples_first_label_is_never_predicted_from_the_sample_before"
LIKE_PEFT = "test_model.py::test_loss_logits_and_every_gradient_equal_transformers_and_peft"
FRESH = "test_model.py::test_a_fresh_adapter_changes_nothing_and_its_seed_decides_a"
BOUNDS = "test_model.py::test_sample_bounds_follow_from_positions"
WINDOWS = "test_kernels_attention_windows.py::test_the_bounds_of_a_window_are_those_of_a_mask"
YARN = "test_model_config.py::test_the_tables_of_yarn_are_those_of_transformers"
CACHED = (
    "test_generate.py::test_cached_decoding_of_a_batch_equals_decoding_each_prompt_without_a_cache"
)
FAMILIES = (
    "test_family_generation.py::test_greedy_answers_of_a_batch_equal_those_of_transformers[olmo3]"
)

MODEL_BUGS = (
    Mutation(
        "NF4's nibbles are swapped when a weight is quantised",
        "minitune/model/nf4.py",
        "packed=(nibbles[:, 0] << 4) | nibbles[:, 1]",
        "packed=(nibbles[:, 1] << 4) | nibbles[:, 0]",
        (NF4_BYTES,),
    ),
    Mutation(
        "NF4's scales keep their mean",
        "minitune/model/nf4.py",
        "_quantize_scales(absmax - offset, dynamic)",
        "_quantize_scales(absmax, dynamic)",
        (NF4_BYTES,),
    ),
    Mutation(
        "NF4's ties take the upper index",
        "minitune/model/nf4.py",
        "(code[:-1] + code[1:]) / 2, out_int32=True)",
        "(code[:-1] + code[1:]) / 2, out_int32=True, right=True)",
        (NF4_TIES,),
    ),
    Mutation(
        "a sample's first token is predicted from the sample before",
        "minitune/model/loss.py",
        "next_labels = torch.where(ends_sample, IGNORE_INDEX, labels[1:])",
        "next_labels = labels[1:]",
        (FIRST_LABEL,),
    ),
    Mutation(
        "rows without a label keep a stale gradient",
        "minitune/model/loss.py",
        "dresidual.index_fill_(0, loss_rows.ignored, 0)",
        "dresidual.index_fill_(0, loss_rows.ignored[1:], 0)",
        (LIKE_PEFT,),
    ),
    Mutation(
        "the capped logits' gradient uses the cap once",
        "minitune/model/loss.py",
        "dlogits = dlogits * (1 - ratio) * (1 + ratio)",
        "dlogits = dlogits * (1 - ratio)",
        ("test_families.py::test_gradients_flow_through_capped_logits_as_through_the_loss",),
    ),
    Mutation(
        "the bias of the second fused linear lands on the first",
        "minitune/model/linear.py",
        "            first += linear.out_features\n        return y",
        "            first += 0 * linear.out_features\n        return y",
        (LIKE_PEFT,),
    ),
    Mutation(
        "A is drawn too wide",
        "minitune/model/linear.py",
        "bound = self.in_features**-0.5",
        "bound = (3 / self.in_features) ** 0.5",
        (FRESH,),
    ),
    Mutation(
        "every linear draws the same A",
        "minitune/model/causal_lm.py",
        "linear.add_lora(lora, self.device, generator)",
        "linear.add_lora(lora, self.device, generator.manual_seed(seed))",
        (FRESH,),
    ),
    Mutation(
        "rank-stabilised LoRA scales as plain LoRA",
        "minitune/config/training_config.py",
        "self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)",
        "self.lora_alpha / self.r",
        ("test_checkpoint.py::test_peft_computes_the_same_logits_with_our_adapter",),
    ),
    Mutation(
        "samples of two lengths pass for samples of one",
        "minitune/model/packed_sequences.py",
        "N // count if torch.equal(uniform, positions) else None",
        "N // count if N % count == 0 else None",
        (BOUNDS,),
    ),
    Mutation(
        "the longest sample is one token too short",
        "minitune/model/packed_sequences.py",
        "max_seqlen = int(positions.max()) + 1",
        "max_seqlen = int(positions.max())",
        (BOUNDS,),
    ),
    Mutation(
        "a window sees one token too many",
        "minitune/model/packed_sequences.py",
        "start = torch.maximum(self.start, index - (window - 1))",
        "start = torch.maximum(self.start, index - window)",
        (WINDOWS,),
    ),
    Mutation(
        "YaRN's blend runs the wrong way",
        "minitune/model/rope.py",
        "blend = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)",
        "blend = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)",
        (YARN,),
    ),
    Mutation(
        "Llama 3's RoPE takes the context for the wavelength",
        "minitune/model/rope.py",
        "(original / wavelengths - low)",
        "(wavelengths / original - low)",
        (LIKE_PEFT,),
    ),
    Mutation(
        "the cache of a window holds one token too many",
        "kernels/decode_attention.py",
        "first = 0 if window is None else max(length - window, 0)",
        "first = 0 if window is None else max(length - window - 1, 0)",
        (FAMILIES,),
    ),
    Mutation(
        "an answer begins behind the last token but one of its prompt",
        "minitune/model/decoding/prefill.py",
        "last_rows.append(N + T - 1)",
        "last_rows.append(max(N + T - 2, N))",
        (CACHED,),
    ),
    Mutation(
        "ended rows of a batch still grow",
        "minitune/model/decoding/decode_call.py",
        "if stops or token in end_tokens or not sequence.tokens_left:",
        "if stops or not sequence.tokens_left:",
        ("test_decoding.py::test_an_answer_ends_with_its_end_token",),
    ),
    Mutation(
        "answers to one prompt write into its last page together",
        "minitune/model/decoding/schedule.py",
        "of_prompt, full = pages_for(T), T // PAGE",
        "of_prompt, full = pages_for(T), pages_for(T)",
        ("test_kv_cache.py::test_every_request_is_admitted_once_and_all_pages_come_back",),
    ),
    Mutation(
        "the last page of a shared prompt is not copied",
        "minitune/model/decoding/decode_call.py",
        "self._cache.copy_page(source, target)",
        "self._cache.copy_page(source, source)",
        ("test_decoding.py::test_one_prompt_is_read_once_for_all_its_answers",),
    ),
    Mutation(
        "an answer that moves into a free slot loses its pages",
        "minitune/model/decoding/decode_call.py",
        "self._cache.move(last, slot)",
        "self._cache.move(slot, last)",
        ("test_decoding.py::test_slots_and_pages_change_no_answer",),
    ),
)

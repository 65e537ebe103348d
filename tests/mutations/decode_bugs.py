"""Bugs of the kernels of a decode step, and of the decode engine."""

from mutations.mutation import Mutation

ATTENTION, PAGES = "kernels/decode_attention.py", "kernels/key_value_pages.py"
SAMPLING = "kernels/sample_tokens.py"
DECODING = "minitune/model/decoding"
BOUND = (
    "test_kernels_decode_attention.py::test_decode_attention_errs_at_most_twice_as_much_as_pytorch"
)
LAST_KEYS = (
    "test_kernels_decode_attention.py"
    "::test_the_last_keys_beside_the_pages_give_the_same_bits_and_go_to_their_pages"
)
PLACES = (
    "test_kernels_decode_attention.py"
    "::test_keys_and_values_go_to_their_places_and_a_negative_place_skips"
)
CHOICE = "test_kernels_sample_tokens.py::test_the_kernels_choose_the_tokens_of_the_reference"
EQUALS = (
    "test_kernels_sample_tokens.py::test_equals_forbidden_tokens_and_numbers_that_are_not_finite"
)
PRODUCTS = "test_kernels_few_row_linear.py::test_products_are_as_good_as_the_formula"
SLOTS = "test_decoding.py::test_slots_and_pages_change_no_answer"
ADAPTERS = "test_decoding.py::test_each_row_has_its_adapter"

DECODE_BUGS = (
    Mutation(
        "a window sees one key too many on a GPU",
        ATTENTION,
        "first = tl.maximum(length - window, 0)",
        "first = tl.maximum(length - window - 1, 0)",
        (BOUND,),
    ),
    Mutation(
        "the sum of the splits is not scaled to the new maximum",
        ATTENTION,
        "total = total * shrink + tl.sum(weight * sums, axis=0)",
        "total = total + tl.sum(weight * sums, axis=0)",
        (BOUND,),
    ),
    Mutation(
        "the last key is written by the program of the split behind it",
        ATTENTION,
        "(length > 0) & ((splits - 1) % tl.num_programs(0) == tl.program_id(0))",
        "(length > 0) & (splits % tl.num_programs(0) == tl.program_id(0))",
        (LAST_KEYS,),
    ),
    Mutation(
        "the first token of the first page is taken for none",
        PAGES,
        "    if place >= 0:",
        "    if place > 0:",
        (PLACES,),
    ),
    Mutation(
        "pages that follow each other are read from the first one of all",
        PAGES,
        "return x.view(-1, G, K)[start + first : start + last]",
        "return x.view(-1, G, K)[first:last]",
        (SLOTS,),
    ),
    Mutation(
        "the noise of a block of tokens is that of another block",
        SAMPLING,
        "pairs = (first // 2 + 1 + tl.arange(0, BLOCK // 2))",
        "pairs = (first + 1 + tl.arange(0, BLOCK // 2))",
        (CHOICE,),
    ),
    Mutation(
        "the blocks' sums of exponentials have different maxima",
        SAMPLING,
        "total = tl.sum(tl.exp(maxima - m) * sums, axis=0)",
        "total = tl.sum(sums, axis=0)",
        (CHOICE,),
    ),
    Mutation(
        "a row with a NaN passes for finite",
        SAMPLING,
        'largest = tl.where(nans > 0, float("nan"), tl.max(allowed, axis=0))',
        "largest = tl.max(allowed, axis=0)",
        (EQUALS,),
    ),
    Mutation(
        "a sequence that moves leaves the logits of its early step behind",
        f"{DECODING}/decode_call.py",
        "self._logits[slot] = self._logits[last]",
        "self._logits[slot] = self._logits[slot]",
        (SLOTS,),
    ),
    Mutation(
        "the padding of a prompt is written into the cache",
        f"{DECODING}/prefill.py",
        "places += [places_of(own_pages, T), torch.full((rows - T,), -1)]",
        "places += [places_of(own_pages, T), torch.full((rows - T,), 0)]",
        (
            "test_decoding.py::test_padded_prompts_begin_at_blocks_of_attention_and_fill_whole_tiles",
        ),
    ),
    Mutation(
        "the budget of the cache forgets page 0",
        f"{DECODING}/decode_memory.py",
        "needed = pages_for(longest) + 1",
        "needed = pages_for(longest)",
        ("test_decoding.py::test_a_request_that_never_fits_is_refused_by_name",),
    ),
    Mutation(
        "a call within a call shares its engine",
        f"{DECODING}/engine.py",
        "engine = self if keep and not self._is_running else DecodeEngine(captures=False)",
        "engine = self if keep else DecodeEngine(captures=False)",
        ("test_decoding.py::test_a_callback_may_generate_itself",),
    ),
    Mutation(
        "every row with an adapter gets all adapters of its batch",
        f"{DECODING}/cpu_weights.py",
        "[i for i, other in enumerate(of_row) if other == index]",
        "[i for i, other in enumerate(of_row) if other >= 0]",
        (ADAPTERS,),
    ),
    Mutation(
        "the prompts of all adapters are read with the model's own",
        f"{DECODING}/decode_call.py",
        "weights = weights.prefill_weights(self._adapter(index))",
        "weights = weights.prefill_weights(self._adapter(0))",
        (ADAPTERS,),
    ),
    Mutation(
        "decode weights stay although the base has changed",
        f"{DECODING}/decode_memory.py",
        "known is not None and known.are(frozen)",
        "known is not None",
        ("test_decoding.py::test_changed_weights_of_the_base_are_read_at_the_next_call",),
    ),
    Mutation(
        "a tensor in other memory counts as the one before",
        "minitune/model/unchanged_tensors.py",
        "and self._states_of(tensors) == self._states",
        "and self._states_of(tensors)[1:] == self._states[1:]",
        ("test_decoding.py::test_changed_weights_of_the_base_are_read_at_the_next_call",),
    ),
    Mutation(
        "the padding of a bucket keeps the pages of a sequence that has ended",
        f"{DECODING}/kv_cache.py",
        "self.assign(source, ())",
        "self._is_stale = True",
        ("test_decoding.py::test_slots_without_a_sequence_read_and_write_page_0",),
    ),
    Mutation(
        "the products of a split begin at the first column",
        "kernels/few_row_products.py",
        "begin = tl.multiple_of(split * split_size, 64)",
        "begin = 0 * split_size",
        (PRODUCTS,),
    ),
    Mutation(
        "the scales of a pass are those of the next one",
        "kernels/few_row_products.py",
        "begin // 64 + block, last_block)",
        "begin // 64 + block + 1, last_block)",
        (PRODUCTS,),
    ),
    Mutation(
        "nested scales are read without their offset",
        "kernels/few_row_products.py",
        "tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + offset",
        "tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested",
        (PRODUCTS,),
    ),
    Mutation(
        "a row without an adapter takes the first one",
        "kernels/few_row_linear.py",
        "        if adapter >= 0:",
        "        if adapter >= -1:",
        (PRODUCTS,),
    ),
    Mutation(
        "the second linear of a fused one reads the A of the first",
        "kernels/few_row_linear.py",
        "(adapter * PARTS + part) * RANK + rank",
        "(adapter * PARTS) * RANK + rank",
        (PRODUCTS,),
    ),
    Mutation(
        "the sum that a product is added to is overwritten",
        "kernels/few_row_linear.py",
        "    if ADD:",
        "    if not ADD:",
        (PRODUCTS,),
    ),
    Mutation(
        "an adapter's output is not scaled",
        "kernels/few_row_linear.py",
        "z = (z * tl.load(scaling_ptr + adapter))",
        "z = (z * 1.0)",
        (PRODUCTS,),
    ),
)

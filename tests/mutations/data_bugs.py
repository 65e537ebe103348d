"""Bugs of the data: packing, labels, answer spans, tokenizers."""

from mutations.mutation import Mutation

SIDE_BY_SIDE = (
    "test_packing.py::test_a_batch_is_its_samples_side_by_side_with_positions_that_restart"
)
ROWS = (
    "test_packing.py::"
    "test_rows_hold_every_sample_once_within_the_length_and_at_most_one_row_is_half_empty"
)
MICRO_STEPS = (
    "test_packing.py::test_micro_steps_hold_every_sample_once_in_order_and_within_the_budget"
)
LIKE_TRL = "test_packing.py::test_rows_equal_trl"
GENERATION_TAGS = "test_labels.py::test_rendering_prefixes_finds_the_same_spans_as_generation_tags"
REPEATED = "test_labels.py::test_an_answer_repeated_in_the_question_is_not_trained_on_there"
PROMPT = "test_labels.py::test_the_generation_prompt_is_found_behind_another_beginning"
BYTES = "test_labels.py::test_every_byte_of_a_character_unknown_to_sentencepiece_is_trained_on"
SPANS = "test_answer_spans.py::test_an_answer_begins_after_the_prompt_and_ends_with_its_stop_token"
FORMS = (
    "test_answer_spans.py::test_eighteen_forms_render_as_in_transformers_with_every_answer_located"
)
CALLS = (
    "test_answer_spans.py::test_random_calls_and_reasoning_are_located_and_what_is_lost_is_named"
)
DUMMY_SPACE = (
    "test_sentencepiece.py::test_legacy_false_puts_the_dummy_space_at_the_beginning_of_a_text_only"
)
PIECES = "test_sentencepiece.py::test_ids_equal_the_library_and_offsets_cover_every_character"
SECOND_BOS = "test_tokenizer.py::test_a_text_that_begins_with_the_bos_gets_no_second_one"
CUT = "test_labels.py::test_truncation_keeps_the_beginning_and_samples_without_a_label_are_counted"

DATA_BUGS = (
    Mutation(
        "positions do not restart at the next sample",
        "minitune/data/batching.py",
        "[np.arange(len(sample.input_ids)) for sample in samples]",
        "[np.arange(sum(len(sample.input_ids) for sample in samples))]",
        (SIDE_BY_SIDE,),
    ),
    Mutation(
        "a row's room shrinks by one token too few",
        "minitune/data/batching.py",
        "left = room - size",
        "left = room - size + (room > size)",
        (ROWS,),
    ),
    Mutation(
        "a sample joins the row with the most room",
        "minitune/data/batching.py",
        "            room = rooms[at]\n",
        "            at = len(rooms) - 1\n            room = rooms[at]\n",
        (LIKE_TRL,),
    ),
    Mutation(
        "a micro-step's room never shrinks",
        "minitune/data/batching.py",
        "rooms[pack] -= size",
        "rooms[pack] -= 0",
        (MICRO_STEPS,),
    ),
    Mutation(
        "the samples of a micro-step are sorted by length",
        "minitune/data/batching.py",
        "for i in sorted(pack)]",
        "for i in pack]",
        (MICRO_STEPS,),
    ),
    Mutation(
        "the token before an answer is trained on",
        "minitune/data/tokenize_dataset.py",
        "if end > span_begin or begin >= span_begin:",
        "if end >= span_begin or begin >= span_begin:",
        (GENERATION_TAGS, REPEATED),
    ),
    Mutation(
        "bytes of a character after the first are not trained on",
        "minitune/data/tokenize_dataset.py",
        "if end > span_begin or begin >= span_begin:",
        "if end > span_begin and end > begin:",
        (BYTES,),
    ),
    Mutation(
        "the BOS before a conversation is trained on",
        "minitune/data/tokenize_dataset.py",
        "prefix if item.spans is None else ignored",
        "prefix",
        (
            "test_record_formats.py::test_prompt_and_completion_get_one_bos_and_one_eos_and_train_on_the_completion",
        ),
    ),
    Mutation(
        "a sample is cut at its beginning",
        "minitune/data/tokenize_dataset.py",
        "Sample(sample.input_ids[:max_length], sample.labels[:max_length])",
        "Sample(sample.input_ids[-max_length:], sample.labels[-max_length:])",
        (CUT,),
    ),
    Mutation(
        "an answer ends before its stop token",
        "minitune/data/templates/answer_spans.py",
        "return found.end(), found[0]",
        "return found.start(), found[0]",
        (SPANS,),
    ),
    Mutation(
        "an answer begins where the conversation first repeats its prompt",
        "minitune/data/templates/answer_spans.py",
        "return same[-1] + _prompt_end(prompt, self.text[same[-1] : limit]), prompt",
        "return same[0] + _prompt_end(prompt, self.text[same[0] : limit]), prompt",
        (FORMS, CALLS),
    ),
    Mutation(
        "a prompt behind another beginning is one beginning too long",
        "minitune/data/templates/answer_spans.py",
        "return text.find(prompt[tags[first] :]) + len(prompt) - tags[first]",
        "return text.find(prompt[tags[first] :]) + len(prompt)",
        (PROMPT,),
    ),
    Mutation(
        "each stretch of a text gets a dummy space",
        "minitune/data/tokenization/sentencepiece_backend.py",
        "model = self._begin if begin == 0 else self._inside",
        "model = self._begin",
        (DUMMY_SPACE,),
    ),
    Mutation(
        "spans of a later stretch count from its own beginning",
        "minitune/data/tokenization/sentencepiece_backend.py",
        "spans += [(begin + first, begin + last) for first, last in encoded",
        "spans += [(first, last) for first, last in encoded",
        (
            "test_sentencepiece.py::test_special_tokens_in_a_text_are_cut_out_before_the_library_sees_it",
        ),
    ),
    Mutation(
        "a text that begins with the BOS gets a second one",
        "minitune/data/tokenization/tokenizer.py",
        "[] if ids[: len(prefix)] == prefix else prefix",
        "prefix",
        (SECOND_BOS,),
    ),
)

"""Deliberate bugs of sampling, and of the arguments and results of generate."""

from mutations.mutation import Mutation

SAMPLING, FILTERS = "minitune/model/sampling.py", "minitune/model/sampling_filters.py"
GENERATE = "minitune/model/generate.py"
PROCESSORS = "test_sampling.py::test_filters_equal_transformers_logits_processors"
TOP_P = "test_sampling.py::test_top_p_is_that_of_a_stable_sort"
OWN_ROW = "test_sampling.py::test_a_rows_tokens_depend_on_its_own_logits_seed_and_history"
SEEDS = "test_generate_arguments.py::test_seeds_belong_to_answers_and_not_to_batches"
STOPS = "test_generate_arguments.py::test_an_answer_ends_as_soon_as_its_text_holds_a_stop_string"
LONG_TEXT = "test_streamed_text.py::test_a_long_text_is_that_of_all_tokens_and_takes_linear_time"

GENERATION_BUGS = (
    Mutation(
        "a sort for top-p leaves out the token that reaches the share",
        FILTERS,
        "stays = masses.cumsum(-1) - masses < bound",
        "stays = masses.cumsum(-1) < bound",
        (TOP_P,),
    ),
    Mutation(
        "bins for top-p keep every token equal to the last one",
        FILTERS,
        "(equal & (equals_before * weight < bound - mass - mass_in_bin))",
        "equal",
        (TOP_P,),
    ),
    Mutation(
        "top-p reads negative scores in the wrong order",
        FILTERS,
        "torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)",
        "torch.where(bits < 0, bits, bits)",
        (TOP_P,),
    ),
    Mutation(
        "the repetition penalty rewards tokens below zero",
        SAMPLING,
        "torch.where(logits < 0, logits * penalty, logits / penalty)",
        "torch.where(logits < 0, logits / penalty, logits / penalty)",
        (PROCESSORS,),
    ),
    Mutation(
        "the repetition penalty forgets the answer",
        SAMPLING,
        "self._seen[:rows].scatter_(1, chosen.tokens[:, None], True)",
        "self._seen[:rows].scatter_(1, chosen.tokens[:, None] * 0, True)",
        ("test_generate_in_transformers.py::test_a_batch_gives_the_tokens_of_transformers",),
    ),
    Mutation(
        "min-p compares with 1 and not with the likeliest token",
        FILTERS,
        "least = scores.amax(-1, keepdim=True) + math.log(share)",
        "least = math.log(share)",
        (PROCESSORS,),
    ),
    Mutation(
        "a sequence that moves leaves its seed behind",
        SAMPLING,
        "for state in (self.seeds, self.draws, self._seen):",
        "for state in (self.draws, self._seen):",
        (OWN_ROW,),
    ),
    Mutation(
        "all draws of an answer have the same noise",
        SAMPLING,
        "        draws += 1\n",
        "",
        ("test_generate_in_transformers.py::test_a_batch_gives_the_tokens_of_transformers",),
    ),
    Mutation(
        "answers to one prompt have one seed",
        "minitune/model/answer_seeds.py",
        'f"{seed} {rank}"',
        'f"{seed}"',
        (SEEDS,),
    ),
    Mutation(
        "a greedy call draws a random number",
        GENERATE,
        "if rule.temperature or seed is not None:",
        "if True:",
        (SEEDS,),
    ),
    Mutation(
        "an incomplete character hides a stop string",
        "minitune/model/stop_strings.py",
        "visible = tail + text.unfinished",
        "visible = tail",
        ("test_generate_arguments.py::test_bytes_of_the_next_character_do_not_hide_a_stop_string",),
    ),
    Mutation(
        "a stop string of several tokens is not found",
        "minitune/model/stop_strings.py",
        "tail = self._tails[index] + text.add([token])",
        "tail = text.add([token])",
        (STOPS,),
    ),
    Mutation(
        "the tokens that are kept are shown again",
        "minitune/incremental_text.py",
        "self._ids, self._returned, self._limit = kept, text, WINDOW",
        "self._ids, self._limit = kept, WINDOW",
        (LONG_TEXT,),
    ),
    Mutation(
        "a text that streams is decoded whole at each token",
        "minitune/incremental_text.py",
        "if len(self._ids) > self._limit:",
        "if False:",
        (LONG_TEXT,),
    ),
    Mutation(
        "the last prompt's adapter is that of all prompts",
        "minitune/model/adapter_choice.py",
        "indices.append(adapters.index(adapter))",
        "indices = [adapters.index(adapter)] * prompts",
        ("test_generate_arguments.py::test_each_prompt_gets_the_adapter_that_is_named_for_it",),
    ),
    Mutation(
        "end tokens come before min_new_tokens",
        SAMPLING,
        "early = self.draws[:rows] < self.config.min_new_tokens",
        "early = self.draws[:rows] < 0",
        ("test_generate_arguments.py::test_an_answer_has_at_least_min_new_tokens",),
    ),
)

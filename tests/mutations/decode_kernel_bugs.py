"""Bugs of the kernels of a decode step: attention over pages, and the choice of tokens."""

from mutations.mutation import Mutation

DECODE = "test_kernels_decode_attention.py::"
ERROR = DECODE + "test_decode_attention_errs_at_most_twice_as_much_as_pytorch"
LAST = (
    DECODE + "test_the_last_keys_beside_the_pages_give_the_same_bits_and_go_to_their_pages[kernel]"
)
CHOICE = (
    "test_kernels_sample_tokens.py::test_the_kernels_choose_the_tokens_of_the_reference[423-others]"
)

DECODE_KERNEL_BUGS = (
    Mutation(
        "keys past a row's length have a score of 0",
        "kernels/decode_attention.py",
        'scores = tl.where(seen[None, :], scores, float("-inf"))',
        "scores = scores + 0.0",
        (ERROR,),
    ),
    Mutation(
        "values past a row's length are read",
        "kernels/key_value_pages.py",
        "mask=seen[:, None] & (i[None, :] < K), other=0.0",
        "mask=i[None, :] < K, other=0.0",
        (ERROR,),
    ),
    Mutation(
        "splits that were added are not scaled to a new maximum",
        "kernels/decode_attention.py",
        "shrink = tl.exp2(row_max - new)",
        "shrink = tl.where(row_max < new, 1.0, 1.0)",
        (ERROR,),
    ),
    Mutation(
        "a key's place counts from the begin of its block",
        "kernels/decode_attention.py",
        "page.to(tl.int64) * PAGE + index % PAGE",
        "page.to(tl.int64) * PAGE + (index - start) % PAGE",
        (ERROR,),
    ),
    Mutation(
        "a row without keys writes its last key",
        "kernels/decode_attention.py",
        "reads_last = (length > 0) & ",
        "reads_last = (length >= 0) & ",
        (LAST,),
    ),
    Mutation(
        "both tokens of a pair have the noise of the low bits",
        "kernels/sample_tokens.py",
        "(z >> 32).to(tl.uint32))",
        "z.to(tl.uint32))",
        (CHOICE,),
    ),
    Mutation(
        "log-probabilities come from the scores",
        "kernels/sample_tokens.py",
        "if LOGITS == 2:",
        "if LOGITS == 3:",
        (CHOICE,),
    ),
    Mutation(
        "the token of a block counts from the begin of the block",
        "kernels/sample_tokens.py",
        "tl.store(best_token_ptr + at, first + index)",
        "tl.store(best_token_ptr + at, index)",
        (CHOICE,),
    ),
)

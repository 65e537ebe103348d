"""The choice of one token a row from its scores: the largest, or a draw by noise that is counted.

With temperature T above 0, token t of a row with scores s is drawn with probability
softmax(s / T)[t], because that is the chance that its sum with Gumbel noise g is the largest:

    token = argmax(s / T + g), or argmax(s) at temperature 0
    logprob = logits[token] - logsumexp(logits)

The lowest id among equals is chosen. The noise depends on the row's seed, the index of the draw and
the token id only. So a row's token does not depend on other rows, and any device draws the same
one up to the rounding of the scores. Two tokens share one number of SplitMix64 (Steele, Lea and
Flood 2014), in the arithmetic of 64 bits:

    mix(x):  x = (x ^ x >> 30) A,  x = (x ^ x >> 27) B,  x ^ x >> 31
    z = mix(mix(mix(seed) + draw) + (t // 2 + 1) STEP)
    h = the low 32 bits of z if t is even, the high ones otherwise
    v = (h + 1/2) / 2^32,  E = -log(1 - v),  g = -log(E)

v is at least 2^-33, so that g reaches 22.9.

scores and logits (rows, V) in float32 are read once, in blocks of a row. A second kernel goes
through the results of the blocks in their order, which does not depend on the number of rows.
"""

from typing import NamedTuple

import torch

from . import backend
from .backend import cdiv, check_rows, power_of_two, tl, triton

PROFILE_GROUP = "loss"

BLOCK_V = 4096  # tokens of a program
MASK = 0xFFFFFFFF
STEP, A, B = (  # as int64
    x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
LARGEST_V = 1 - 2**-24  # the largest v below 1 in float32


class Chosen(NamedTuple):
    """The tokens that were chosen.

    tokens: (rows,) int64.
    logprobs: (rows,) float32, the log-probability of each token; None if not asked for.
    finite: (rows,) bool; False if a row has a NaN, or its largest score is infinite.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor | None
    finite: torch.Tensor


def mix_reference(x: torch.Tensor) -> torch.Tensor:
    """Return the mixed bits of int64 numbers; products wrap, and shifts bring zeros in."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * A
    x = (x ^ ((x >> 27) & (2**37 - 1))) * B
    return x ^ ((x >> 31) & (2**33 - 1))


def _numbers(seeds: torch.Tensor, draws: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return the numbers z (rows, n) in int64 of pairs (rows or 1, n) of tokens."""
    keys = mix_reference(mix_reference(seeds) + draws)
    return mix_reference(keys[:, None] + (pairs + 1) * STEP)


def _gumbel_of(bits: torch.Tensor) -> torch.Tensor:
    """Return Gumbel noise in float32 from random words in [0, 2^32)."""
    v = bits.float().add_(0.5).mul_(2**-32).clamp_(max=LARGEST_V)
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(seeds: torch.Tensor, draws: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the noise (rows, n) in float32 of some tokens, computed in PyTorch on any device.

    seeds, draws: (rows,) int64.
    tokens: (rows, n) or (1, n) int64, at least 0.
    """
    return _gumbel_of((_numbers(seeds, draws, tokens // 2) >> tokens % 2 * 32) & MASK)


def _noise_of_all(seeds: torch.Tensor, draws: torch.Tensor, V: int) -> torch.Tensor:
    """Return the noise (rows, V) of all tokens; two tokens share a number."""
    z = _numbers(seeds, draws, torch.arange(cdiv(V, 2), device=seeds.device)[None])
    return _gumbel_of(torch.stack((z & MASK, (z >> 32) & MASK), -1).flatten(1)[:, :V])


def _noisy(scores: torch.Tensor, seeds: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return scores (rows, V) plus their noise; scores of -inf stay, and cost nothing if many."""
    allowed = scores > -torch.inf
    if 4 * allowed.count_nonzero() > scores.numel():
        return scores + _noise_of_all(seeds, draws, scores.shape[1])
    rows, tokens = allowed.nonzero(as_tuple=True)
    noise = gumbel_noise(seeds[rows], draws[rows], tokens[:, None])[:, 0]
    return scores.index_put((rows, tokens), noise, accumulate=True)


def sample_tokens_reference(scores, seeds, draws, temperatures, logits=None):
    """Return Chosen in PyTorch."""
    largest, tokens = scores.max(1)  # a NaN is the largest
    hot = (temperatures > 0).nonzero()[:, 0]
    if len(hot):
        divided = scores[hot] / temperatures[hot, None]
        tokens[hot] = _noisy(divided, seeds[hot], draws[hot]).argmax(1)
    logprobs = None
    if logits is not None:
        logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
    return Chosen(tokens, logprobs, largest.isfinite())


@triton.jit
def mix(x):
    """Return the mixed bits of uint64 numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel_block(seed, draw, first, BLOCK: tl.constexpr):
    """Return the noise of the tokens first .. first + BLOCK - 1; `first` is even."""
    pairs = (first // 2 + 1 + tl.arange(0, BLOCK // 2)).to(tl.uint64)
    z = mix(mix(mix(seed.to(tl.uint64)) + draw.to(tl.uint64)) + pairs * 0x9E3779B97F4A7C15)
    bits = tl.interleave(z.to(tl.uint32), (z >> 32).to(tl.uint32))
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    # log(1 - v) keeps the digits of a small v if it is scaled by what 1 - v has lost (Kahan).
    u = 1 - v
    E = tl.where(u == 1, v, -tl.log(u) * (v / tl.where(u == 1, 1.0, 1 - u)))
    return -tl.log(E)


@triton.jit
def _choose_in_blocks(
    scores_ptr,
    logits_ptr,
    seeds_ptr,
    draws_ptr,
    temperatures_ptr,
    best_ptr,
    best_token_ptr,
    largest_ptr,
    logits_max_ptr,
    logits_sum_ptr,
    scores_row_stride,
    logits_row_stride,
    V,
    LOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Choose among BLOCK_V tokens of one row per program, and sum their exponentials.

    LOGITS: 0 for no log-probabilities, 1 if the logits are the scores, 2 if they are separate.
    """
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = block * BLOCK_V
    tokens = first + tl.arange(0, BLOCK_V)
    at = row * tl.num_programs(0) + block
    in_row = tokens < V
    scores = tl.load(scores_ptr + row * scores_row_stride + tokens, in_row, other=float("-inf"))
    is_nan = scores != scores
    allowed = tl.where(is_nan, float("-inf"), scores)
    nans = tl.max(is_nan.to(tl.int32), axis=0)
    largest = tl.where(nans > 0, float("nan"), tl.max(allowed, axis=0))
    tl.store(largest_ptr + at, largest)
    if LOGITS > 0:
        logits = scores
        if LOGITS == 2:
            logits_ptr += row * logits_row_stride
            logits = tl.load(logits_ptr + tokens, in_row, other=float("-inf"))
        m = tl.max(logits, axis=0)
        base = tl.where(m == float("-inf"), 0.0, m)
        tl.store(logits_max_ptr + at, m)
        tl.store(logits_sum_ptr + at, tl.sum(tl.exp(logits - base), axis=0))
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        noise = gumbel_block(tl.load(seeds_ptr + row), tl.load(draws_ptr + row), first, BLOCK_V)
        allowed = tl.div_rn(allowed, tl.full((BLOCK_V,), 0.0, tl.float32) + temperature) + noise
    best, index = tl.max(allowed, axis=0, return_indices=True)
    tl.store(best_ptr + at, best)
    tl.store(best_token_ptr + at, first + index)


@triton.jit
def _choose_among_blocks(
    logits_ptr,
    best_ptr,
    best_token_ptr,
    largest_ptr,
    logits_max_ptr,
    logits_sum_ptr,
    tokens_ptr,
    logprobs_ptr,
    finite_ptr,
    logits_row_stride,
    BLOCKS: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choose among the tokens of one row's blocks per program."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    at, mask = row * BLOCKS + i, i < BLOCKS
    _, index = tl.max(
        tl.load(best_ptr + at, mask, other=float("-inf")), axis=0, return_indices=True
    )
    token = tl.load(best_token_ptr + row * BLOCKS + index).to(tl.int64)
    tl.store(tokens_ptr + row, token)
    largest = tl.load(largest_ptr + at, mask, other=float("-inf"))
    nans = tl.max((largest != largest).to(tl.int32), axis=0)
    largest = tl.max(largest, axis=0)
    is_finite = (nans == 0) & (largest > float("-inf")) & (largest < float("inf"))
    tl.store(finite_ptr + row, is_finite.to(tl.int8))
    if LOGITS > 0:
        maxima = tl.load(logits_max_ptr + at, mask, other=float("-inf"))
        sums = tl.load(logits_sum_ptr + at, mask, other=0.0)
        m = tl.max(maxima, axis=0)
        total = tl.sum(tl.exp(maxima - m) * sums, axis=0)
        logit = tl.load(logits_ptr + row * logits_row_stride + token)
        tl.store(logprobs_ptr + row, logit - m - tl.log(total))


def sample_tokens(
    scores: torch.Tensor,
    seeds: torch.Tensor,
    draws: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    logits: torch.Tensor | None = None,
) -> Chosen:
    """Return the token chosen in each row, without waiting for the GPU.

    scores: (rows, V) float32, rows may be strided.
    seeds, draws: (rows,) int64, the key of a row's noise and the index of its draw.
    temperatures: (rows,) float32; 0 takes the largest score.
    logits: (rows, V) float32 whose softmax gives the log-probabilities, possibly `scores` itself;
        None for no log-probabilities.

    Raises: ValueError if a shape, stride, dtype or device does not fit.
    """
    if scores.dim() != 2 or not scores.shape[1]:
        raise ValueError(f"scores is {tuple(scores.shape)}; expected (rows, vocabulary)")
    check_rows(scores, (torch.float32,), scores=scores, logits=logits)
    rows, V = scores.shape
    check_rows(scores[:, 0], (torch.int64,), 1, seeds=seeds, draws=draws)
    check_rows(scores[:, 0], (torch.float32,), 1, temperatures=temperatures)
    if not backend.use_triton(scores):
        return sample_tokens_reference(scores, seeds, draws, temperatures, logits)
    BLOCKS = cdiv(V, BLOCK_V)
    new = {"device": scores.device}
    partial = torch.empty((4, rows, BLOCKS), dtype=torch.float32, **new)
    best, largest, logits_max, logits_sum = partial
    best_token = torch.empty((rows, BLOCKS), dtype=torch.int32, **new)
    tokens = torch.empty(rows, dtype=torch.int64, **new)
    finite = torch.empty(rows, dtype=torch.bool, **new)
    logprobs = None if logits is None else torch.empty(rows, dtype=torch.float32, **new)
    LOGITS = 0 if logits is None else 1 if logits is scores else 2
    logits_row_stride = 0 if logits is None else logits.stride(0)
    if rows:
        _choose_in_blocks[(BLOCKS, rows)](
            scores,
            logits,
            seeds,
            draws,
            temperatures,
            best,
            best_token,
            largest,
            logits_max,
            logits_sum,
            scores.stride(0),
            logits_row_stride,
            V,
            LOGITS=LOGITS,
            BLOCK_V=BLOCK_V,
            num_warps=8,
        )
        _choose_among_blocks[(rows,)](
            logits,
            best,
            best_token,
            largest,
            logits_max,
            logits_sum,
            tokens,
            logprobs,
            finite,
            logits_row_stride,
            BLOCKS=BLOCKS,
            LOGITS=LOGITS,
            BLOCK=power_of_two(BLOCKS),
            num_warps=1,
        )
    return Chosen(tokens, logprobs, finite)

"""The choice of one token a row from its scores: the largest, or a draw by noise that is counted.

With temperature T above 0, token t of a row with scores s is drawn with probability
softmax(s / T)[t], because that is the chance that its sum with Gumbel noise g is the largest:

    token = argmax(s / T + g)             over the tokens with s >= floor
    token = argmax(s)                     at temperature 0
    logprob = logits[token] - logsumexp(logits)

The lowest id among equals is chosen. The noise depends on the row's seed, the index of the draw and
the token id only. So a row's token does not depend on other rows, and any device draws the same
one up to the rounding of the scores. Four tokens share one Philox4x32-10 (Salmon et al. 2011):

    h = philox(key = seed, counter = (t // 4, draw mod 2^32, draw / 2^32, 0))[t mod 4]
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
LARGEST_V = 1 - 2**-24  # the largest v below 1 in float32
SMALL_V = 2**-10  # below this v, 1 - v has lost digits of v, and a series is exact to float32


class Chosen(NamedTuple):
    """The tokens that were chosen.

    tokens: (rows,) int64.
    logprobs: (rows,) float32, the log-probability of each token; None if not asked for.
    finite: (rows,) bool; False if a row has a NaN, or its largest score is infinite.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor | None
    finite: torch.Tensor


def philox_reference(
    counter: list[torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> list[torch.Tensor]:
    """Return the four words of Philox4x32-10, each an int64 in [0, 2^32).

    counter: four words, int64 in [0, 2^32); they and the key's two words broadcast.
    """
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        # A product has up to 64 bits and wraps into the sign of int64; the masks take it out.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((second >> 32) & MASK) ^ b ^ k0, second & MASK
        c, d = ((first >> 32) & MASK) ^ d ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [a, b, c, d]


def _gumbel_of(bits: torch.Tensor) -> torch.Tensor:
    """Return Gumbel noise in float32 from random words in [0, 2^32)."""
    v = ((bits.float() + 0.5) * 2**-32).clamp(max=LARGEST_V)
    E = torch.where(v < SMALL_V, v + v * v * (0.5 + v * (1 / 3)), -torch.log(1 - v))
    return -torch.log(E)


def gumbel_noise(seeds: torch.Tensor, draws: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the noise (rows, n) in float32 of some tokens, computed in PyTorch on any device.

    seeds, draws: (rows,) int64.
    tokens: (rows, n) or (1, n) int64, at least 0.
    """
    seeds, draws = seeds[:, None], draws[:, None]
    key = seeds & MASK, (seeds >> 32) & MASK
    counter = [tokens // 4, draws & MASK, (draws >> 32) & MASK, torch.zeros_like(draws)]
    words = torch.stack(torch.broadcast_tensors(*philox_reference(counter, key)), -1)
    lane = (tokens % 4).expand(len(seeds), -1)
    return _gumbel_of(words.gather(-1, lane[..., None])[..., 0])


def _noise_of_all(seeds: torch.Tensor, draws: torch.Tensor, V: int) -> torch.Tensor:
    """Return the noise (rows, V) of all tokens; four tokens share one Philox."""
    seeds, draws = seeds[:, None], draws[:, None]
    key = seeds & MASK, (seeds >> 32) & MASK
    quads = torch.arange(cdiv(V, 4), device=seeds.device)[None]
    counter = [quads, draws & MASK, (draws >> 32) & MASK, torch.zeros_like(draws)]
    return _gumbel_of(torch.stack(philox_reference(counter, key), -1).flatten(1)[:, :V])


def _noisy(scores: torch.Tensor, seeds: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return scores (rows, V) plus their noise; scores of -inf stay, and cost nothing if many."""
    rows, tokens = (scores > -torch.inf).nonzero(as_tuple=True)
    if 4 * len(tokens) > scores.numel():
        return scores + _noise_of_all(seeds, draws, scores.shape[1])
    noise = gumbel_noise(seeds[rows], draws[rows], tokens[:, None])[:, 0]
    return scores.index_put((rows, tokens), noise, accumulate=True)


def sample_tokens_reference(scores, seeds, draws, temperatures, floors=None, logits=None):
    """Return Chosen in PyTorch."""
    is_nan = scores.isnan()
    allowed = scores.masked_fill(is_nan, -torch.inf)
    finite = allowed.amax(1).isfinite() & ~is_nan.any(1)
    if floors is not None:
        allowed = allowed.masked_fill(allowed < floors[:, None], -torch.inf)
    hot = (temperatures > 0).nonzero()[:, 0]
    if len(hot):
        divided = allowed[hot] / temperatures[hot, None]
        allowed = allowed.index_copy(0, hot, _noisy(divided, seeds[hot], draws[hot]))
    tokens = allowed.argmax(1)
    logprobs = None
    if logits is not None:
        logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
    return Chosen(tokens, logprobs, finite)


@triton.jit
def gumbel_block(seed, draw, first, BLOCK: tl.constexpr):
    """Return the noise of the tokens first .. first + BLOCK - 1; `first` is a multiple of 4."""
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    low, high = zero + draw.to(tl.uint32), zero + (draw >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, low, high, zero)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    E = tl.where(v < 0.0009765625, v + v * v * (0.5 + v * 0.3333333333333333), -tl.log(1 - v))
    return -tl.log(E)


@triton.jit
def _choose_in_blocks(
    scores_ptr,
    logits_ptr,
    seeds_ptr,
    draws_ptr,
    temperatures_ptr,
    floors_ptr,
    best_ptr,
    best_token_ptr,
    largest_ptr,
    logits_max_ptr,
    logits_sum_ptr,
    scores_row_stride,
    logits_row_stride,
    V,
    HAS_FLOORS: tl.constexpr,
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
    if HAS_FLOORS:
        allowed = tl.where(allowed < tl.load(floors_ptr + row), float("-inf"), allowed)
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
    floors: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> Chosen:
    """Return the token chosen in each row, without waiting for the GPU.

    scores: (rows, V) float32, rows may be strided.
    seeds, draws: (rows,) int64, the key of a row's noise and the index of its draw.
    temperatures: (rows,) float32; 0 takes the largest score.
    floors: (rows,) float32; a token whose score is below its row's floor is not chosen.
    logits: (rows, V) float32 whose softmax gives the log-probabilities, possibly `scores` itself;
        None for no log-probabilities.

    Raises: ValueError if a shape, stride, dtype or device does not fit.
    """
    if scores.dim() != 2 or not scores.shape[1]:
        raise ValueError(f"scores is {tuple(scores.shape)}; expected (rows, vocabulary)")
    check_rows(scores, (torch.float32,), scores=scores, logits=logits)
    rows, V = scores.shape
    check_rows(scores[:, 0], (torch.int64,), 1, seeds=seeds, draws=draws)
    check_rows(scores[:, 0], (torch.float32,), 1, temperatures=temperatures, floors=floors)
    if not backend.use_triton(scores):
        return sample_tokens_reference(scores, seeds, draws, temperatures, floors, logits)
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
            floors,
            best,
            best_token,
            largest,
            logits_max,
            logits_sum,
            scores.stride(0),
            logits_row_stride,
            V,
            HAS_FLOORS=floors is not None,
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

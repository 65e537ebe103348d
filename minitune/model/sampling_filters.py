"""The filters of sampling: top-k, top-p and min-p over scores (rows, V) in float32.

A filter returns the scores with -inf for the tokens that it drops. Its meaning is that of
transformers' logits processors. A row's result depends on that row only, bit for bit: thresholds
are values of the row, and the probabilities of top-p are summed as integers, whose sum does not
depend on the order of its terms. On a GPU nothing is sorted, and nothing waits for the host.
"""

import math

import torch
from torch import Tensor

FIXED_POINT = 2.0**40  # of the likeliest token's weight; 2^18 such weights fit into 63 bits
HALF_BITS = 16  # a key of 32 bits is found in two passes over bins of its halves
BINS = 1 << HALF_BITS
CANDIDATES = 512  # tokens that a CPU sorts


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Return the scores (rows, V) of the k likeliest tokens, and of those equal to the last."""
    if k >= scores.shape[-1]:
        return scores
    least = scores.topk(k).values[:, -1:]  # (rows, 1)
    return scores.masked_fill(scores < least, -torch.inf)


def keep_min_p(scores: Tensor, share: float) -> Tensor:
    """Return the scores (rows, V) of tokens with this share of the likeliest's probability."""
    least = scores.amax(-1, keepdim=True) + math.log(share)
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: Tensor, share: float) -> Tensor:
    """Return the scores (rows, V) of the fewest tokens that hold this share of the probability.

    A token stays if the tokens before it hold less than the share. Tokens come in the order of
    their scores; of equal scores, the higher id comes first, as in transformers.
    """
    weights = (scores - scores.amax(-1, keepdim=True)).exp_().mul_(FIXED_POINT).long()
    bound = (weights.sum(-1, keepdim=True).double() * share).ceil_().long()  # (rows, 1)
    stays = None
    if scores.device.type == "cpu":
        stays = stays_by_sorting(scores, weights, bound)
    if stays is None:
        stays = stays_by_bins(scores, weights, bound)
    return scores.masked_fill(~stays, -torch.inf)


def stays_by_sorting(scores: Tensor, weights: Tensor, bound: Tensor) -> Tensor | None:
    """Return the tokens (rows, V) that stay, by a sort of the likeliest; None if more may stay.

    It waits for the device. On a CPU it takes a tenth of the time of `stays_by_bins`.
    """
    count, V = min(CANDIDATES, scores.shape[-1]), scores.shape[-1]
    ids = scores.topk(count).indices.sort(-1, descending=True).values
    ordered, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    masses = weights.gather(1, ids)
    stays = masses.cumsum(-1) - masses < bound
    least = ordered.gather(1, stays.sum(-1, keepdim=True).clamp_(min=1) - 1)
    if count < V and not (least > ordered[:, -1:]).all():  # others are equal to the last one
        return None
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, stays)


def stays_by_bins(scores: Tensor, weights: Tensor, bound: Tensor) -> Tensor:
    """Return the tokens (rows, V) that stay: those above a key, and some of those equal to it."""
    keys = _ordered_keys(scores)
    high, low = keys >> HALF_BITS, keys & (BINS - 1)
    high_bin, mass = _bin_that_reaches(high, weights, bound)
    in_bin = torch.where(high == high_bin, weights, 0)
    low_bin, mass_in_bin = _bin_that_reaches(low, in_bin, bound - mass)
    least = (high_bin << HALF_BITS) + low_bin  # the key of the last token that stays
    equal = keys == least
    weight = torch.where(equal, weights, 0).amax(-1, keepdim=True)
    equals_before = equal.sum(-1, keepdim=True) - equal.cumsum(-1)  # those with a higher id
    return (keys > least) | (equal & (equals_before * weight < bound - mass - mass_in_bin))


def _ordered_keys(scores: Tensor) -> Tensor:
    """Return whole numbers from 0 to 2^32 - 1 in the order of float32 scores."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.long() + (1 << 31)


def _bin_that_reaches(bins: Tensor, weights: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest bin above which the weights sum to less than a bound, and that sum.

    bins, weights: (rows, V), the bin and the weight of each token.
    bound: (rows, 1), at least 1.

    Returns: the bin and the sum, both (rows, 1).
    """
    masses = weights.new_zeros(len(bins), BINS).scatter_add_(1, bins, weights)
    above = masses.sum(-1, keepdim=True) - masses.cumsum(-1)
    # A row that is not finite may reach no bin.
    found = (above >= bound).sum(-1, keepdim=True).clamp_(max=BINS - 1)
    return found, above.gather(1, found)

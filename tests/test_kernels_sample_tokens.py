"""The choice of tokens: its noise, its kernels against the reference, and both against softmax."""

import math

import pytest
import torch
from kernel_checks import normal, strided

from minitune.kernels import backend
from minitune.kernels import sample_tokens as module
from minitune.kernels.sample_tokens import gumbel_noise, mix_reference, sample_tokens

SEEDS = [1, 2**40 + 7, 3, 2**62, 0, 5]
DRAWS = [0, 1, 2**33, 7, 2, 2]
TEMPERATURES = [0.7, 1.0, 0.0, 1.5, 1e-3, 1.0]


def tensors(*lists, device="cpu"):
    """Return a tensor of each list: of int64 or float32."""
    dtypes = (torch.float32 if isinstance(x[0], float) else torch.int64 for x in lists)
    return [torch.tensor(x, dtype=t, device=device) for x, t in zip(lists, dtypes, strict=True)]


def test_the_numbers_are_those_of_splitmix64():
    """Its well-known first numbers for the state 0."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = torch.arange(1, 4) * module.STEP
    assert [int(z) % 2**64 for z in mix_reference(states)] == known


@pytest.mark.usefixtures("triton_everywhere", "poisoned")
@pytest.mark.parametrize(("V", "logits"), [(3, "same"), (423, "others"), (256, "no logits")])
def test_the_kernels_choose_the_tokens_of_the_reference(V, logits, device, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_V", 128)
    scores = strided(3 * normal(6, V, device=device))
    rows = tensors(SEEDS, DRAWS, TEMPERATURES, device=device)
    others = {"no logits": None, "same": scores, "others": normal(6, V, device=device, seed=1)}
    options = {"logits": others[logits]}
    chosen = sample_tokens(scores, *rows, **options)
    expected = module.sample_tokens_reference(scores, *rows, **options)
    assert chosen.tokens.tolist() == expected.tokens.tolist()
    assert chosen.tokens[2] == scores[2].argmax()
    assert chosen.finite.all() and chosen.finite.dtype == torch.bool
    if options["logits"] is None:
        assert chosen.logprobs is None
    else:
        exact = others[logits].double().log_softmax(1).gather(1, chosen.tokens[:, None])[:, 0]
        assert torch.allclose(chosen.logprobs.double(), exact, atol=2e-6, rtol=0)


@pytest.mark.usefixtures("triton_everywhere", "poisoned")
@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "reference"])
def test_equals_forbidden_tokens_and_numbers_that_are_not_finite(triton, device, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_V", 16)
    if not triton:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    scores = torch.zeros(6, 40, device=device)
    scores[0, [20, 35]] = 1  # equals: the lowest id
    scores[1] = -math.inf
    scores[1, 33] = -5.0  # a single allowed token
    scores[2, 17] = math.nan
    scores[3, 39] = math.inf
    scores[4] = -math.inf
    scores[5, :30] = -math.inf  # a draw among the others
    rows = tensors(range(6), range(6), [0.0, 2.0, 0.0, 1.0, 1.0, 1e3], device=device)
    chosen = sample_tokens(scores, *rows)
    assert chosen.tokens[[0, 1, 3]].tolist() == [20, 33, 39] and chosen.tokens[5] >= 30
    assert ((chosen.tokens >= 0) & (chosen.tokens < 40)).all()
    assert chosen.finite.tolist() == [True, True, False, False, False, True]


def test_draws_have_the_frequencies_of_the_softmax():
    """The statistic has the distribution chi-squared of 6 degrees: above 22.5 in 1 of 1,000."""
    n, T = 20_000, 1.7
    scores = torch.tensor([0.0, 1.0, -1.0, 3.0, 2.0, 0.5, 2.5])
    rows = torch.full((n,), 11), torch.arange(n), torch.full((n,), T)
    counts = sample_tokens(scores.expand(n, 7), *rows).tokens.bincount(minlength=7)
    expected = n * (scores / T).softmax(0)
    assert ((counts - expected).square() / expected).sum() < 22.5


def test_the_noise_of_a_token_depends_on_all_bits_of_seed_and_draw_and_on_nothing_else():
    ids = torch.tensor([[5, 0, 100_003, 7]])
    seeds, draws = tensors([3, 3 + 2**32, 3, 3], [9, 9, 9 + 2**32, 9])
    noise = gumbel_noise(seeds, draws, ids)
    assert noise.unique().numel() == 12 and torch.equal(noise[0], noise[3])
    assert torch.equal(noise[1:2, 1:3], gumbel_noise(seeds[1:2], draws[1:2], ids[:, 1:3]))
    scores = torch.zeros(4, 200_000)
    few = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool), -math.inf)
    few[:, ids[0]] = 0.0
    for x in (scores, few):
        assert torch.equal(module._noisy(x, seeds, draws)[:, ids[0]], noise)


def test_the_choice_of_tokens_refuses_what_does_not_fit():
    scores, (ids, ones) = normal(2, 5), tensors([1, 2], [1.0, 1.0])
    for arguments, options, message in (
        ((scores[0], ids, ids, ones), {}, r"scores is \(5,\); expected \(rows, vocabulary\)"),
        ((scores.half(), ids, ids, ones), {}, "scores is .* expected .* torch.float32"),
        ((scores, ids.int(), ids, ones), {}, "seeds is .* expected .* torch.int64"),
        ((scores, ids, ids[:1], ones), {}, r"draws is \(1,\) .* expected \(2,\)"),
        ((scores, ids, ids, ids), {}, "temperatures is .* expected .* torch.float32"),
        ((scores, ids, ids, ones), {"logits": scores[:1]}, r"logits is \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_tokens(*arguments, **options)


# ---- GPU only


@pytest.mark.gpu
@pytest.mark.parametrize("V", [49152, 128256, 262144])
def test_a_row_draws_the_same_token_on_a_cpu_alone_and_among_7_and_64_rows(V):
    scores = 2 * normal(64, V, device="cuda")
    rows = [torch.arange(64), torch.arange(64) ** 2 + 1, 1.0 - 0.5 * (torch.arange(64) % 3)]
    expected = sample_tokens(scores.cpu(), *rows, logits=scores.cpu())
    rows = [x.cuda() for x in rows]
    results = []
    for n in (1, 7, 64):
        torch.cuda.set_sync_debug_mode("error")
        try:
            x = scores[:n]
            results.append(sample_tokens(x, *(y[:n] for y in rows), logits=x))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    alone, seven, all_rows = results
    for i in range(3):
        assert torch.equal(alone[i], seven[i][:1]) and torch.equal(seven[i], all_rows[i][:7])
    assert torch.equal(all_rows.tokens.cpu(), expected.tokens)
    assert torch.allclose(all_rows.logprobs.cpu(), expected.logprobs, atol=1e-5, rtol=0)

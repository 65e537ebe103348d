"""Sampling: transformers' filters, draws that depend on their own row, seeds of answers."""

import math

import pytest
import torch

from minitune.kernels.sample_tokens import gumbel_noise, sample_tokens
from minitune.model import sampling_filters
from minitune.model.answer_seeds import answer_seeds
from minitune.model.sampling import Sampler, SamplingConfig
from minitune.model.sampling_filters import keep_top_p

PROMPTS = [[1, 2, 10], [3], [4, 4], [49]]
RULES = [
    SamplingConfig(),
    SamplingConfig(0.8),
    SamplingConfig(1.3, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.4),
    SamplingConfig(2.0, top_p=0.7, min_new_tokens=3),
]
ENDS = (5, 7)


def random_logits(seed, rows=4, vocab=50, step=None):
    """Return random logits; with a step, many of them are equal, as those of bfloat16 are."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul(3)
    return logits if step is None else logits.div(step).round().mul(step)


def sampler_of(rule, prompts, seeds, vocab=50, **options):
    sampler = Sampler(rule, len(prompts), vocab, torch.device("cpu"), end_tokens=ENDS, **options)
    for slot, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        sampler.admit(slot, prompt, seed)
    return sampler


@pytest.mark.parametrize("seed", range(4))
def test_filters_equal_transformers_logits_processors(seed):
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = random_logits(seed)
    logits[:, 10:14] = logits[:, 10:11]  # a tie
    rule = SamplingConfig(
        1.4, top_k=20, top_p=0.85, min_p=0.15, repetition_penalty=1.3, min_new_tokens=2
    )
    ids = torch.tensor([[1, 2, 10], [3, 3, 3], [4, 4, 4], [49, 49, 49]])
    penalty = processors.RepetitionPenaltyLogitsProcessor(1.3)
    early = processors.MinNewTokensLengthLogitsProcessor(3, 2, list(ENDS), "cpu")
    sampler = sampler_of(rule, PROMPTS, range(4))
    allowed = early(ids, penalty(ids, logits))
    torch.testing.assert_close(sampler.allowed(logits), allowed)
    assert (logits.gather(1, ids) < 0).any()  # most tokens below zero are filtered out later
    scores = allowed
    for warper in (
        processors.TemperatureLogitsWarper(1.4),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.85),
        processors.MinPLogitsWarper(0.15),
    ):
        scores = warper(ids, scores)
    found = rule.filtered(sampler.allowed(logits))
    assert torch.equal(found, scores)
    assert (found == -torch.inf).any()


@pytest.mark.parametrize("way", ["keep_top_p", "stays_by_bins"])
@pytest.mark.parametrize("step", [None, 0.25])
@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5, 0.95, 0.9999])
def test_top_p_is_that_of_a_stable_sort(monkeypatch, share, step, way):
    monkeypatch.setattr(sampling_filters, "CANDIDATES", 100)
    if way == "stays_by_bins":
        monkeypatch.setattr(sampling_filters, "stays_by_sorting", lambda *_: None)
    for seed in range(4):
        logits = random_logits(seed, vocab=3 + 120 * seed, step=step)
        logits[0, 1] = -torch.inf
        ordered, order = logits.double().sort(stable=True)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - share
        dropped[:, -1] = False
        dropped = dropped.scatter(1, order, dropped)
        assert torch.equal(keep_top_p(logits, share), logits.masked_fill(dropped, -torch.inf))


def test_the_noise_is_gumbel_noise_and_its_draws_are_independent():
    seeds, draws = torch.arange(200).repeat_interleave(10) << 31, torch.arange(10).repeat(200)
    noise = gumbel_noise(seeds, draws, torch.arange(500)[None]).double().view(200, 10, 500)
    assert abs(noise.mean() - 0.5772) < 0.005
    assert abs(noise.var() - math.pi**2 / 6) < 0.01
    for axis in range(3):  # neighbours along the seed, the draw and the token
        first, second = noise.narrow(axis, 0, 9), noise.narrow(axis, 1, 9)
        assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.02


def test_drawn_shares_follow_the_probabilities():
    rule, rows = SamplingConfig(1.5, top_p=0.9), 20000
    scores = rule.filtered(random_logits(3, rows=1))
    seeds, draws = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    drawn = sample_tokens(scores.expand(rows, -1), seeds, draws, torch.ones(rows)).tokens
    expected = scores.softmax(-1)[0]
    shares = torch.bincount(drawn, minlength=50) / rows
    assert (shares - expected).abs().max() < 4 * (expected.max() / rows).sqrt()
    assert (shares[expected == 0] == 0).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rows_tokens_depend_on_its_own_logits_seed_and_history(rule):
    seeds = [11, 2**62, 0, 11]
    together = sampler_of(rule, PROMPTS, seeds, logprobs=True)
    alone = [
        sampler_of(rule, PROMPTS[i : i + 1], seeds[i : i + 1], logprobs=True) for i in range(4)
    ]
    order = [0, 1, 2, 3]  # the sequence in each slot
    for step in range(6):
        logits = random_logits(step, step=0.5)
        if step == 3:  # sequence 1 ends, and the last one takes its slot
            together.move(3, 1)
            order = [0, 3, 2]
        chosen = together.choose(logits[order])
        expected = [alone[i].choose(logits[i : i + 1]) for i in order]
        assert torch.equal(chosen.tokens, torch.cat([x.tokens for x in expected]))
        assert torch.equal(chosen.logprobs, torch.cat([x.logprobs for x in expected]))
        reference = logits[order].log_softmax(-1).gather(1, chosen.tokens[:, None])[:, 0]
        torch.testing.assert_close(chosen.logprobs, reference)
        if step < rule.min_new_tokens:
            assert not set(chosen.tokens.tolist()) & set(ENDS)


def test_a_slot_that_is_used_again_forgets_its_sequence():
    rule = RULES[2]
    used, fresh = (sampler_of(rule, [[1, 2]], [3]) for _ in range(2))
    for step in range(3):
        used.choose(random_logits(step + 50, rows=1))
    used.admit(0, [1, 2], 3)
    for step in range(3):
        logits = random_logits(step, rows=1)
        assert used.choose(logits).tokens == fresh.choose(logits).tokens


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named_and_spoils_no_other(rule, value):
    logits = random_logits(1)
    expected = sampler_of(rule, PROMPTS, range(4)).choose(logits)
    damaged = logits.clone()
    damaged[2, 17] = value
    chosen = sampler_of(rule, PROMPTS, range(4)).choose(damaged)
    assert chosen.finite.tolist() == [True, True, False, True]
    assert ((chosen.tokens >= 0) & (chosen.tokens < 50)).all()
    assert torch.equal(chosen.tokens[chosen.finite], expected.tokens[chosen.finite])


def test_answers_have_seeds_of_their_own_that_do_not_depend_on_the_batch():
    prompts = [[1, 2], [3], [1, 2], [1, 2]]
    seeds = answer_seeds(7, prompts, [0, 0, 0, 1])
    assert seeds[0] == seeds[3]  # the same prompt under another adapter
    assert len(set(seeds)) == 3
    assert answer_seeds(7, [[9], [3]], [0, 0])[1] == seeds[1]
    assert answer_seeds(8, [[3]], [0]) != seeds[1:2]
    assert answer_seeds([7, 7], [[3], [3]], [0, 0]) == [seeds[1], seeds[1]]
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(3)
    first = answer_seeds(None, prompts, [0] * 4)
    second = answer_seeds(None, prompts, [0] * 4)
    torch.manual_seed(3)
    assert first == answer_seeds(None, prompts, [0] * 4) != second


@pytest.mark.parametrize(
    ("seed", "message"),
    [(1.5, "seed is 1.5"), (2**64, "seed is"), ([1, 2], "lists 2 seeds, and the call has 1")],
)
def test_a_seed_that_is_none_is_refused(seed, message):
    with pytest.raises(ValueError, match=message):
        answer_seeds(seed, [[3]], [0])

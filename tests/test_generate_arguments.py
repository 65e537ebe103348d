"""Arguments of generate beside the rule of sampling: adapters, stops, log-probabilities, seeds."""

import numpy as np
import pytest
import torch
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.model.generation_output import GenerateOutput
from minitune.model.sampling import Sampler, SamplingConfig
from minitune.model.stop_strings import read_stop_strings

PROMPTS = [[5, 9, 300, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
DRAWN = {"max_new_tokens": 8, "temperature": 1.5}


def load(folder):
    return FastLanguageModel.from_pretrained(
        folder, max_seq_length=64, dtype=torch.float32, device="cpu"
    )


def adapted(folder, seed, **settings):
    model = FastLanguageModel.get_peft_model(load(folder)[0], **settings)
    draw_adapter(model, b=0.2, seed=seed)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("arguments") / "m")


@pytest.fixture(scope="module")
def model(folder):
    model = adapted(folder, seed=0, r=4)
    model.eos_token_ids = ()
    return model


def test_each_prompt_gets_the_adapter_that_is_named_for_it(model, folder, tmp_path):
    other = adapted(folder, seed=1, r=8, target_modules=["q_proj", "down_proj"])
    other.save_pretrained(tmp_path / "other")
    own = model.generate(PROMPTS, max_new_tokens=8)
    with model.disable_adapter():
        base = model.generate(PROMPTS, max_new_tokens=8)
    theirs = other.generate(PROMPTS, max_new_tokens=8, eos_token_ids=())
    assert own != base != theirs != own
    read = model.read_adapter(tmp_path / "other")
    for choice, expected in ((None, own), (False, base), (read, theirs)):
        assert model.generate(PROMPTS, max_new_tokens=8, adapter=choice) == expected
    mixed = model.generate(PROMPTS, max_new_tokens=8, adapter=[read, None, False])
    assert mixed == [theirs[0], own[1], base[2]]
    twice = model.generate(PROMPTS[:1] * 2, adapter=[False, read], num_return_sequences=2, **DRAWN)
    base_drawn = model.generate(PROMPTS[:1], adapter=False, num_return_sequences=2, **DRAWN)
    assert len(twice) == 4 and len(base_drawn) == 2
    assert model.generate(PROMPTS, max_new_tokens=8) == own  # the model is as it was


def test_numbers_of_numpy_and_of_pytorch_count_as_those_of_python(model):
    (free,) = model.generate(PROMPTS[:1], max_new_tokens=8)
    end, before = free[5], free[: free.index(free[5])]
    for ends in (
        end,
        [end],
        np.int64(end),
        np.array([end]),
        torch.tensor(end),
        torch.tensor([end]),
    ):
        call = {"eos_token_id": ends, "max_new_tokens": np.int64(8)}
        assert model.generate(PROMPTS[:1], **call) == [before]


def test_an_end_token_that_is_no_token_forbids_none():
    config = SamplingConfig(min_new_tokens=1)
    sampler = Sampler(config, 1, 4, torch.device("cpu"), end_tokens=(-1, 2, 9))
    allowed = sampler.allowed(torch.zeros(1, 4))
    assert allowed.isfinite().tolist() == [[True, True, False, True]]


def test_seeds_belong_to_answers_and_not_to_batches(model):
    together = model.generate(PROMPTS, num_return_sequences=2, seed=4, **DRAWN)
    assert together[0] != together[1]
    assert model.generate(PROMPTS[1:2] * 2, seed=4, **DRAWN) == together[2:4]
    assert model.generate(PROMPTS[2:], seed=4, **DRAWN) == together[4:5]
    listed = model.generate(PROMPTS[1:2] * 3, seed=[4, 4, 5], **DRAWN)
    assert listed[0] == listed[1] == together[2] != listed[2]
    both = model.generate(PROMPTS[1:2] * 2, adapter=[None, None], seed=4, **DRAWN)
    assert both == together[2:4]
    state = torch.get_rng_state()
    model.generate(PROMPTS, max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_log_probabilities_are_those_of_the_forward_pass(model):
    output = model.generate(PROMPTS, return_logprobs=True, top_k=5, **DRAWN)
    assert isinstance(output, GenerateOutput) and output.stop_reasons == [None] * 3
    for prompt, answer, logprobs in zip(PROMPTS, output.sequences, output.logprobs, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-5, rtol=1e-5)


def test_the_output_says_at_what_each_answer_stopped(model):
    free = model.generate(PROMPTS, max_new_tokens=8)
    end = free[0][3]
    call = {"eos_token_id": end, "max_new_tokens": 8, "return_logprobs": True}
    lists = model.generate(PROMPTS, **call)
    assert lists.stop_reasons[0] == end and lists.sequences[0] == free[0][:3]
    assert [len(row) for row in lists.logprobs] == [len(row) for row in lists.sequences]
    grid = model.generate(torch.tensor(PROMPTS[:1] * 2), pad_token_id=0, **call)
    assert grid.sequences[0].tolist() == PROMPTS[0] + free[0][:4]
    assert grid.logprobs.shape == (2, 4)
    assert grid.logprobs[0, :3].tolist() == pytest.approx(lists.logprobs[0], abs=1e-5)
    plain = model.generate(PROMPTS, max_new_tokens=8, return_dict_in_generate=True)
    assert plain == GenerateOutput(free, None, [None] * 3)


def test_an_answer_has_at_least_min_new_tokens(model):
    free = model.generate(PROMPTS, max_new_tokens=8)
    ends = [answer[0] for answer in free]
    assert model.generate(PROMPTS[:1], max_new_tokens=8, eos_token_ids=ends) == [[]]
    least = model.generate(PROMPTS, max_new_tokens=8, eos_token_ids=ends, min_new_tokens=5)
    assert min(map(len, least)) >= 5
    drawn = model.generate(PROMPTS, eos_token_ids=ends, min_new_tokens=8, **DRAWN)
    assert list(map(len, drawn)) == [8] * 3


def test_on_token_ends_an_answer_and_no_other(model):
    free = model.generate(PROMPTS, max_new_tokens=8)
    counts = [0] * 3

    def two_of_the_second(index, token):
        counts[index] += 1
        return index == 1 and counts[1] == 2

    answers = model.generate(PROMPTS, max_new_tokens=8, on_token=two_of_the_second)
    assert answers == [free[0], free[1][:2], free[2]]


class Letters:
    """A tokenizer whose token i is a letter, and every third is a byte of a character."""

    def decode(self, ids):
        return b"".join(bytes([0xC3]) if i % 3 == 0 else b"%c" % (97 + i % 26) for i in ids).decode(
            errors="replace"
        )


def test_an_answer_ends_as_soon_as_its_text_holds_a_stop_string(model):
    free, decode = model.generate(PROMPTS, max_new_tokens=12), Letters().decode
    texts = [decode(answer) for answer in free]
    strings = [texts[0][4:6], texts[2][2]]
    expected = []
    for answer in free:
        lengths = [n for n in range(1, 13) if any(s in decode(answer[:n]) for s in strings)]
        expected.append(answer[: lengths[0]] if lengths else answer)
    output = model.generate(
        PROMPTS,
        max_new_tokens=12,
        stop_strings=strings,
        tokenizer=Letters(),
        return_dict_in_generate=True,
    )
    assert output.sequences == expected != free
    assert output.stop_reasons[2] in strings


class Pieces:
    """A tokenizer whose second token ends in the midst of a character."""

    def decode(self, ids):
        pieces = (b"sto", b"p\xc3", b"\xa9s", b"st", b"o")
        return b"".join(pieces[i] for i in ids).decode(errors="replace")


def test_bytes_of_the_next_character_do_not_hide_a_stop_string():
    for strings, ids, ends in ((["stop"], [3, 4, 1, 2], 3), (["é", "op"], [0, 1], 2)):
        stops = read_stop_strings(strings, Pieces(), 1)
        found = [stops.add(0, token) for token in ids[:ends]]
        assert found == [False] * (ends - 1) + [True]
        assert stops.found == [strings[-1]]
    stops = read_stop_strings("és", Pieces(), 1)
    assert [stops.add(0, token) for token in (0, 1, 2)] == [False, False, True]


@pytest.mark.parametrize("rule", [{}, {"temperature": 1.5, "repetition_penalty": 1.4, "seed": 3}])
def test_answers_that_wait_or_end_early_leave_the_others_as_they_are(model, rule):
    call = {"max_new_tokens": 12, "eos_token_ids": range(0, 512, 9), **rule}
    prompts = [[5 * i + 1, 7, i + 3] for i in range(9)]
    alone = [model.generate([prompt], **call)[0] for prompt in prompts]
    assert len(set(map(len, alone))) > 2
    for limits in ({}, {"max_num_seqs": 2}, {"cache_memory": "200000B"}):
        assert model.generate(prompts, **call, **limits) == alone


BAD = {
    "adapter lists 1, but there are 3 prompts": {"adapter": [None]},
    "adapter is 'runs/1'; expected None": {"adapter": "runs/1"},
    "adapter is another model's": {"adapter": {"q_proj": None}},
    "adapter is True": {"adapter": True},
    "seed lists 2 seeds, and the call has 3 answers": {"seed": [1, 2]},
    "pass tokenizer=tokenizer too": {"stop_strings": "."},
    "stop_strings hold ''": {"stop_strings": ["a", ""], "tokenizer": Letters()},
    "stop_strings hold 5": {"stop_strings": [5], "tokenizer": Letters()},
    "stop_strings hold 7": {"stop_strings": 7, "tokenizer": Letters()},
    "max_new_tokens is 2.5; expected a whole number": {"max_new_tokens": 2.5},
    "max_new_tokens is True": {"max_new_tokens": True},
    "max_length is '9'": {"max_length": "9"},
    "num_return_sequences is 1.5": {"num_return_sequences": 1.5},
    "eos_token_ids is 'a'; expected a token": {"eos_token_id": "a"},
    r"eos_token_ids is \[2.5": {"eos_token_ids": [2.5]},
    "leave return_dict_in_generate out": {
        "return_logprobs": True,
        "return_dict_in_generate": False,
    },
    "min_new_tokens is -1": {"min_new_tokens": -1},
    "min_new_tokens 9 is more than the 8 tokens": {"min_new_tokens": 9, "max_new_tokens": 8},
    "max_num_seqs is 0": {"max_num_seqs": 0},
    "'lots' is not a size": {"cache_memory": "lots"},
    "cache_memory is -1": {"cache_memory": -1},
    "return_logprobs=True gives": {"output_scores": True},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_argument_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, **BAD[message])

"""Decoding with the cache gives the tokens of the whole model without a cache."""

import json

import pytest
import torch
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.model.generation_arguments import read_generation_defaults


@pytest.fixture
def model(tmp_path):
    folder = make_tiny_model(tmp_path / "m", attention_bias=True)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=64, dtype=torch.float32, device="cpu"
    )
    FastLanguageModel.get_peft_model(model, r=4)
    assert model.eos_token_ids == (2,)
    model.eos_token_ids = ()  # random weights emit token 2 now and then
    with torch.no_grad():
        for i, (_, p) in enumerate(model.trainable_parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return model


def greedy_without_cache(model, prompt, n, eos=()):
    ids = list(prompt)
    for _ in range(n):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


PROMPTS = [[5, 9, 300, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19]]


def test_cached_decoding_of_a_batch_equals_decoding_each_prompt_without_a_cache(model):
    expected = [greedy_without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=20) == expected
    assert len({tuple(answer) for answer in expected}) == 3


def test_smollm2_decodes_with_the_cache_as_without_it_and_says_paris(smollm2):
    model, tokenizer = FastLanguageModel.from_pretrained(smollm2, device="cpu", load_in_4bit=False)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    answer = model.generate([prompt], max_new_tokens=12, eos_token_ids=tokenizer.eos_token_ids)[0]
    assert answer == greedy_without_cache(model, prompt, 12, tokenizer.eos_token_ids)
    assert "Paris" in tokenizer.decode(answer)


def test_each_row_stops_at_the_end_token_and_leaves_it_out(model):
    free = model.generate(PROMPTS, max_new_tokens=20)
    eos = free[0][7]
    expected = [answer[: answer.index(eos)] if eos in answer else answer for answer in free]
    assert model.generate(PROMPTS, max_new_tokens=20, eos_token_ids=[eos]) == expected


def test_the_models_own_end_token_is_the_default(model):
    free = model.generate([PROMPTS[0]], max_new_tokens=20)
    model.eos_token_ids = (free[0][7],)
    assert (
        model.generate([PROMPTS[0]], max_new_tokens=20)[0] == free[0][: free[0].index(free[0][7])]
    )


def test_decoding_stops_at_the_context_the_model_was_loaded_for(model):
    answer = model.generate([PROMPTS[0], [3]], max_new_tokens=500)
    assert [len(a) for a in answer] == [64 - 4, 64 - 1]


def test_tokens_are_streamed_as_they_are_chosen(model):
    streamed = [[] for _ in PROMPTS]
    answers = model.generate(
        PROMPTS, max_new_tokens=9, on_token=lambda row, token: streamed[row].append(token)
    )
    assert streamed == answers


def test_sampling_follows_its_seed_and_its_limits(model):
    sampled = [
        model.generate(PROMPTS, max_new_tokens=15, temperature=1.5, seed=s) for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    greedy = model.generate(PROMPTS, max_new_tokens=15)
    assert model.generate(PROMPTS, max_new_tokens=15, temperature=1.5, top_k=1) == greedy
    assert model.generate(PROMPTS, max_new_tokens=15, temperature=1.5, top_p=1e-6) == greedy


def test_sampled_shares_follow_the_softmax(model):
    logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits / 2).softmax(-1)
    drawn = model.generate([PROMPTS[0]] * 4000, max_new_tokens=1, temperature=2.0, top_k=0)
    shares = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(expected)) / 4000
    assert (shares - expected).abs().max() < 5 * (expected.max() / 4000) ** 0.5


BAD = {
    "at least one prompt": {"prompts": []},
    "no empty one": {"prompts": [[1], []]},
    "a prompt has 64 tokens": {"prompts": [[1] * 64]},
    "temperature is -1": {"prompts": [[1]], "temperature": -1},
    "min_p is 2": {"prompts": [[1]], "min_p": 2},
    "repetition_penalty is 0": {"prompts": [[1]], "repetition_penalty": 0},
    "so temperature=0.7 would change nothing": {
        "prompts": [[1]],
        "do_sample": False,
        "temperature": 0.7,
    },
    "so top_k=5, top_p=0.5 would change": {
        "prompts": [[1]],
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 5,
    },
    "do_sample=True draws a token and temperature 0": {
        "prompts": [[1]],
        "do_sample": True,
        "temperature": 0.0,
    },
    "limit the same thing": {"prompts": [[1]], "max_length": 9, "max_new_tokens": 9},
    "max_length 2 counts the prompt too, which has 3": {"prompts": [[1, 2, 3]], "max_length": 2},
    "max_new_tokens is 0": {"prompts": [[1]], "max_new_tokens": 0},
    "num_return_sequences is 0": {"prompts": [[1]], "num_return_sequences": 0},
    "a streamer shows one answer to one prompt": {"prompts": [[1], [2]], "streamer": "any"},
    "num_beams=4 is not supported: beams are": {"prompts": [[1]], "num_beams": 4},
    r"input_ids has the shape \(3,\)": {"input_ids": torch.tensor([1, 2, 3])},
    r"attention_mask \(1, 2\) and input_ids \(1, 1\)": {
        "input_ids": torch.tensor([[1]]),
        "attention_mask": torch.ones(1, 2),
    },
    "attention_mask belongs to a tensor": {"prompts": [[1]], "attention_mask": [[1]]},
    "top_p is 0": {"prompts": [[1]], "top_p": 0},
    "holds id 512": {"prompts": [[512]]},
    "holds id -5": {"prompts": [[3, -5]]},
    "prompts are lists of token ids": {"prompts": [1, 2, 3]},
    "prompts are lists of token ids, one": {"prompts": ["hi"]},
    "prompts are lists of token": {"prompts": 5},
    "prompts holds ids, but no input_ids": {"prompts": {"ids": [[1]]}},
    "do_sample is 'no'; expected True": {"prompts": [[1]], "do_sample": "no"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_request_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**BAD[message])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_no_answer(model, temperature):
    with torch.no_grad():
        dict(model.trainable_parameters())["model.layers.0.mlp.down_proj.lora_B.weight"][0] = (
            torch.nan
        )
    with pytest.raises(ValueError, match="logits of the next token are not finite"):
        model.generate([[5, 6]], max_new_tokens=2, temperature=temperature)


@pytest.mark.parametrize("wrong", ["2", [2], True, 2.0])
def test_a_pad_token_that_is_no_id_is_named_with_its_file(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": wrong}))
    with pytest.raises(ValueError, match=r"generation_config.json: pad_token_id is .*; expected"):
        read_generation_defaults(tmp_path)


def test_an_unknown_argument_names_the_nearest_one(model):
    with pytest.raises(TypeError, match="no argument 'max_tokens'; did you mean max_new_tokens"):
        model.generate([[1]], max_tokens=5)


def test_answers_of_different_lengths_need_a_pad_token(model):
    model.generation_defaults = {}
    inputs = {"input_ids": torch.tensor([PROMPTS[0], PROMPTS[2][:4]]), "max_new_tokens": 20}
    free = model.generate(**inputs)
    end = int(free[0, 9])
    with pytest.raises(ValueError, match="name a pad_token_id"):
        model.generate(**inputs, eos_token_id=end)
    assert model.generate(**inputs, eos_token_id=end, pad_token_id=3)[0, -1] == 3

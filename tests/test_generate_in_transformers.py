"""generate gives the tokens of transformers, from the same folder and the same arguments."""

import itertools
import json
import os
import re

import pytest
import torch
from tiny import make_tiny_model

from minitune import FastLanguageModel, TextStreamer
from minitune.kernels.sample_tokens import gumbel_noise
from minitune.model.answer_seeds import answer_seeds

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
TEXTS = ["The order of twelve", "A", "She didn't say that they'd arrive before"]


def load_pair(folder, generation_config=None):
    """Return a model, transformers' model and the tokenizer of a folder."""
    make_tiny_model(folder, dtype=torch.float32)
    if generation_config is not None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(generation_config), encoding="utf-8")
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, dtype=torch.float32, device="cpu", load_in_4bit=False
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, theirs.eval(), tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load_pair(tmp_path_factory.mktemp("pair"))


def draw_as_minitune(monkeypatch, seed, prompts):
    """Let transformers draw from its own probabilities with minitune's noise for a call."""
    seeds = torch.tensor(answer_seeds(seed, prompts, [0] * len(prompts)))
    draws = itertools.count()

    def multinomial(probabilities, num_samples):
        tokens = torch.arange(probabilities.shape[-1])[None]
        noise = gumbel_noise(seeds, torch.full_like(seeds, next(draws)), tokens)
        return (probabilities.log() + noise).argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)


CALLS = [
    {},
    {"max_length": 25, "max_new_tokens": None},
    {"repetition_penalty": 1.6},
    {"do_sample": False, "temperature": 1.0, "top_p": None},
    {"do_sample": True, "temperature": 1.5, "min_p": 0.1},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2},
    {"do_sample": True, "num_return_sequences": 2, "temperature": 1.3},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_the_tokens_of_transformers(pair, monkeypatch, call, side):
    model, theirs, tokenizer = pair
    call = {"max_new_tokens": 12, **call}
    expected_side = "left"  # transformers continues a prompt that is padded on the right wrongly
    ends = {"eos_token_id": [2, 40, 41, 42, 43]}  # so that answers end at different places
    padded = {"padding": True, "return_tensors": "pt"}
    inputs = tokenizer(TEXTS, padding_side=side, **padded)
    answer = model.generate(**inputs, **call, **ends, pad_token_id=0, seed=5)
    times = call.get("num_return_sequences", 1)
    prompts = [ids for ids in map(tokenizer.encode, TEXTS) for _ in range(times)]
    draw_as_minitune(monkeypatch, 5, prompts)
    reference = tokenizer(TEXTS, padding_side=expected_side, **padded)
    call = {key: value for key, value in call.items() if value is not None}
    expected = theirs.generate(**reference, **call, **ends, pad_token_id=0)
    width = inputs.shape[1]
    assert torch.equal(answer[:, width:], expected[:, width:])
    repeated = inputs.input_ids.repeat_interleave(times, 0)
    assert torch.equal(answer[:, :width], repeated)


def test_an_unnamed_setting_comes_from_the_folder_as_in_transformers(tmp_path, monkeypatch):
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "eos_token_id": [399, 2],
        "pad_token_id": 7,
    }
    model, theirs, tokenizer = load_pair(tmp_path, config)
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    for call in ({}, {"temperature": 1.4}, {"do_sample": False}, {"top_k": 3, "top_p": 1.0}):
        answer = model.generate(**inputs, max_new_tokens=16, seed=1, **call)
        draw_as_minitune(monkeypatch, 1, inputs.input_ids.tolist())
        assert torch.equal(answer, theirs.generate(**inputs, max_new_tokens=16, **call)), call


def test_stop_strings_end_an_answer_where_transformers_ends_it(pair):
    model, theirs, tokenizer = pair
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    inputs = tokenizer(TEXTS[:2], padding=True, padding_side="left", return_tensors="pt")
    call = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    width = inputs.input_ids.shape[1]
    free = model.generate(**inputs, **call)
    stretches = [re.findall("[ -~]{2,}", tokenizer.decode(row)) for row in free[:, width:]]
    for stop in (stretches[0][-1], [stretches[0][1][:2], stretches[1][-1]]):
        stops = {"stop_strings": stop, **call}
        found = model.generate(**inputs, **stops, tokenizer=tokenizer)
        assert torch.equal(found, theirs.generate(**inputs, **stops, tokenizer=their_tokenizer))
        assert found.shape != free.shape or not torch.equal(found, free)


def test_a_pad_token_is_left_out_without_a_mask_if_it_ends_nothing(pair):
    model, theirs, _ = pair
    ids = torch.tensor([[0, 0, 30, 31], [32, 33, 34, 35]])
    call = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 2, "do_sample": False}
    assert torch.equal(model.generate(ids, **call), theirs.generate(ids, **call))
    (alone,) = model.generate([[30, 31]], max_new_tokens=5, eos_token_id=2)
    assert model.generate(input_ids=ids, **call)[0, 4:].tolist()[: len(alone)] == alone


def test_every_form_of_a_prompt_gives_the_same_tokens(pair):
    model, _, tokenizer = pair
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6)
    lists = model.generate([tokenizer.encode(TEXTS[0])], max_new_tokens=6)
    assert lists[0] == expected[0, inputs.shape[1] :].tolist()[: len(lists[0])]
    forms = ({"inputs": inputs.input_ids}, {"input_ids": inputs}, {"prompts": inputs.input_ids})
    for form in forms:
        assert torch.equal(model.generate(**form, max_new_tokens=6, use_cache=True), expected)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt")
    assert torch.equal(
        model.generate(input_ids=chat, max_new_tokens=6),
        model.generate(**chat, max_new_tokens=6),
    )


def test_both_libraries_streamers_show_the_same_text(pair, capsys):
    model, theirs, tokenizer = pair
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    shown = []
    for twin in (model, theirs):
        twin.generate(
            **inputs,
            max_new_tokens=9,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
        )
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != "\n"

"""generate gives the tokens of transformers, from the same folder and the same arguments."""

import json
import os

import pytest
import torch
from tiny import make_tiny_model

from minitune import FastLanguageModel, TextStreamer
from minitune.model.sampling import Sampler, SamplingConfig

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


CALLS = [
    {},
    {"max_length": 25, "max_new_tokens": None},
    {"repetition_penalty": 1.6},
    {"do_sample": False, "temperature": 1.0, "top_p": None},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_the_tokens_of_transformers(pair, call, side):
    model, theirs, tokenizer = pair
    call = {"max_new_tokens": 12, **call}
    expected_side = "left"  # transformers continues a prompt that is padded on the right wrongly
    ends = {"eos_token_id": [2, 40, 41, 42, 43]}  # so that answers end at different places
    padded = {"padding": True, "return_tensors": "pt"}
    inputs = tokenizer(TEXTS, padding_side=side, **padded)
    torch.manual_seed(5)
    answer = model.generate(**inputs, **call, **ends, pad_token_id=0)
    torch.manual_seed(5)
    reference = tokenizer(TEXTS, padding_side=expected_side, **padded)
    call = {key: value for key, value in call.items() if value is not None}
    expected = theirs.generate(**reference, **call, **ends, pad_token_id=0)
    width = inputs.shape[1]
    assert torch.equal(answer[:, width:], expected[:, width:])
    repeated = inputs.input_ids.repeat_interleave(call.get("num_return_sequences", 1), 0)
    assert torch.equal(answer[:, :width], repeated)


def test_an_unnamed_setting_comes_from_the_folder_as_in_transformers(tmp_path):
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "eos_token_id": [400, 2],
        "pad_token_id": 7,
    }
    model, theirs, tokenizer = load_pair(tmp_path, config)
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    for call in ({"do_sample": False}, {"top_k": 1}):
        answers = []
        for twin in (model, theirs):
            torch.manual_seed(1)
            answers.append(twin.generate(**inputs, max_new_tokens=16, **call))
        assert torch.equal(*answers), call


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


@pytest.mark.parametrize("seed", range(3))
def test_filters_equal_transformers_logits_processors(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 50, generator=generator).mul(3)
    logits[:, 10:14] = logits[:, 10:11]  # a tie
    processors = transformers.generation.logits_process
    rule = SamplingConfig(1.4, top_k=20, top_p=0.85, min_p=0.15, repetition_penalty=1.3)
    prompts = [[1, 2, 10], [3], [4, 4], [49]]
    scores = logits
    ids = torch.tensor([[1, 2, 10], [3, 3, 3], [4, 4, 4], [49, 49, 49]])
    for processor in (
        processors.RepetitionPenaltyLogitsProcessor(1.3),
        processors.TemperatureLogitsWarper(1.4),
        processors.TopKLogitsWarper(20),
        processors.TopPLogitsWarper(0.85),
        processors.MinPLogitsWarper(0.15),
    ):
        scores = processor(ids, scores)
    sampler = Sampler(rule, prompts, 50)
    penalty = processors.RepetitionPenaltyLogitsProcessor(1.3)
    torch.testing.assert_close(sampler.penalised(logits), penalty(ids, logits))
    assert (logits.gather(1, ids) < 0).any()  # most tokens below zero are filtered out later
    found = rule.probabilities(sampler.penalised(logits))
    torch.testing.assert_close(found, scores.softmax(-1))
    assert (found == 0).any()

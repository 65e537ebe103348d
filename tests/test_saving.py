"""A model saves as in notebooks, says which base it merged onto, and refuses the rest."""

import json

import pytest
import torch
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.checkpoints.adapter import CONFIG, WEIGHTS
from minitune.checkpoints.merge import merge_text

IDS = torch.tensor([[5, 17, 300, 42, 7, 7, 260, 99, 3]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def load(name, **options):
    options = {"max_seq_length": 64, "device": "cpu"} | options
    return FastLanguageModel.from_pretrained(name, **options)


def trained(folder, **options):
    model, tokenizer = load(folder, **options)
    model = FastLanguageModel.get_peft_model(model, r=4)
    draw_adapter(model, b=0.2)
    return model, tokenizer


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_adapter_saved_with_its_tokenizer_loads_with_its_chat_template(tiny, tmp_path, recwarn):
    model, tokenizer = trained(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    model.save_pretrained(tmp_path / "two calls", safe_serialization=True)
    tokenizer.save_pretrained(tmp_path / "two calls")
    model.save_pretrained_merged(tmp_path / "one call", tokenizer, save_method="lora")
    for name in ("two calls", "one call"):
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert {CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja"} <= names
        again, its_tokenizer = load(tmp_path / name)
        assert torch.equal(logits(again), logits(model))
        assert its_tokenizer.chat_template == tokenizer.chat_template
        assert again.eos_token_ids == its_tokenizer.eos_token_ids
    assert not recwarn.list


def test_a_chat_template_of_an_adapter_is_never_dropped_in_silence(tiny, tmp_path, recwarn):
    model, tokenizer = trained(tiny)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    bare, own = load(tiny)
    bare.load_adapter(tmp_path / "plain")  # the template of the base
    assert not recwarn.list
    template = "{{ messages[0]['content'] }}"
    config = {"chat_template": template}  # as other programs write it
    model.save_pretrained(tmp_path / "changed")
    (tmp_path / "changed" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="chat template of its own; pass tokenizer="):
        bare.load_adapter(tmp_path / "changed")
    with pytest.warns(UserWarning, match="chat template of its own; render prompts") as warned:
        bare.read_adapter(tmp_path / "changed")
    assert warned[0].filename == __file__
    bare.load_adapter(tmp_path / "changed", tokenizer=own)
    assert own.chat_template == template


def test_merging_names_the_base_on_stderr_and_how_to_answer_as_in_training(tiny, tmp_path, capsys):
    nf4, _ = trained(tiny)
    plain, _ = trained(tiny, load_in_4bit=False)
    hint = '; merge_base="nf4" answers as in training'
    cases = {
        "original": (nf4, {}, f"the adapter into the 16-bit weights of {tiny}{hint}"),
        "nf4": (nf4, {"merge_base": "nf4"}, f"the adapter into the NF4 weights of {tiny}"),
        "plain": (plain, {}, f"the adapter into the 16-bit weights of {tiny}"),
    }
    for name, (model, options, text) in cases.items():
        model.save_pretrained_merged(tmp_path / name, **options)
        assert capsys.readouterr().err.split() == ["merging", *text.split()]  # in lines of 80
    nf4.save_pretrained_gguf(tmp_path / "gguf", quantization_method="f16")
    assert f"merging the adapter into the 16-bit weights of {tiny}{hint}" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_an_adapter_remembers_that_it_was_trained_on_nf4(tiny, tmp_path):
    for form, load_in_4bit in (("nf4", True), ("16bit", False)):
        trained(tiny, load_in_4bit=load_in_4bit)[0].save_pretrained(tmp_path / form)
        again, _ = load(tmp_path / form, load_in_4bit=False)
        assert again.lora_base == form
        text = merge_text(again, "auto")
        assert text.endswith('; merge_base="nf4" answers as in training') is load_in_4bit
    assert merge_text(load(tiny)[0], "auto") == f"without an adapter: the 16-bit weights of {tiny}"


def test_the_same_adapter_is_saved_as_the_same_bytes(tiny, tmp_path):
    for name in "ab":
        trained(tiny)[0].save_pretrained(tmp_path / name)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_shards_have_the_size_that_was_asked_for(tiny, tmp_path):
    model, _ = trained(tiny)
    model.save_pretrained_merged(tmp_path / "m", max_shard_size="0.05MB")
    files = [path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors")]
    assert len(files) > 2 and (tmp_path / "m" / "model.safetensors.index.json").is_file()


REFUSED = {
    "merged_4bit": ({"save_method": "merged_4bit"}, r"use 'merged_16bit', .*save_4bit"),
    "forced": ({"save_method": "merged_4bit_forced"}, "merged weights in silence"),
    "unknown": ({"save_method": "x"}, "choose 'merged_16bit' or 'lora'"),
    "push": ({"push_to_hub": True}, "nothing is uploaded"),
    "pickle": ({"safe_serialization": False}, "only safetensors are written"),
    "size": ({"max_shard_size": "many"}, "'many' is not a size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_with_the_remedy_and_writes_nothing(tiny, tmp_path, name):
    options, remedy = REFUSED[name]
    model, tokenizer = trained(tiny)
    with pytest.raises(ValueError, match=remedy):
        model.save_pretrained_merged(tmp_path / "m", tokenizer, **options)
    assert not (tmp_path / "m").exists()

"""Models, tokenizers and requests that GGUF cannot express are refused by name, leaving nothing."""

import json

import pytest
import torch
from full_disk import files_limited_to
from safetensors.torch import load_file, save_file
from test_merge import load, write_prequantized
from tiny import make_tiny_model, write_tokenizer
from tiny_families import make_tiny_family

from minitune.config.model_config import ModelConfig
from minitune.gguf.export import convert_folder, export_gguf
from minitune.gguf.model_metadata import check_expressible


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Each function below damages a folder and returns the error that export must give.


def twice_the_same_token(folder):
    write_tokenizer(folder, "spm")
    (folder / "tokenizer.json").unlink()
    added = {"\u2581lamp": 401, "\u2581lamps": 402, "<s>": 403}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return "gives the token '\u2581lamp' the id 401, but the vocabulary gives it the id 400"


def larger_than_the_embedding(folder):
    token = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][0]
    more = [{**token, "id": 400 + i, "content": f"<{i}>"} for i in range(113)]
    edit_json(folder / "tokenizer.json", lambda c: c["added_tokens"].extend(more))
    return "ids up to 512, but the model's embedding has only 512 rows"


def unknown_words(folder):
    split = {
        "type": "Split",
        "pattern": {"Regex": "[a-z]+"},
        "behavior": "Isolated",
        "invert": False,
    }
    edit_json(
        folder / "tokenizer.json", lambda c: c["pre_tokenizer"]["pretokenizers"].insert(0, split)
    )
    return "tokenizer.json: llama.cpp has no name for this pre-tokenizer"


def lowercase(folder):
    edit_json(folder / "tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"}))
    return "tokenizer.json: the normalizer .*Lowercase.*, and llama.cpp does not normalise"


def word_level(folder):
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}
    edit_json(folder / "tokenizer.json", lambda c: c.update(model=model, added_tokens=[]))

    def remove_special_tokens(config):
        for key in [key for key in config if key.endswith("_token")]:
            del config[key]

    edit_json(folder / "tokenizer_config.json", remove_special_tokens)
    return "is a WordLevel tokenizer; GGUF export knows BPE"


def no_end(folder):
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, lambda c: c.pop("eos_token_id"))
    return "names no eos_token"


def foreign_tensor(folder):
    name = "model.layers.0.mlp.experts.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    return "model.layers.0.mlp.experts.weight has no place in the model"


def too_large_for_float16(folder):
    def enlarge(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6

    edit_tensors(folder, enlarge)
    return r"blk.1.ffn_up.weight: .* does not fit into float16; export as bf16"


DAMAGES = [
    twice_the_same_token,
    larger_than_the_embedding,
    unknown_words,
    lowercase,
    word_level,
    no_end,
    foreign_tensor,
    too_large_for_float16,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_gguf_cannot_express_is_refused_by_name_and_leaves_nothing(tmp_path, damage):
    folder = make_tiny_model(tmp_path / "base")
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        convert_folder(folder, tmp_path / "x.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


INEXPRESSIBLE = [  # values of config.json beside the family's defaults, and the error
    ("gemma2", {"attn_logit_softcapping": None}, "a sliding window and both soft caps"),
    ("gemma2", {"final_logit_softcapping": None}, "a sliding window and both soft caps"),
    ("gemma2", {"layer_types": ["full_attention"] * 26}, "a sliding window and both soft caps"),
    ("gemma2", {"attention_bias": True}, "no biases in attention"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "no attn_logit_softcapping"),
    ("gemma3_text", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 256, not 100"),
    ("smollm3", {"no_rope_layer_interval": 3}, "no RoPE in every 4th layer"),
    ("smollm3", {"mlp_bias": True}, "no biases in the MLP"),
    ("granite", {"head_dim": 64}, "heads of 4096 / 32 columns, not head_dim 64"),
    ("olmo2", {"tie_word_embeddings": True}, "a head that is not the embedding"),
]


@pytest.mark.parametrize(("model_type", "values", "message"), INEXPRESSIBLE, ids=str)
def test_models_that_llama_cpp_would_misread_are_refused(model_type, values, message):
    check_expressible(ModelConfig.from_dict({"model_type": model_type}))
    config = ModelConfig.from_dict({"model_type": model_type} | values)
    with pytest.raises(ValueError, match=f"{message}, but this model differs; save the merged fol"):
        check_expressible(config)


@pytest.mark.filterwarnings("ignore:.*llama.cpp adds")
def test_training_beyond_a_window_that_llama_cpp_ignores_is_refused(tmp_path):
    folder = make_tiny_family(tmp_path / "base", "mistral with a window")
    model, tokenizer = load(folder)
    window = max(kind.window or 0 for kind in model.config.layer_kinds)
    model.max_trained_seqlen = window + 1
    with pytest.raises(ValueError, match=f"set max_length to {window}, or save the merged folder"):
        export_gguf(model, tmp_path / "x.gguf", tokenizer)
    model.max_trained_seqlen = window
    with pytest.warns(UserWarning, match=f"a context of at most {window} tokens"):
        assert export_gguf(model, tmp_path / "x.gguf", tokenizer).is_file()


REQUESTS = {  # the error -> (file or folder below tmp_path, further arguments of export_gguf)
    "quantization_method 'q9' is not supported": ("", {"quantization_method": "q9"}),
    r"choose from f32, .* fast_quantized \(q8_0\)": ("", {"quantization_method": ["q8_0", "q1"]}),
    r"quantization_method \[\] is not supported": ("", {"quantization_method": []}),
    "quantization_method None is not supported": ("", {"quantization_method": None}),
    r"2 types were asked for \(q8_0, f16\)": ("x.gguf", {"quantization_method": ["q8_0", "f16"]}),
    "old.gguf: exists; remove it": ("old.gguf", {}),
    "base-minitune-F16.gguf: exists": ("two", {"quantization_method": ["q8_0", "f16"]}),
    "give a folder, or a file name that": ("base/config.json", {}),
    "merge_base 'x' does not exist": ("", {"merge_base": "x"}),
}


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow", "attention_factor", "mscale"])
def test_a_value_of_yarn_that_llama_cpp_ignores_is_refused(tmp_path, key):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, key: 2.0}
    folder = make_tiny_model(tmp_path / "m", rope_scaling=yarn)
    with pytest.raises(ValueError, match=f"does not read YaRN's {key} for llama"):
        convert_folder(folder, tmp_path / "x.gguf", "f16")


def test_bad_requests_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    (tmp_path / "old.gguf").write_bytes(b"mine")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "base-minitune-F16.gguf").write_bytes(b"mine")
    write_prequantized(model, tmp_path / "nf4")
    for message, (path, options) in REQUESTS.items():
        with pytest.raises(ValueError, match=message):
            export_gguf(model, tmp_path / path, tokenizer, **options)
    with pytest.raises(ValueError, match="nf4: holds 4-bit weights; load it as a model"):
        convert_folder(tmp_path / "nf4", tmp_path)
    with pytest.raises(ValueError, match=r"none/config\.json: not found"):
        convert_folder(tmp_path / "none", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    message = r"x.gguf: needs [\d,]+ bytes, but only 1,000 are left on the disk"
    with pytest.raises(ValueError, match=message):
        export_gguf(model, tmp_path / "x.gguf", tokenizer)
    names = ["base", "nf4", "old.gguf", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len(list((tmp_path / "two").iterdir())) == 1


def test_a_path_that_cannot_be_made_is_refused_and_what_is_there_stays(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    for below in ("x.gguf/y.gguf", "x.gguf/deep/y.gguf"):
        message = rf"{below}: its folder could not be made \(.*: .*x.gguf.*\)"
        with pytest.raises(ValueError, match=message):
            convert_folder(folder, tmp_path / below)
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"could not be written \(File name too long\)"):
        convert_folder(folder, tmp_path / f"{'x' * 248}.gguf")


@pytest.mark.parametrize(
    "wrong", ['{"temperature": [0.7]}', '{"top_k": "40"}', '{"top_p": NaN}', '{"min_p": true}']
)
def test_a_sampling_default_that_is_no_number_is_named_with_its_file_and_nothing_is_written(
    tmp_path, wrong
):
    folder = make_tiny_model(tmp_path / "base")
    (folder / "generation_config.json").write_text(wrong)
    message = r"base/generation_config.json: \w+ is .*, expected a number"
    with pytest.raises(ValueError, match=message):
        convert_folder(folder, tmp_path / "out" / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_write_that_fails_midway_leaves_nothing(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    with (
        files_limited_to(100_000),
        pytest.raises(ValueError, match=r"x\.gguf: could not be written"),
    ):
        convert_folder(folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]

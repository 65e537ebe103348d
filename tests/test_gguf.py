"""GGUF files hold the merged tensors in llama.cpp's layout, and the keys that llama.cpp needs."""

import json
import math

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quants
from gguf_files import LLAMA3_ROPE, metadata_of, tensors_of
from test_merge import load
from tiny import CHATML, make_tiny_model

from minitune.checkpoints.merge import merge_to_folder, merged_tensors
from minitune.config.architectures import ARCHITECTURES
from minitune.config.layer_kinds import FULL, SLIDING
from minitune.config.model_config import ModelConfig
from minitune.gguf.export import convert_folder, export_gguf
from minitune.gguf.general_metadata import size_label
from minitune.gguf.model_metadata import gguf_name, model_metadata
from minitune.gguf.writer import Content, TensorInfo, write_gguf

HEAD_DIM = 16


def paired(rows):
    """Return q or k rows with i and i + K/2 of each head as neighbours, by plain indexing."""
    half = HEAD_DIM // 2
    order = [row for i in range(half) for row in (i, i + half)]
    heads = len(rows) // HEAD_DIM
    return rows[[HEAD_DIM * head + row for head in range(heads) for row in order]]


def check_q8_0(stored, values, name):
    """Check a Q8_0 tensor against gguf-py's quantiser, and its error against the step."""
    assert np.array_equal(stored.data, quants.quantize(values.numpy(), stored.tensor_type)), name
    back = torch.from_numpy(dequantize(stored.data, stored.tensor_type)).view(-1, 32)
    blocks = values.view(-1, 32)
    # half a step, and the rounding of the scale to float16: 127 * 2**-11 of a step
    limit = blocks.abs().amax(1) / 127 * 0.57
    assert ((back - blocks).abs().amax(1) <= limit).all(), name


@pytest.mark.parametrize("method", ["f32", "f16", "bf16", "q8_0"])
def test_the_tensors_are_the_merged_ones_with_q_and_k_rows_paired(tmp_path, method):
    folder = make_tiny_model(tmp_path / "base", attention_bias=True, kv_heads=2, tie=False)
    model, tokenizer = load(folder)
    stored = tensors_of(export_gguf(model, tmp_path, tokenizer, method))
    merged = dict(merged_tensors(model))
    family = model.config.architecture
    assert sorted(stored) == sorted(gguf_name(name, family) for name in merged)
    for name, tensor in merged.items():
        values = tensor.float()
        if name.split(".")[-2] in ("q_proj", "k_proj"):
            values = paired(values)
        found = stored[gguf_name(name, family)]
        if method == "q8_0" and tensor.dim() == 2:
            check_q8_0(found, values, name)
        else:
            back = torch.from_numpy(dequantize(found.data, found.tensor_type).astype(np.float32))
            # float16 rounds values below its smallest step
            tolerance = 2**-24 if method == "f16" else 0.0
            assert (back - values).abs().max() <= tolerance, name
        assert found.tensor_type.name == ("F32" if tensor.dim() == 1 else method.upper())


def test_q8_0_gives_way_to_f16_where_a_row_is_no_multiple_of_32(tmp_path):
    folder = make_tiny_model(tmp_path / "base", hidden=48, heads=3, kv_heads=1, ffn=96)
    stored = tensors_of(convert_folder(folder, tmp_path / "x.gguf"))
    for name in ("blk.0.ffn_up.weight", "token_embd.weight"):
        assert stored[name].tensor_type.name == "F16"
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"


def test_the_metadata_says_what_llama_cpp_needs(tmp_path):
    folder = make_tiny_model(
        tmp_path / "Tiny-Llama", rope_scaling=LLAMA3_ROPE, head_dim=32, tokenizer="llama3"
    )
    settings = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = load(folder)
    path = export_gguf(model, tmp_path / "out", tokenizer)
    assert path == tmp_path / "out" / "Tiny-Llama-minitune-Q8_0.gguf"
    metadata = metadata_of(path)
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny-Llama-minitune",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny-Llama",
        "general.size_label": "131K",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.sampling.temp": pytest.approx(0.7),
        "general.sampling.top_k": 40,
        "general.sampling.top_p": pytest.approx(0.9),
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHATML,
    }
    arrays = ("tokens", "token_type", "merges")
    single = {
        key: value
        for key, value in metadata.items()
        if not key.startswith("GGUF.") and not key.endswith(arrays)
    }
    assert single == expected
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and types[:3] == [3, 3, 3]
    assert set(types[3:400]) == {1} and set(types[400:]) == {5} and tokens[511] == "[PAD511]"


def test_a_model_out_of_the_cache_is_named_with_its_organisation(tmp_path, monkeypatch):
    entry = tmp_path / "hub" / "models--acme--Tiny"
    make_tiny_model(entry / "snapshots" / "abc")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model, tokenizer = load("acme/Tiny", lora=False)
    path = export_gguf(model, tmp_path, tokenizer, "f16")
    metadata = metadata_of(path)
    assert path.name == "Tiny-F16.gguf" and metadata["general.name"] == "Tiny"
    assert metadata["general.base_model.0.organization"] == "acme"


def test_linear_rope_scaling_and_the_plain_case_have_their_keys(tmp_path):
    linear = make_tiny_model(tmp_path / "base", rope_scaling={"type": "linear", "factor": 4.0})
    metadata = metadata_of(convert_folder(linear, tmp_path / "x.gguf", "f16"))
    assert metadata["llama.rope.scaling.type"] == "linear"
    assert metadata["llama.rope.scaling.factor"] == 4.0
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["general.quantization_version"] == 2
    assert metadata["llama.attention.key_length"] == 16
    assert "general.base_model.count" not in metadata


@pytest.mark.parametrize(
    ("model_type", "values", "window", "pattern"),
    [
        ("mistral", {}, None, None),
        ("phi3", {}, 0, None),
        ("phi3", {"sliding_window": 2047}, 2047, None),
        ("olmo3", {"num_hidden_layers": 4}, 4096, [True, True, True, False]),
        ("gemma2", {}, 4096, None),
        ("gemma3_text", {}, 4096, None),
        ("gemma3_text", {"layer_types": [FULL, SLIDING] * 13}, 4096, [False, True] * 13),
    ],
    ids=str,
)
def test_the_keys_of_a_window_are_those_that_llama_cpp_knows(model_type, values, window, pattern):
    metadata = model_metadata(ModelConfig.from_dict({"model_type": model_type} | values))
    key = f"{ARCHITECTURES[model_type].gguf.name}.attention.sliding_window"
    assert metadata.get(key) == window and metadata.get(f"{key}_pattern") == pattern


def test_converting_a_merged_folder_gives_the_tensors_of_a_direct_export(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    merge_to_folder(model, tmp_path / "merged", tokenizer, shard_bytes=50_000)
    direct = tensors_of(export_gguf(model, tmp_path / "direct.gguf", tokenizer))
    converted = tensors_of(convert_folder(tmp_path / "merged", tmp_path / "converted.gguf"))
    assert direct.keys() == converted.keys()
    assert all(np.array_equal(direct[name].data, converted[name].data) for name in direct)


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    path = export_gguf(model, tmp_path, tokenizer, "f16")
    whole = path.read_bytes()
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"F16\.gguf: exists; remove it"):
        export_gguf(model, tmp_path, tokenizer, "f16")
    assert path.read_bytes() == b"old"
    assert export_gguf(model, tmp_path, tokenizer, "f16", overwrite=True) == path
    assert path.read_bytes() == whole


def test_tensors_of_odd_sizes_begin_at_aligned_offsets(tmp_path):
    shapes = {"a": (3,), "b": (5, 1), "c": (2, 7)}
    tensors = [torch.arange(math.prod(shape)).view(shape).float() for shape in shapes.values()]
    infos = [TensorInfo(name, shape, GGMLQuantizationType.F32) for name, shape in shapes.items()]
    write_gguf({tmp_path / "odd.gguf": Content({}, infos)}, tensors, progress=False)
    stored = tensors_of(tmp_path / "odd.gguf")
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        assert torch.equal(torch.from_numpy(stored[name].data.copy()).view(shape), tensor)


def test_sizes_are_named_with_two_digits():
    sizes = {
        134_515_008: "135M",
        1_235_814_400: "1.2B",
        8_030_261_248: "8.0B",
        70_553_706_496: "71B",
    }
    assert {parameters: size_label(parameters) for parameters in sizes} == sizes

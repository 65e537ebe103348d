"""GGUF: llama.cpp computes what transformers does and cuts text into the same tokens; what a file holds; bad input."""

import json
import re
import resource
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize, quants
from test_merge import load, write_prequantized
from tiny import CHATML, TEXTS, make_tiny_model, sentencepiece_model, write_tokenizer

from minitune import FastLanguageModel
from minitune.checkpoints.merge import merge_to_folder, merged_tensors
from minitune.commands import export
from minitune.config.training_config import GGUF_METHODS
from minitune.data.batching import collate
from minitune.data.tokenize_dataset import load_dataset, prepare
from minitune.data.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder, export_gguf, gguf_name, size_label

DEMO = Path(__file__).parents[1] / "scripts" / "demonstration"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "grouped queries, tied": {},
    "llama3 rope, untied, a tensor that needs padding": {
        "rope_scaling": LLAMA3,
        "tie": False,
        "tokenizer": "llama3",
        "head_dim": 24,
    },
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "wide heads": {"head_dim": 32, "kv_heads": 1},
    "biases": {"attention_bias": True, "tie": False},
    "sentencepiece, width no multiple of 32": {
        "hidden": 48,
        "heads": 3,
        "kv_heads": 1,
        "ffn": 80,
        "tokenizer": "spm",
    },
}


class LlamaCpp:
    """llama.cpp with one model loaded."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
        params.check_tensors, params.warmup, params.verbosity = True, False, -1
        self.server = xllamacpp.Server(params)

    def next_log_probabilities(self, ids, vocab):
        """Log probability of every token after the prompt `ids` (vocab,)."""
        # The reply has no entry for a token that ends inside a character, so a whole one is forced to come next; the
        # probabilities reported are those before that.
        request = {
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "n_probs": vocab,
            "logit_bias": [[20, 1000]],
        }
        step = self.server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]
        values = {token["id"]: token["logprob"] for token in step["top_logprobs"]}
        return torch.tensor([values[id] for id in range(vocab)])

    def answer(self, ids, tokens):
        """The text of a greedy continuation."""
        request = {"prompt": ids, "max_tokens": tokens, "temperature": 0}
        return self.server.handle_completions(request)["choices"][0]["text"]

    def tokenize(self, text, add_special=True):
        body = json.dumps(
            {"content": text, "add_special": add_special, "parse_special": True}
        ).encode()
        request = urllib.request.Request(self.server.listening_address + "/tokenize", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())["tokens"]


def transformers_log_probabilities(folder, ids):
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return hf(torch.tensor([ids])).logits[0].log_softmax(-1)


def tensors_of(path):
    return {t.name: t for t in GGUFReader(path).tensors}


def metadata_of(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_llama_cpp_computes_what_transformers_does_on_the_merged_folder(tmp_path, shape):
    model, tokenizer = load(make_tiny_model(tmp_path / "base", **shape))
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer, "f16")
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    prompt = torch.randint(3, 400, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    expected, llama_cpp = (
        transformers_log_probabilities(tmp_path / "merged", prompt),
        LlamaCpp(path),
    )
    for length in (1, 2, 17, 40, 90):
        found = llama_cpp.next_log_probabilities(prompt[:length], 512)
        # float16 makes 0.01 - 0.06; rows not permuted, rope_freqs or a bias left out make several units
        assert (found - expected[length - 1]).abs().max() < 0.1, length


@pytest.mark.parametrize("method", GGUF_METHODS)
def test_the_tensors_are_the_merged_ones_with_q_and_k_rows_paired(tmp_path, method):
    model, tokenizer = load(
        make_tiny_model(tmp_path / "base", attention_bias=True, kv_heads=2, tie=False)
    )
    stored = tensors_of(export_gguf(model, tmp_path, tokenizer, method))
    merged = dict(merged_tensors(model))
    assert sorted(stored) == sorted(map(gguf_name, merged))
    for name, tensor in merged.items():
        values = tensor.float()
        if (part := name.split(".")[-2]) in ("q_proj", "k_proj"):
            K = 16
            pairs = [row for i in range(K // 2) for row in (i, i + K // 2)]
            values = values[[K * head + row for head in range(len(values) // K) for row in pairs]]
        found = stored[gguf_name(name)]
        if method == "q8_0" and tensor.dim() == 2:
            assert np.array_equal(found.data, quants.quantize(values.numpy(), found.tensor_type)), (
                name
            )
            # half a step, and the rounding of the scale to float16: 127 * 2**-11 of a step
            blocks = torch.from_numpy(dequantize(found.data, found.tensor_type)).view(
                -1, 32
            ) - values.view(-1, 32)
            assert (blocks.abs().amax(1) <= values.view(-1, 32).abs().amax(1) / 127 * 0.57).all(), (
                name
            )
        else:
            back = torch.from_numpy(dequantize(found.data, found.tensor_type).astype(np.float32))
            tolerance = (
                2**-24 if method == "f16" else 0.0
            )  # float16 rounds what is smaller than its smallest step
            assert (back - values).abs().max() <= tolerance, (name, part)
        assert found.tensor_type.name == ("F32" if tensor.dim() == 1 else method.upper())


def test_q8_0_gives_way_to_f16_where_a_row_is_no_multiple_of_32(tmp_path):
    folder = make_tiny_model(tmp_path / "base", hidden=48, heads=3, kv_heads=1, ffn=96)
    stored = tensors_of(convert_folder(folder, tmp_path / "x.gguf"))
    assert (
        stored["blk.0.ffn_up.weight"].tensor_type.name
        == stored["token_embd.weight"].tensor_type.name
        == "F16"
    )
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"


def test_the_metadata_says_what_llama_cpp_needs(tmp_path):
    scaled = make_tiny_model(
        tmp_path / "Tiny-Llama", rope_scaling=LLAMA3, head_dim=32, tokenizer="llama3"
    )
    settings = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "eos_token_id": [2, 0]}
    (scaled / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = load(scaled)
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
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    arrays = ("tokens", "token_type", "merges")
    assert {
        k: v for k, v in metadata.items() if not k.startswith("GGUF.") and not k.endswith(arrays)
    } == expected
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and types[:3] == [3, 3, 3]
    assert set(types[3:400]) == {1} and set(types[400:]) == {5} and tokens[511] == "[PAD511]"


def test_a_model_out_of_the_cache_is_named_with_its_organisation(tmp_path, monkeypatch):
    entry = tmp_path / "hub" / "models--acme--Tiny"
    make_tiny_model(entry / "snapshots" / "abc")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model, tokenizer = load("acme/Tiny", lora=False)
    metadata = metadata_of(path := export_gguf(model, tmp_path, tokenizer, "f16"))
    assert path.name == "Tiny-F16.gguf" and metadata["general.name"] == "Tiny"
    assert metadata["general.base_model.0.organization"] == "acme"


def test_linear_rope_scaling_and_the_plain_case_have_their_keys(tmp_path):
    linear = make_tiny_model(tmp_path / "base", rope_scaling={"type": "linear", "factor": 4.0})
    metadata = metadata_of(convert_folder(linear, tmp_path / "x.gguf", "f16"))
    assert (
        metadata["llama.rope.scaling.type"] == "linear"
        and metadata["llama.rope.scaling.factor"] == 4.0
    )
    assert (
        metadata["tokenizer.ggml.pre"] == "smollm"
        and metadata["tokenizer.ggml.add_bos_token"] is False
    )
    assert (
        "general.quantization_version" not in metadata
        and "general.base_model.count" not in metadata
    )


def test_converting_a_merged_folder_gives_the_tensors_of_a_direct_export(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    merge_to_folder(model, tmp_path / "merged", tokenizer, shard_bytes=50_000)
    direct = tensors_of(export_gguf(model, tmp_path / "direct.gguf", tokenizer))
    converted = tensors_of(convert_folder(tmp_path / "merged", tmp_path / "converted.gguf"))
    assert direct.keys() == converted.keys()
    assert all(np.array_equal(direct[name].data, converted[name].data) for name in direct)


@pytest.mark.parametrize("kind", ["bpe", "llama3", "spm"])
def test_llama_cpp_cuts_text_into_the_tokens_the_tokenizer_gives(tmp_path, kind):
    folder = make_tiny_model(tmp_path / "base", tokenizer=kind)
    tokenizer, llama_cpp = (
        Tokenizer.from_folder(folder),
        LlamaCpp(convert_folder(folder, tmp_path / "x.gguf")),
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Two lamps?"}], tokenize=False
    )
    for text in TEXTS:
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text
    assert llama_cpp.tokenize(chat, add_special=False) == tokenizer.encode(
        chat, add_special_tokens=False
    )


def write_byte_fallback_json(folder):
    """The SentencePiece model of `folder` as Llama 2's tokenizer.json has it: merges in place of scores."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    vocab = {model.id_to_piece(id): id for id in range(model.get_piece_size())}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece, id in vocab.items()
        if not (model.is_byte(id) or model.is_control(id) or model.is_unknown(id))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    special = [
        {"id": id, "content": text, "special": True}
        for id, text in enumerate(["<unk>", "<s>", "</s>"])
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [entry | flags for entry in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "unk_token": "<unk>",
            "byte_fallback": True,
        }
        | {"fuse_unk": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer.model").unlink()


def test_scores_rebuilt_from_merges_cut_text_as_the_tokenizer_does(tmp_path):
    folder = make_tiny_model(tmp_path / "base", tokenizer="spm")
    write_byte_fallback_json(folder)
    tokenizer, llama_cpp = (
        Tokenizer.from_folder(folder),
        LlamaCpp(convert_folder(folder, tmp_path / "x.gguf")),
    )
    for text in TEXTS:
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), text


def test_added_tokens_keep_their_ids_and_kinds(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {**content["added_tokens"][0], "special": False}
    content["added_tokens"] += [
        {**added, "id": 400, "content": "<tool>"},
        {**added, "id": 401, "content": "<|end|>"},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    path = convert_folder(folder, tmp_path / "x.gguf")
    metadata = metadata_of(path)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens[400:403] == ["<tool>", "<|end|>", "[PAD402]"] and types[400:403] == [4, 3, 5]
    text = "order <tool>lamp<|end|> now"
    assert LlamaCpp(path).tokenize(text) == Tokenizer.from_folder(folder).encode(text)


# ---- bad input


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def twice_the_same_token(folder):
    write_tokenizer(folder, "spm")
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(
        json.dumps({"\u2581lamp": 401, "\u2581lamps": 402, "<s>": 403})
    )
    return "tokens 1 and 403 are both '<s>'"


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
    return "tokenizer.json: llama.cpp has no name for this pre-tokenizer.* normalizer Lowercase"


def word_level(folder):
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}
    edit_json(folder / "tokenizer.json", lambda c: c.update(model=model, added_tokens=[]))
    edit_json(
        folder / "tokenizer_config.json",
        lambda c: [c.pop(key) for key in list(c) if key.endswith("_token")],
    )
    return "is a WordLevel tokenizer; GGUF export knows BPE"


def no_end(folder):
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, lambda c: c.pop("eos_token_id"))
    return "names no eos_token"


def foreign_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.mlp.experts.weight": torch.ones(2)}, folder / "model.safetensors"
    )
    return "model.layers.0.mlp.experts.weight has no place in the model"


def too_large_for_float16(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors")
    return r"blk.1.ffn_up.weight: .* does not fit into float16; export as bf16"


DAMAGES = [
    twice_the_same_token, larger_than_the_embedding, unknown_words, lowercase, word_level, no_end, foreign_tensor,
    too_large_for_float16,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_gguf_cannot_express_is_refused_by_name_and_leaves_nothing(tmp_path, damage):
    folder = make_tiny_model(tmp_path / "base")
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        convert_folder(folder, tmp_path / "x.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_bad_requests_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    (tmp_path / "old.gguf").write_bytes(b"mine")
    write_prequantized(model, tmp_path / "nf4")
    cases = [
        (
            lambda: export_gguf(model, tmp_path, tokenizer, "q4_k_m"),
            "quantization_method 'q4_k_m' is not supported",
        ),
        (
            lambda: export_gguf(model, tmp_path, tokenizer, ["q8_0", "f16"]),
            "choose one of q8_0, f16, bf16, f32",
        ),
        (
            lambda: export_gguf(model, tmp_path / "old.gguf", tokenizer),
            "old.gguf: exists; remove it",
        ),
        (
            lambda: export_gguf(model, tmp_path / "base" / "config.json", tokenizer),
            "give a folder, or a file name that",
        ),
        (
            lambda: export_gguf(model, tmp_path, tokenizer, merge_base="x"),
            "merge_base 'x' does not exist",
        ),
        (
            lambda: convert_folder(tmp_path / "nf4", tmp_path),
            "nf4: holds 4-bit weights; load it as a model",
        ),
        (lambda: convert_folder(tmp_path / "none", tmp_path), "none/config.json: not found"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(
        ValueError, match=r"x.gguf: needs [\d,]+ bytes, but only 1,000 are left on the disk"
    ):
        export_gguf(model, tmp_path / "x.gguf", tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "nf4", "old.gguf"]


def test_a_path_that_cannot_be_made_is_refused_and_what_is_there_stays(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    for below in ("x.gguf/y.gguf", "x.gguf/deep/y.gguf"):
        with pytest.raises(
            ValueError, match=rf"{below}: its folder could not be made \(.*: .*x.gguf.*\)"
        ):
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
    with pytest.raises(
        ValueError, match=r"base/generation_config.json: \w+ is .*, expected a number"
    ):
        convert_folder(folder, tmp_path / "out" / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_write_that_fails_midway_leaves_nothing(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, hard)
    )  # the kernel refuses to let a file grow further
    try:
        with pytest.raises(ValueError, match=r"x\.gguf: could not be written"):
            convert_folder(folder, tmp_path / "x.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_sizes_are_named_with_two_digits():
    assert [size_label(n) for n in (134_515_008, 1_235_814_400, 8_030_261_248, 70_553_706_496)] == [
        "135M", "1.2B", "8.0B", "71B",
    ]  # fmt: skip


# ---- the command, and the real model


def test_the_command_exports_and_reports_bad_input_in_one_line(tmp_path, capsys):
    def command(*arguments):
        code = export.main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    arguments = (
        "--model",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
        "--merge-base",
        "nf4",
    )
    code, out, _ = command(
        *arguments, "--output", tmp_path / "x.gguf", "--merged", tmp_path / "merged"
    )
    assert code == 0 and out.splitlines() == [str(tmp_path / "merged"), str(tmp_path / "x.gguf")]
    expected = tensors_of(export_gguf(model, tmp_path / "y.gguf", tokenizer, merge_base="nf4"))
    found = tensors_of(tmp_path / "x.gguf")
    assert all(np.array_equal(found[name].data, expected[name].data) for name in expected)
    assert (
        command(
            "--model",
            tmp_path / "merged",
            "--output",
            tmp_path / "z",
            "--quantization-method",
            "f16",
        )[0]
        == 0
    )
    assert (tmp_path / "z" / "merged-F16.gguf").is_file()
    for bad, message in [
        (("--model", tmp_path / "base"), "nothing to write"),
        (("--model", tmp_path / "nowhere", "--output", tmp_path), "nowhere"),
        ((*arguments, "--output", tmp_path / "x.gguf"), "exists; remove it"),
        ((*arguments, "--output", tmp_path / "x.gguf" / "y.gguf"), "its folder could not be made"),
        ((*arguments, "--output", tmp_path / ("x" * 300 + ".gguf")), "File name too long"),
    ]:
        code, out, err = command(*bad)
        assert code == 2 and not out and re.fullmatch(rf"minitune export: error: .*{message}.*\n", err), (
            err
        )


def test_an_interrupted_command_ends_with_130_and_says_nothing(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export", interrupted)
    assert export.main(["--model", "x"]) == 130 and capsys.readouterr() == ("", "")


def train_a_little(model, tokenizer, steps=5, rows=3):
    """A few optimizer steps on the demonstration's texts: answers turn into JSON, not yet the right one."""
    records = [record for _, record in load_dataset(DEMO / "train.jsonl")[: steps * rows]]
    samples = prepare(records, tokenizer, 256).samples
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=3e-3)
    with model.resident_weights():
        for step in range(steps):
            batch = collate(samples[step * rows : (step + 1) * rows])
            model(
                batch.input_ids, labels=batch.labels, position_ids=batch.position_ids
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_the_trained_real_model_answers_in_llama_cpp_as_it_does_here(tmp_path, smollm2):
    model, tokenizer = load(smollm2, lora=False)
    FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, use_gradient_checkpointing=False)
    train_a_little(model, tokenizer)
    records = [record for _, record in load_dataset(DEMO / "heldout.jsonl")[::8]]
    prompts = [
        tokenizer.apply_chat_template(r["messages"][:-1], add_generation_prompt=True)
        for r in records
    ]
    ours = model.generate(prompts, max_new_tokens=20, eos_token_ids=tokenizer.eos_token_ids)
    llama_cpp = LlamaCpp(
        export_gguf(model, tmp_path / "real.gguf", tokenizer, "f16", merge_base="nf4")
    )
    answers = [llama_cpp.answer(ids, 20) for ids in prompts]
    assert all(answer.startswith("{") for answer in answers)  # the base model answers in words
    assert answers == [tokenizer.decode(ids) for ids in ours]
    text = Path(__file__).read_text(encoding="utf-8")
    assert llama_cpp.tokenize(text) == tokenizer.encode(text)

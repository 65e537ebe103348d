"""Damaged and foreign GGUF files are refused with a ValueError that names the file."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf_files import SMALL_TENSORS, write_small_llama

from minitune.gguf.base.model_files import model_files
from minitune.gguf.base.open_gguf import open_gguf, read_config

EDGES = (0, 1, 0x7F, 0x80, 0xFF)
LARGE = (1 << 24, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def read_or_refuse(path):
    """Read a file as a model; return False if it is refused by its name."""
    try:
        read_config(open_gguf(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}: "), error
        return False
    return True


def damage(content, rng):
    """Change one to three places of the head."""
    for _ in range(rng.randint(1, 3)):
        place, kind = rng.randrange(len(content) - 8), rng.random()
        if kind < 0.4:
            content[place] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            content[place] = rng.choice(EDGES)
        elif kind < 0.8:
            content[place : place + 8] = struct.pack("<Q", rng.choice(LARGE))
        elif kind < 0.9:
            length = rng.randint(1, 40)
            content[place : place + length] = rng.randbytes(length)
        else:
            del content[place : place + rng.randint(1, 9)]


def test_a_damaged_file_is_read_or_refused_by_name(tmp_path):
    path = write_small_llama(tmp_path / "small.gguf")
    content = path.read_bytes()
    head = min(tensor.position for tensor in open_gguf(path).tensors.values())
    rng = random.Random(0)
    read = 0
    for _ in range(1500):
        damaged = bytearray(content[:head])
        length = len(content) - rng.choice((0, 0, 0, 0, 1, 3, 40, 4000))
        damage(damaged, rng)
        path.write_bytes(damaged)
        os.truncate(path, max(length, len(damaged)))  # the data are zeros
        read += read_or_refuse(path)
    assert 0 < read < 1000


KEYS = {
    "no architecture": ({"general.architecture": None}, "general.architecture is missing"),
    "another architecture": (
        {"general.architecture": "falcon"},
        "'falcon' is not supported; supported are llama, mistral3, qwen2",
    ),
    "part": ({"split.count": 3}, "one of 3 parts .* llama-gguf-split --merge"),
    "adapter": ({"general.type": "adapter"}, "is an adapter; give the file of the model"),
    "projector": ({"general.architecture": "clip"}, "the projector of a multimodal model"),
    "imatrix": ({"general.type": "imatrix"}, "an importance matrix"),
    "another kind": ({"general.type": "draft"}, "general.type 'draft'; expected model"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8, which is not supported"),
    "clamp": ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv is 8.0"),
    "a scale of Granite": ({"llama.logit_scale": 8.0}, "llama.logit_scale is 8.0"),
    "pooling": ({"llama.pooling_type": 1}, "llama.pooling_type is 1"),
    "an encoder": ({"llama.attention.causal": False}, "attention.causal is False"),
    "a scaling": (
        {"llama.rope.scaling.type": "ntk"},
        "scaling.type is 'ntk'; expected one of none, linear, yarn, longrope",
    ),
    "heads of two widths": ({"llama.attention.value_length": 64}, "value_length is 64"),
    "a rotated part": ({"llama.rope.dimension_count": 64}, "dimension_count is 64; expected 128"),
    "a window": ({"llama.attention.sliding_window": 8}, "sliding_window is 8"),
    "YaRN's betas": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
        },
        "yarn_beta_fast is 16.0; expected 32.0",
    ),
    "no context": ({"llama.context_length": None}, "context_length is missing; expected a whole"),
    "a text for a number": ({"llama.block_count": "1"}, "block_count is '1'; expected a whole"),
    "layers of two kinds": (
        {"llama.attention.head_count": [2, 4]},
        "head_count is .* one number for all 1 layers",
    ),
    "too many layers": ({"llama.block_count": 1000}, "blk.999.attn_output.weight"),
    "layers without end": (
        {"llama.block_count": 4_000_000_000},
        "block_count is 4000000000; expected a whole number from 1 to 1024",
    ),
    "an infinite epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": float("inf")},
        "layer_norm_rms_epsilon is inf",
    ),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": ["a", "b", "c"]},
        "3 tokens, but the embedding has 4 rows",
    ),
    "a list for the architecture": ({"general.architecture": ["llama"]}, "is not supported"),
    "a list for the kind": ({"general.type": [1]}, r"general.type \[1\]; expected model"),
    "a text for the parts": ({"split.count": "3"}, "one of 3 parts"),
    "a number for the tokens": ({"tokenizer.ggml.tokens": 4}, "there are 0 tokens"),
    "a text for a temperature": (
        {"general.sampling.temp": "hot"},
        "general.sampling.temp is 'hot'; expected a number",
    ),
    "an alignment": ({"general.alignment": 33}, "expected a power of two"),
}
WIDE = (256, 256)
TENSORS = {
    "a type": (
        {"blk.0.ffn_up.weight": (WIDE, GGMLType.IQ2_XXS)},
        "blk.0.ffn_up.weight has the type IQ2_XXS, which is not read; read are F32, .* Q4_K",
    ),
    "a vocabulary": (dict.fromkeys(SMALL_TENSORS), "only a vocabulary"),
    "a missing tensor": ({"blk.0.ffn_up.weight": None}, "blk.0.ffn_up.weight is missing"),
    "an additional tensor": (
        {"blk.0.attn_qkv.weight": (WIDE, GGMLType.F16)},
        "blk.0.attn_qkv.weight does not belong",
    ),
    "a shape": ({"blk.0.ffn_up.weight": ((128, 256), GGMLType.F16)}, r"\(128, 256\); expected"),
    "half of the biases": (
        {"blk.0.attn_q.bias": ((256,), GGMLType.F32)},
        "attn_k has no bias, but other linears have one",
    ),
    "a norm in 16 bit": (
        {"output_norm.weight": ((256,), GGMLType.F16)},
        "output_norm.weight is F16; llama.cpp expects F32",
    ),
    "divisors of zero": (
        {"rope_freqs.weight": ((64,), GGMLType.F32)},
        "rope_freqs.weight has a divisor that is not above 0",
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_that_is_not_supported_is_refused_by_name(tmp_path, case):
    keys, message = KEYS[case]
    path = write_small_llama(tmp_path / "small.gguf", keys)
    with pytest.raises(ValueError, match=rf"small\.gguf: .*{message}"):
        model_files(path)


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_is_not_the_models_is_refused_by_name(tmp_path, case):
    tensors, message = TENSORS[case]
    path = write_small_llama(tmp_path / "small.gguf", tensors=tensors)
    with pytest.raises(ValueError, match=rf"small\.gguf: .*{message}"):
        model_files(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    assert model_files(tmp_path) == tmp_path
    assert model_files(tmp_path / "no-folder") == tmp_path / "no-folder"
    with pytest.raises(ValueError, match=r"no\.gguf: could not be read \(No such file"):
        model_files(tmp_path / "no.gguf")


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.expert_count": 0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.attention.causal": True, "llama.vocab_size": 9, "other.key": 1},
        {"llama.use_parallel_residual": True, "general.other": "x", "quantize.imatrix.file": "y"},
        {"llama.attention.head_count": [2], "llama.feed_forward_length": [256]},
    ],
)
def test_a_key_without_an_effect_is_accepted(tmp_path, keys):
    plain = read_config(open_gguf(write_small_llama(tmp_path / "plain.gguf")))
    assert read_config(open_gguf(write_small_llama(tmp_path / "x.gguf", keys))) == plain


def test_the_small_files_are_made_once_for_a_version_of_a_file(tmp_path):
    keys = {"general.sampling.temp": 0.7, "general.sampling.top_k": 40}
    path = write_small_llama(tmp_path / "small.gguf", keys)
    folder = model_files(path)
    assert folder.name == "small.gguf"
    assert model_files(str(path)) == folder
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"temperature": 0.7, "top_k": 40, "eos_token_id": 3}
    write_small_llama(path, {"general.sampling.temp": 0.25})
    os.utime(path, (0, 0))
    changed = json.loads((model_files(path) / "generation_config.json").read_text())
    assert changed == {"temperature": 0.25, "eos_token_id": 3}


def test_the_small_files_are_removed_when_the_process_ends(tmp_path):
    path = write_small_llama(tmp_path / "small.gguf")
    code = (
        "import os, sys; from minitune.gguf.base.model_files import model_files; "
        "folder = model_files(sys.argv[1]); print(folder); "
        "child = os.fork(); child or sys.exit(); os.waitpid(child, 0); "
        "print(folder.is_dir())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, path]
    reply = subprocess.run(command, check=True, capture_output=True, text=True)
    folder, was_there = reply.stdout.split()[-2:]
    assert was_there == "True"
    assert not Path(folder).parent.exists()

"""A GGUF file with a fault is found out before it gets its name, and nothing is left behind."""

import math
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf_files import LLAMA3_ROPE
from test_merge import load
from tiny import make_tiny_model

from minitune.gguf import compare_llama_cpp, content, export, tensor_layout, writer
from minitune.gguf.export import convert_folder, export_gguf
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.writer import write_gguf

SHAPE = {"hidden": 256, "ffn": 512, "tie": False, "rope_scaling": LLAMA3_ROPE}


def no_interleaving(monkeypatch):
    monkeypatch.setattr(tensor_layout, "interleave_rope_rows", lambda tensor, heads: tensor)


def heads_of_k_for_q(monkeypatch):
    interleave = tensor_layout.interleave_rope_rows
    monkeypatch.setattr(
        tensor_layout, "interleave_rope_rows", lambda tensor, _: interleave(tensor, 2)
    )


def no_divisors(monkeypatch):
    for module in (content, tensor_layout):
        monkeypatch.setattr(module, "additional_tensors", lambda config: {})


def other_divisors(monkeypatch):
    tensors = tensor_layout.additional_tensors
    monkeypatch.setattr(
        tensor_layout,
        "additional_tensors",
        lambda config: {name: 1 / tensor for name, tensor in tensors(config).items()},
    )


def norms_in_float16(monkeypatch):
    types = content.tensor_types

    def with_norms(*arguments):
        found = types(*arguments)
        return found | {name: GGMLType.F16 for name in found if name.endswith("norm.weight")}

    monkeypatch.setattr(content, "tensor_types", with_norms)


def scales_of_the_next_block(monkeypatch):
    quantize = writer.quantize

    def wrong(rows, kind, *options):
        data = quantize(rows, kind, *options)
        if kind != GGMLType.Q4_K:
            return data
        blocks = data.view(-1, 144)
        blocks[:, 4:16] = blocks[:, 4:16].roll(1, 1)
        return data

    monkeypatch.setattr(writer, "quantize", wrong)


def one_weight_less(monkeypatch):
    tensors = export.merged_tensors

    def wrong(model, merge_base):
        for name, tensor in tensors(model, merge_base):
            tensor = tensor.clone()
            if name.endswith("layers.1.mlp.down_proj.weight") and not seen:
                tensor[7] = 0
                seen.append(name)
            yield name, tensor

    seen: list[str] = []
    monkeypatch.setattr(export, "merged_tensors", wrong)


def tokenizer_keys(change):
    """Return a defect of the tokenizer's keys that is only found out after writing."""

    def damage(monkeypatch):
        metadata = content.tokenizer_metadata
        monkeypatch.setattr(content, "check_tokenizer", lambda metadata, tokenizer: None)
        monkeypatch.setattr(
            content, "tokenizer_metadata", lambda *arguments: change(metadata(*arguments))
        )

    return damage


def wrong_word_rule(metadata):
    return metadata | {"tokenizer.ggml.pre": "qwen2"}


def renamed_token(metadata):
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[2] = "<|end|>"
    return metadata | {"tokenizer.ggml.tokens": tokens}


def short_vocabulary(metadata):
    arrays = {
        key: value[:-1] for key, value in metadata.items() if key.endswith(("tokens", "type"))
    }
    return metadata | arrays


def damaged_on_disk(position):
    """Return a defect that changes a byte of the file after it was written."""

    def damage(monkeypatch):
        def write(files, *arguments):
            write_gguf(files, *arguments)
            for path in files:
                content = bytearray(Path(path).read_bytes())
                content[position(content)] ^= 0x40
                Path(path).write_bytes(content)

        monkeypatch.setattr(export, "write_gguf", write)

    return damage


DEFECTS = [
    (no_interleaving, "q_proj.weight is not the merged weight"),
    (heads_of_k_for_q, "q_proj.weight is not the merged weight"),
    (no_divisors, "rope_freqs.weight is missing"),
    (other_divisors, "rope_freqs.weight is not the divisors"),
    (norms_in_float16, "is F16; llama.cpp expects F32"),
    (scales_of_the_next_block, "is not the merged weight; expected a mean square error"),
    (one_weight_less, "layers.1.mlp.down_proj.weight is not the merged weight"),
    (tokenizer_keys(wrong_word_rule), "other tokens"),
    (tokenizer_keys(renamed_token), "<|im_end|>"),
    (tokenizer_keys(short_vocabulary), "511 tokens, but the embedding has 512 rows"),
    (damaged_on_disk(lambda content: content.index(b"general.name") + 24), "general.name"),
    (damaged_on_disk(lambda content: content.index(b"blk.0.attn_q.weight")), "blk.0.attn_q"),
    (damaged_on_disk(lambda content: len(content) - 40), "is not the merged weight"),
]


@pytest.mark.parametrize(("defect", "message"), DEFECTS, ids=[message for _, message in DEFECTS])
def test_a_defect_is_caught_and_no_file_gets_its_name(tmp_path, monkeypatch, defect, message):
    model, tokenizer = load(make_tiny_model(tmp_path / "base", **SHAPE), lora=False)
    defect(monkeypatch)
    with pytest.raises(ValueError, match="was not written, because a check failed") as error:
        export_gguf(model, tmp_path / "out", tokenizer, ["q4_k_m", "f16"])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_layout_that_only_llama_cpp_reads_otherwise_is_caught_by_its_next_tokens(
    tmp_path, monkeypatch
):
    pytest.importorskip("xllamacpp")
    folder = make_tiny_model(tmp_path / "base", **SHAPE)
    no_interleaving(monkeypatch)
    monkeypatch.setattr(FileWeights, "is_reordered", lambda self, name: False)
    with pytest.raises(ValueError, match="computes other next tokens") as error:
        convert_folder(folder, tmp_path / "x.gguf", "q8_0")
    assert "verify=False" in str(error.value)
    assert not (tmp_path / "x.gguf").exists()


def test_a_file_at_which_llama_cpp_ends_its_process_is_refused_with_its_message(
    tmp_path, monkeypatch
):
    pytest.importorskip("xllamacpp")
    folder = make_tiny_model(tmp_path / "base", **SHAPE)
    metadata = content.model_metadata
    monkeypatch.setattr(
        content, "model_metadata", lambda config: metadata(config) | {"llama.block_count": 3}
    )
    with pytest.raises(ValueError, match=r"does not run the file: .*tensor") as error:
        convert_folder(folder, tmp_path / "x.gguf", "q8_0")
    assert "update xllamacpp" in str(error.value)


def test_without_llama_cpp_the_rest_is_checked_and_the_command_says_so(
    tmp_path, monkeypatch, capsys
):
    folder = make_tiny_model(tmp_path / "base")
    monkeypatch.setattr(compare_llama_cpp.llama_cpp_probe, "installed_package", lambda: None)
    convert_folder(folder, tmp_path / "x.gguf", "q8_0", progress=True)
    assert "neither llama_cpp nor xllamacpp is installed" in capsys.readouterr().err


def test_without_verification_a_fault_passes(tmp_path, monkeypatch):
    folder = make_tiny_model(tmp_path / "base")
    no_interleaving(monkeypatch)
    assert convert_folder(folder, tmp_path / "x.gguf", "q8_0", verify=False).is_file()


def test_a_divergence_from_probabilities_that_are_not_a_number_is_not_a_number():
    theirs = [(0, None), (1, -0.7)]  # llama.cpp's JSON has null for NaN
    assert math.isnan(compare_llama_cpp._divergence(theirs, torch.full((2,), 0.5).log().double()))

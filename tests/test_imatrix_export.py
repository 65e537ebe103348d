"""GGUF files that are quantised with an importance matrix, by command and in Python."""

import json

import numpy as np
import pytest
import torch
from gguf_files import metadata_of, tensors_of
from test_merge import load
from tiny import make_tiny_model

from minitune.commands import export
from minitune.gguf.importance.imatrix_files import write_imatrix
from minitune.gguf.importance.importance_collection import importance_from_data
from minitune.gguf.writer import GGMLType

TEXTS = ["Twelve blue lamps go to Lisbon on Friday.", "The invoice follows by letter."]
TEXTS_AS_RECORDS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imatrix")
    model, tokenizer = load(make_tiny_model(folder / "base", layers=8))
    model.save_pretrained(folder / "adapter")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder, model, tokenizer


def run(capsys, *arguments):
    code = export.main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def same_data(path, other):
    """Return True if all tensors of two files have the same bytes."""
    found, expected = tensors_of(path), tensors_of(other)
    return all(np.array_equal(found[name].data, expected[name].data) for name in expected)


def test_the_command_collects_with_the_adapter_and_says_how_many_tokens_it_used(
    tiny, tmp_path, capsys
):
    folder, model, tokenizer = tiny
    trained = ("--model", folder / "base", "--adapter", folder / "adapter", "--merge-base", "nf4")
    method = ("--quantization-method", "q4_0")
    data, output = folder / "data.jsonl", tmp_path / "x.gguf"
    code, _, err = run(
        capsys, *trained, *method, "--output", output, "--imatrix-from", data, "--imatrix-tokens", 9
    )
    line = f"imatrix    importance matrix of {data}: the inputs of 56 tensors from 9 tokens"
    assert code == 0 and line in err.splitlines()
    keys = metadata_of(output)
    assert keys["quantize.imatrix.dataset"] == str(data)
    assert keys["quantize.imatrix.entries_count"] == 56
    assert keys["quantize.imatrix.chunks_count"] == 1
    assert "quantize.imatrix.file" not in keys

    matrix = importance_from_data(model, tokenizer, data, max_tokens=9)
    arguments = {"quantization_method": "q4_0", "merge_base": "nf4"}
    path = model.save_pretrained_gguf(tmp_path / "a", tokenizer, imatrix=matrix, **arguments)
    assert same_data(output, path)
    plain = model.save_pretrained_gguf(tmp_path / "b", tokenizer, **arguments)
    assert not same_data(output, plain)


def test_a_file_is_used_and_types_without_a_use_for_it_are_noted(tiny, tmp_path):
    folder, model, tokenizer = tiny
    matrix = importance_from_data(model, tokenizer, TEXTS_AS_RECORDS)
    file = write_imatrix(matrix, tmp_path / "i.gguf")
    base = ["--model", folder / "base", "--output", tmp_path, "--quantization-method"]
    with pytest.warns(UserWarning) as warned:
        assert export.main(list(map(str, [*base, "q4_0", "q8_0", "--imatrix", file]))) == 0
    assert [str(warning.message) for warning in warned] == [
        "the importance matrix changes no weight of a q8_0 file, which has no use of it"
    ]
    types = {
        name: tensor.tensor_type for name, tensor in tensors_of(tmp_path / "base-Q4_0.gguf").items()
    }
    assert types["blk.0.ffn_down.weight"] == GGMLType.Q4_1  # Q4_0 without a matrix
    assert metadata_of(tmp_path / "base-Q4_0.gguf")["quantize.imatrix.file"] == str(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merged", "m", "--imatrix", "i.gguf"], "--imatrix needs --output or --audit"),
        (["--output", "x.gguf", "--imatrix-tokens", "9"], "together with --imatrix-from"),
        (["--output", "x.gguf", "--imatrix-tokens", "0"], "--imatrix-tokens 0: expected at least"),
        (["--output", "x.gguf", "--imatrix", "none.gguf"], "none.gguf: not found"),
        (["--output", "x.gguf", "--imatrix-from", "none.jsonl"], "none.jsonl"),
        (["--output", "x.gguf", "--imatrix-from", "d", "--imatrix", "i"], "exclude each other"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_refused_in_one_line(
    tiny, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    try:
        code, out, err = run(capsys, "--model", tiny[0] / "base", *arguments)
    except SystemExit as stop:  # of argparse
        code, (out, err) = stop.code, capsys.readouterr()
    assert code == 2 and not out and message in err
    assert not list(tmp_path.glob("*.gguf"))


def test_an_existing_target_is_refused_before_the_matrix_is_collected(tiny, tmp_path, monkeypatch):
    collected = []
    monkeypatch.setattr(export, "importance_from_data", lambda *a, **k: collected.append(a))
    (tmp_path / "x.gguf").touch()
    arguments = ["--model", tiny[0] / "base", "--output", tmp_path / "x.gguf"]
    arguments += ["--imatrix-from", tiny[0] / "data.jsonl"]
    assert export.main(list(map(str, arguments))) == 2
    assert not collected


def test_a_matrix_of_another_model_writes_no_file(tiny, tmp_path):
    _, model, tokenizer = tiny
    matrix = importance_from_data(model, tokenizer, TEXTS_AS_RECORDS)
    matrix.values["blk.9.attn_q.weight"] = torch.ones(64)
    with pytest.raises(ValueError, match=r"no tensor 'blk\.9\.attn_q\.weight'"):
        model.save_pretrained_gguf(tmp_path / "o", tokenizer, "q4_0", imatrix=matrix)
    assert not (tmp_path / "o").exists()

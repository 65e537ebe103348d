"""The reader gives the keys and tensors that gguf-py's reader gives, and refuses broken files."""

import struct

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from gguf_files import LLAMA3_ROPE
from tiny import make_tiny_model

from minitune.gguf.export import convert_folder
from minitune.gguf.reader import GgufReader


def write_every_kind_of_value(path):
    """Write a file with a value of each type, through gguf-py's writer."""
    writer = GGUFWriter(path, "llama")
    for bits, value in ((8, 200), (16, 60_000), (32, 4_000_000_000), (64, 1 << 40)):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", value)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(value // 3))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Grüße 明日 🦙")
    for key, values in {
        "texts": ["a", "", "Ġb"],
        "ints": [-1, 2, 3],
        "floats": [0.5, -1e-3],
        "bools": [True, False],
    }.items():
        writer.add_array(key, values)
    writer.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("half", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_against_gguf_py(path):
    theirs, ours = GGUFReader(path), GgufReader(path)
    fields = {k: v.contents() for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in fields.items():
        assert ours.metadata[key] == value, key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.type, found.position) == (tensor.tensor_type, tensor.data_offset)
        assert found.shape == tuple(int(size) for size in tensor.shape[::-1])
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert torch.equal(ours.load(tensor.name), torch.from_numpy(values)), tensor.name


def test_each_kind_of_value_is_read_as_gguf_py_reads_it(tmp_path):
    write_every_kind_of_value(tmp_path / "x.gguf")
    check_against_gguf_py(tmp_path / "x.gguf")
    rows = GgufReader(tmp_path / "x.gguf").data("matrix", slice(1, 3))
    assert rows.view(torch.float32).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_model_is_read_as_gguf_py_reads_it(tmp_path):
    folder = make_tiny_model(tmp_path / "base", rope_scaling=LLAMA3_ROPE, tie=False)
    check_against_gguf_py(convert_folder(folder, tmp_path / "x.gguf", "q8_0"))


def test_a_file_that_ends_early_is_refused_by_name_wherever_it_ends(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_every_kind_of_value(whole)
    content = whole.read_bytes()
    last = max(t.position + t.nbytes for t in GgufReader(whole).tensors.values())
    for length in (0, 3, 4, 23, *range(24, last, 37), last - 1):
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            GgufReader(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(20), "is not a GGUF file, which begins with the bytes GGUF; fetch"),
        (b"GGUF" + struct.pack("<Iqq", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">Iqq", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IqqQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 99), "99"),
        (b"GGUF" + struct.pack("<IqqQ", 3, 0, 1, 1 << 62), "ends within its head"),
        (
            b"GGUF" + struct.pack("<IqqQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 0, 0, 0),
            "sizes",
        ),
        (
            b"GGUF" + struct.pack("<IqqQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 33, 8, 0),
            "Q8_0",
        ),
        (
            b"GGUF" + struct.pack("<Iqq", 3, 0, 2) + 2 * (struct.pack("<Q", 1) + b"a" + bytes(5)),
            "twice",
        ),
    ],
)
def test_a_broken_head_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        GgufReader(path)
    assert "broken.gguf" in str(error.value)

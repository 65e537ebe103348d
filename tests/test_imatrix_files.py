"""Files of importance matrices in both forms of llama.cpp, and their refusals."""

import struct

import gguf
import numpy as np
import pytest
import torch
from tiny import make_tiny_model

from minitune.config.model_config import ModelConfig
from minitune.gguf.importance.imatrix_files import read_imatrix, write_imatrix
from minitune.gguf.importance.importance import ImportanceMatrix, tensor_widths, unused_note
from minitune.gguf.writer import GGMLType

KEYS = {"imatrix.datasets": ["calib.txt"], "imatrix.chunk_count": 7, "imatrix.chunk_size": 512}
NAME = "blk.0.attn_q.weight"
SUMS = np.array([8, 4, 0, 2], dtype=np.float32)


def write_gguf_form(path, entries, keys=KEYS, kind="imatrix"):
    """Write a file with gguf-py's writer. entries: tensor name -> array, sizes as in PyTorch."""
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()
    writer.add_string("general.type", kind)
    for key, value in keys.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(key, value)
    for name, array in entries.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(sums, counts, name=NAME):
    sums, counts = np.atleast_2d(sums).astype(np.float32), np.array(counts, dtype=np.float32)
    return {f"{name}.in_sum2": sums, f"{name}.counts": counts.reshape(-1, 1)}


def legacy_bytes(entries, end=b""):
    """Return the older form of (name, calls, sums)."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, sums in entries:
        encoded = name.encode()
        parts.append(struct.pack("<i", len(encoded)) + encoded)
        parts.append(struct.pack(f"<ii{len(sums)}f", calls, len(sums), *sums))
    return b"".join(parts) + end


def test_the_gguf_form_gives_sums_divided_by_counts(tmp_path):
    path = write_gguf_form(tmp_path / "i.gguf", entry(SUMS, [4]))
    matrix = read_imatrix(path)
    assert matrix.values[NAME].tolist() == [2, 1, 0, 0.5]
    assert matrix.values[NAME].dtype == torch.float32
    assert (matrix.tokens, matrix.chunks, matrix.dataset) == (4, 7, "calib.txt")
    assert matrix.metadata() == {
        "quantize.imatrix.file": str(path),
        "quantize.imatrix.dataset": "calib.txt",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 7,
    }


def test_experts_have_a_count_each_and_one_without_tokens_gets_ones(tmp_path):
    path = write_gguf_form(tmp_path / "i.gguf", entry([[8, 4], [0, 0], [3, 6]], [4, 0, 3]))
    assert read_imatrix(path).values[NAME].tolist() == [2, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("calls", "end", "expected", "chunks", "dataset"),
    [
        (2, struct.pack("<ii", 9, 5) + b"a.txt", [4, 2, 0, 1], 9, "a.txt"),
        (2, struct.pack("<i", 9), [4, 2, 0, 1], 9, ""),
        (1, b"", [8, 4, 0, 2], 0, ""),
        (0, b"", [8, 4, 0, 2], 0, ""),
    ],
)
def test_the_older_form_gives_sums_divided_by_calls(
    tmp_path, calls, end, expected, chunks, dataset
):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy_bytes([(NAME, calls, SUMS)], end))
    matrix = read_imatrix(path)
    assert matrix.values[NAME].tolist() == expected
    assert (matrix.chunks, matrix.dataset) == (chunks, dataset)


def test_a_written_matrix_reads_back_here_and_has_the_keys_that_llama_quantize_needs(tmp_path):
    values = {NAME: torch.tensor([0.3, 0, 7]), "blk.0.ffn_down.weight": torch.tensor([1e-9, 2e9])}
    path = write_imatrix(ImportanceMatrix(values, 1000, 2, "d.jsonl"), tmp_path / "i.gguf")
    matrix = read_imatrix(path)
    assert (matrix.tokens, matrix.chunks, matrix.dataset) == (1000, 2, "d.jsonl")
    assert matrix.values.keys() == values.keys()
    for name, expected in values.items():
        torch.testing.assert_close(matrix.values[name], expected, rtol=1e-6, atol=0)
    reader = gguf.GGUFReader(path)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes[f"{NAME}.in_sum2"] == [3, 1]
    assert shapes[f"{NAME}.counts"] == [1, 1]
    assert {"general.type", *KEYS} <= reader.fields.keys()
    with pytest.raises(ValueError, match=r"i\.gguf: exists"):
        write_imatrix(matrix, path)


@pytest.mark.parametrize(
    ("entries", "keys", "message"),
    [
        ({}, KEYS, "holds no importance values, but general.type is 'imatrix'"),
        (entry(SUMS, [4]), {}, "has no key imatrix.datasets"),
        (entry(SUMS, [4]), KEYS | {"imatrix.chunk_count": [7]}, r"imatrix.chunk_count is \[7\]"),
        ({f"{NAME}.in_sum2": SUMS}, KEYS, f"{NAME} needs the tensors"),
        (entry(SUMS, [4]) | {"x.counts": SUMS}, KEYS, "x needs the tensors"),
        (entry(SUMS, [4, 4, 4]), KEYS, f"{NAME} has 4 sums and the counts"),
        (entry(SUMS, [-1]), KEYS, f"{NAME} has 4 sums and the counts"),
        (entry(SUMS, [np.nan]), KEYS, f"{NAME} has 4 sums and the counts"),
        (entry([1, np.inf], [4]), KEYS, f"{NAME} has values that are not finite"),
        (entry([1, -2], [4]), KEYS, f"{NAME} has the negative value -0.5"),
        (
            {k: v.astype(np.float16) for k, v in entry(SUMS, [4]).items()},
            KEYS,
            rf"{NAME}.in_sum2 has the type F16, expected F32",
        ),
    ],
)
def test_a_wrong_gguf_form_is_refused_by_name(tmp_path, entries, keys, message):
    path = write_gguf_form(tmp_path / "i.gguf", entries, keys)
    with pytest.raises(ValueError, match=rf"i\.gguf: {message}"):
        read_imatrix(path)


def test_a_model_file_is_refused_as_a_matrix(tmp_path):
    path = write_gguf_form(tmp_path / "m.gguf", {"output.weight": SUMS[None]}, {}, "model")
    with pytest.raises(ValueError, match=r"no importance values, but general\.type is 'model'"):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the number of entries would take 4 bytes, but the file has 0 left"),
        (struct.pack("<i", 0), "holds 0 entries"),
        (struct.pack("<ii", 1, -5), "the name of entry 1 would take -5 bytes"),
        (struct.pack("<ii", 1, 2) + b"\xff\xff", "the name of entry 1 is no text"),
        (legacy_bytes([(NAME, 1, [])]), f"{NAME} has 0 values"),
        (legacy_bytes([(NAME, 1, SUMS)] * 2), f"holds {NAME} twice"),
        (legacy_bytes([(NAME, 1, [1, np.nan])]), f"{NAME} has values that are not finite"),
        (legacy_bytes([(NAME, 1, [-1, 2])]), f"{NAME} has the negative value -1"),
        (legacy_bytes([(NAME, 1, SUMS)], struct.pack("<ii", 1, 0) + b"xyz"), "has 3 bytes behind"),
        (b"a text file, and no importance matrix", "is cut short, or no importance matrix"),
    ],
)
def test_a_wrong_file_of_the_older_form_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"i\.dat: .*{message}"):
        read_imatrix(path)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_a_file_cut_anywhere_is_refused(tmp_path, form):
    if form == "gguf":
        content = write_gguf_form(tmp_path / "i.gguf", entry(SUMS, [4])).read_bytes()
        end = len(content) - 32 + 4  # the counts, without padding
    else:
        content = legacy_bytes([(NAME, 1, SUMS)], struct.pack("<ii", 9, 5) + b"a.txt")
        end = len(content)
    whole = len(content) - 13  # the older form may end here, before chunks and dataset
    path = tmp_path / "cut"
    for size in range(end):
        path.write_bytes(content[:size])
        if form == "dat" and size in (whole, whole + 4):
            continue
        with pytest.raises(ValueError, match="cut: "):
            read_imatrix(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.gguf: not found"):
        read_imatrix(tmp_path / "none.gguf")


# ---- against a model


def matrix_of(config, **changes):
    """Return a matrix of ones for the decoder layers of a model, with changed entries."""
    widths = tensor_widths(config)
    values = {name: torch.ones(n) for name, n in widths.items() if name.startswith("blk.")}
    values = values | {name.replace("__", "."): value for name, value in changes.items()}
    return ImportanceMatrix({k: v for k, v in values.items() if v is not None}, file="i.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blk__2__attn_q__weight": torch.ones(64)},
            r"i\.gguf: this model has no tensor 'blk\.2\.attn_q\.weight'",
        ),
        (
            {"blk__1__ffn_down__weight": torch.ones(64)},
            r"blk\.1\.ffn_down\.weight has 64 values, but the tensor has 128 columns",
        ),
    ],
)
def test_a_matrix_of_another_model_is_refused_by_name(tmp_path, changes, message):
    config = ModelConfig.from_folder(make_tiny_model(tmp_path / "m"))
    with pytest.raises(ValueError, match=message):
        matrix_of(config, **changes).check_model(config)


def test_a_matrix_without_any_tensor_of_the_model_is_refused(tmp_path):
    config = ModelConfig.from_folder(make_tiny_model(tmp_path / "m"))
    matrix = ImportanceMatrix({"blk.0.attn_qkv.weight": torch.ones(64)}, dataset="d.jsonl")
    message = "importance matrix of d.jsonl: none of its 1 tensors is one of this model's"
    with pytest.raises(ValueError, match=message):
        matrix.check_model(config)


def test_linears_without_values_are_named_and_head_and_embedding_need_none(tmp_path):
    config = ModelConfig.from_folder(make_tiny_model(tmp_path / "m"))
    assert matrix_of(config).check_model(config) == []
    notes = matrix_of(config, blk__0__attn_v__weight=None).check_model(config)
    assert notes == [
        "i.gguf has no values for 1 of the model's tensors, which are quantised without "
        "importance; the first is blk.0.attn_v.weight"
    ]


def test_types_that_do_not_use_a_matrix_are_noted():
    assert unused_note([GGMLType.Q8_0, GGMLType.F32], "q8_0") == [
        "the importance matrix changes no weight of a q8_0 file, which has no use of it"
    ]
    assert unused_note([GGMLType.Q8_0, GGMLType.Q4_K], "q4_k_m") == []

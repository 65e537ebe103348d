"""Several types are written in one pass over the weights, and all files appear or none."""

import os
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from full_disk import files_limited_to
from gguf import LlamaFileType
from gguf_files import metadata_of, tensors_of
from safetensors.torch import load_file, save_file
from test_merge import load
from tiny import make_tiny_model

from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.commands import export
from minitune.config.training_config import GGUF_METHODS
from minitune.gguf.export import convert_folder, export_gguf, plan_conversion
from minitune.gguf.writer import quantize

METHODS = ["q8_0", "F16", "bf16", "q4_0"]
NAMES = ["m-Q8_0.gguf", "m-F16.gguf", "m-BF16.gguf", "m-Q4_0.gguf"]


def test_files_of_several_types_equal_those_written_one_by_one(tmp_path):
    folder = make_tiny_model(tmp_path / "m", tie=False)
    paths = convert_folder(folder, tmp_path / "all", METHODS)
    assert paths == [tmp_path / "all" / name for name in NAMES]
    for path, method in zip(paths, METHODS, strict=True):
        single = convert_folder(folder, tmp_path / method, method)
        assert single.name == path.name and single.read_bytes() == path.read_bytes()


def test_a_list_of_one_type_gives_a_list_of_one_path_and_a_name_gives_a_path(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "m"))
    path = tmp_path / "m-minitune-Q8_0.gguf"
    assert model.save_pretrained_gguf(tmp_path, tokenizer, ["q8_0"]) == [path]
    whole = path.read_bytes()
    path.unlink()
    assert model.save_pretrained_gguf(tmp_path, tokenizer, "fast_quantized") == path
    assert path.read_bytes() == whole


def test_each_tensor_is_read_once_and_quantised_once_for_each_of_its_types(tmp_path, monkeypatch):
    folder = make_tiny_model(tmp_path / "m", tie=False)
    read, quantised = Counter(), Counter()
    load_tensor = SafetensorsFolder.load

    def counting_load(self, name, *arguments):
        read[name] += 1
        return load_tensor(self, name, *arguments)

    def counting_quantize(rows, kind, *options):
        quantised[tuple(rows.shape), kind] += 1
        return quantize(rows, kind, *options)

    monkeypatch.setattr(SafetensorsFolder, "load", counting_load)
    monkeypatch.setattr("minitune.gguf.writer.quantize", counting_quantize)
    convert_folder(folder, tmp_path / "all", ["q8_0", "q4_0", "f16"], verify=False)
    assert set(read.values()) == {1}
    # 5 norms; 14 linears and the embedding in 3 types; the head, which is Q8_0 in the Q4_0 file
    assert sum(quantised.values()) == 5 + 3 * 15 + 2


@pytest.mark.parametrize("method", GGUF_METHODS)
def test_the_keys_name_the_type_and_the_general_name_is_without_it(tmp_path, method):
    folder = make_tiny_model(tmp_path / "m")
    for path in (tmp_path / "out", tmp_path / f"m.{method}.gguf"):
        plan = plan_conversion(folder, path, method)
        metadata = plan.contents[0].metadata
        kind = LlamaFileType(metadata["general.file_type"])
        assert kind.name == ("ALL_F32" if method == "f32" else f"MOSTLY_{method.upper()}")
        assert metadata["general.name"] == "m" and metadata["general.quantization_version"] == 2


def test_every_type_is_written_in_one_pass_and_passes_the_verification(tmp_path):
    folder = make_tiny_model(tmp_path / "m", hidden=256, ffn=512, heads=8, vocab=512, tie=False)
    paths = convert_folder(folder, tmp_path / "all", GGUF_METHODS)
    sizes = {path.stem.removeprefix("m-"): path.stat().st_size for path in paths}
    assert list(sizes) == [method.upper() for method in GGUF_METHODS]
    order = ("F32", "BF16", "Q8_0", "Q6_K", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K")
    assert sorted(order, key=sizes.get, reverse=True) == list(order)


def test_not_quantized_keeps_the_dtype_of_the_weights(tmp_path):
    for dtype, name in ((torch.float16, "F16"), (torch.bfloat16, "BF16")):
        folder = make_tiny_model(tmp_path / "m" / name, dtype=dtype)
        path = convert_folder(folder, tmp_path, "not_quantized")
        assert path.name == f"{name}-{name}.gguf"
        assert metadata_of(path)["general.file_type"] == LlamaFileType[f"MOSTLY_{name}"]
        model, tokenizer = load(folder, lora=False)
        path = export_gguf(model, tmp_path / "model", tokenizer, ["not_quantized"])[0]
        assert path.name == f"{name}-{name}.gguf"
        assert tensors_of(path)["token_embd.weight"].tensor_type.name == name


def test_a_disk_without_room_for_all_files_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    folder = make_tiny_model(tmp_path / "m")
    sizes = [convert_folder(folder, tmp_path / "one", name).stat().st_size for name in METHODS]
    free = sum(sizes) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    message = rf"all: needs {sum(sizes):,} bytes, but only {free:,} are left on the disk"
    with pytest.raises(ValueError, match=message):
        convert_folder(folder, tmp_path / "all", METHODS)
    assert not (tmp_path / "all").exists()
    free += 1
    assert len(convert_folder(folder, tmp_path / "all", METHODS)) == 4


@pytest.mark.parametrize("limit", [60_000, 180_000])
def test_if_one_file_cannot_be_written_none_appears(tmp_path, limit):
    folder = make_tiny_model(tmp_path / "m")
    with (
        files_limited_to(limit),
        pytest.raises(ValueError, match=r"all: could not be written \(File too large\)"),
    ):
        convert_folder(folder, tmp_path / "all", METHODS)
    assert not (tmp_path / "all").exists()


def test_a_weight_that_is_not_finite_is_refused_by_name_for_every_type(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    for method in METHODS:
        with pytest.raises(
            ValueError,
            match=r"model\.safetensors: .*1\.mlp\.up_proj\.weight holds a value that is NaN",
        ):
            convert_folder(folder, tmp_path / "all", method)
    assert not (tmp_path / "all").exists()


def test_files_are_renamed_after_all_are_flushed(tmp_path, monkeypatch):
    folder, events = make_tiny_model(tmp_path / "m"), []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("flush"), flush(file)))
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda path, new: (events.append("name"), rename(path, new))
    )
    convert_folder(folder, tmp_path / "all", ["f16", "q8_0"])
    assert "".join(event[0] for event in events).endswith("nnf")
    assert events.index("name") >= 2


def test_the_command_needs_room_for_the_merged_folder_and_the_files_together(
    tmp_path, monkeypatch, capsys
):
    folder = make_tiny_model(tmp_path / "m")
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2 * size}))
    arguments = ["--model", folder, "--merged", tmp_path / "merged", "--output", tmp_path / "all"]
    assert export.main([*map(str, arguments), "--quantization-method", "f16", "q8_0"]) == 2
    assert re.search(r"all: needs [\d,]+ bytes, but only", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_command_writes_several_types_and_refuses_before_it_writes_a_merged_folder(
    tmp_path, capsys
):
    def command(*arguments):
        code = export.main(["--model", str(folder), *map(str, arguments)])
        return code, *capsys.readouterr()

    folder = make_tiny_model(tmp_path / "m")
    types = ("--quantization-method", "Q8_0", "f16,not_quantized")
    code, out, _ = command("--output", tmp_path / "all", *types)
    assert code == 0
    assert out.split() == [str(tmp_path / "all" / name) for name in NAMES[:3]]
    for output, message in ((tmp_path / "all", "exists"), (tmp_path / "x.gguf", "give a folder")):
        code, out, err = command("--merged", tmp_path / "merged", "--output", output, *types)
        assert code == 2 and message in err and not out
    code, out, err = command("--merged", tmp_path / "merged", "--save-4bit", folder)
    assert code == 2 and "base model's own folder" in err and not out
    code, _, err = command("--output", tmp_path, "--quantization-method", "q9")
    assert code == 2 and "'q9' is not supported; choose from f32, " in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "m"]


@pytest.mark.gpu
def test_a_gpu_writes_the_bytes_that_the_cpu_writes(tmp_path):
    folder = make_tiny_model(tmp_path / "m", tie=False)
    methods = ["f32", "f16", "bf16", "q8_0"]
    plan = plan_conversion(folder, tmp_path / "gpu", methods)
    assert plan.device.type == "cuda"
    on_gpu = plan.write()
    plan = plan_conversion(folder, tmp_path / "cpu", methods)
    on_cpu = replace(plan, device=torch.device("cpu")).write()
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()

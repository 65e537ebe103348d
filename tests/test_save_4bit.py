"""The saved NF4 base loads bit for bit, here and in transformers with bitsandbytes."""

import json
import re
from collections import namedtuple

import pytest
import torch
from fp8_folders import make_fp8
from full_disk import files_limited_to
from safetensors.torch import load_file
from test_merge import load
from tiny import make_tiny_model
from tiny_families import make_tiny_family
from weight_folders import write_bitsandbytes

from minitune import FastLanguageModel
from minitune.checkpoints.load_weights import NF4
from minitune.checkpoints.merge import merge_to_folder
from minitune.checkpoints.save_4bit import save_4bit
from minitune.commands import export

IDS = torch.randint(3, 400, (1, 40), generator=torch.Generator().manual_seed(1))
FIELDS = ("packed", "absmax", "code", "nested_absmax", "nested_code", "nested_offset")


def assert_same_base(found, expected):
    """Assert that two models have the same base, bit for bit."""
    assert found.config.tensor_shapes() == expected.config.tensor_shapes()
    base = {name: p for name, p in expected.named_parameters() if ".lora_" not in name}
    for name, parameter in base.items():
        other = found.get_parameter(name)
        assert other.dtype == parameter.dtype and torch.equal(other, parameter), name
    for (name, one), (_, two) in zip(found.linears(), expected.linears(), strict=True):
        assert one.is_quantized == two.is_quantized, name
        if one.is_quantized:
            assert one.quantized.shape == two.quantized.shape
            sizes = (one.quantized.blocksize, one.quantized.nested_blocksize)
            assert sizes == (two.quantized.blocksize, two.quantized.nested_blocksize)
            for field in FIELDS:
                a, b = getattr(one.quantized, field), getattr(two.quantized, field)
                assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b)), (name, field)


def fp8_model(folder):
    make_fp8(folder)
    return folder


CASES = {
    "tied": make_tiny_model,
    "untied with biases in float16": lambda folder: make_tiny_model(
        folder, tie=False, attention_bias=True, dtype=torch.float16
    ),
    "float32": lambda folder: make_tiny_model(folder, dtype=torch.float32),
    "qwen3": lambda folder: make_tiny_family(folder, "qwen3"),
    "FP8": fp8_model,
}


@pytest.mark.parametrize("case", CASES)
def test_the_saved_base_is_the_model_that_was_quantised_on_loading(tmp_path, case):
    model, _ = load(CASES[case](tmp_path / "m"), lora=False)
    assert model.save_4bit(tmp_path / "nf4") == tmp_path / "nf4"
    again, _ = load(tmp_path / "nf4", lora=False)
    assert_same_base(again, model)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    save_4bit(again, tmp_path / "twice")
    assert_same_base(load(tmp_path / "twice", lora=False)[0], model)


def test_loading_the_saved_base_quantises_nothing(tmp_path, monkeypatch):
    model, _ = load(make_tiny_model(tmp_path / "m"), lora=False)
    save_4bit(model, tmp_path / "nf4")
    monkeypatch.setattr(NF4, "quantize", None)
    for load_in_4bit in (True, False):
        again, _ = load(tmp_path / "nf4", lora=False, load_in_4bit=load_in_4bit)
        assert_same_base(again, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_transformers_with_bitsandbytes_loads_the_same_weights(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    functional = pytest.importorskip("bitsandbytes.functional")
    model, _ = load(make_tiny_model(tmp_path / "m", tie=False, dtype=dtype), lora=False)
    save_4bit(model, tmp_path / "nf4")
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "nf4", device_map="cpu", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert hf.dtype == dtype
    for name, linear in model.linears():
        weight = hf.get_submodule(name).weight
        state = weight.quant_state
        assert torch.equal(weight.data.view(-1), linear.quantized.packed), name
        assert torch.equal(state.absmax, linear.quantized.absmax) and state.dtype == dtype
        values = functional.dequantize_4bit(weight.data, state)
        assert torch.equal(values, linear.weight_as(dtype)), name
    for name, parameter in model.named_parameters():
        assert torch.equal(hf.get_parameter(name), parameter), name
    assert type(hf.lm_head) is torch.nn.Linear


def test_names_dtypes_shapes_and_states_are_those_that_bitsandbytes_writes(tmp_path):
    source = make_tiny_model(tmp_path / "m", tie=False)
    write_bitsandbytes(source, tmp_path / "theirs", skip=["lm_head"])
    save_4bit(load(source, lora=False)[0], tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith("bitsandbytes__nf4"):
            a, b = (json.loads(bytes(values.tolist())) for values in (tensor, theirs[name]))
            assert list(a) == list(b) and a["dtype"] == "bfloat16"
            changed = {"nested_offset": 0.0, "dtype": ""}  # theirs quantised from float32
            assert a | changed == b | changed
        else:
            assert tensor.shape == theirs[name].shape, name
            if name.startswith("model.layers") and "norm" not in name:
                assert tensor.dtype == theirs[name].dtype, name
    ours, theirs = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("ours", "theirs")
    )
    assert ours.items() <= (theirs | {"bnb_4bit_compute_dtype": "bfloat16"}).items()


@pytest.mark.parametrize(
    "options",
    [{"double_quant": False}, {"skip": ["lm_head", "model.layers.0.mlp.down_proj"]}],
    ids=["plain scales", "a skipped linear"],
)
def test_a_base_that_bitsandbytes_quantised_is_saved_as_it_is(tmp_path, options):
    source = make_tiny_model(tmp_path / "m", tie=False)
    write_bitsandbytes(source, tmp_path / "theirs", **options)
    model, _ = load(tmp_path / "theirs", lora=False)
    save_4bit(model, tmp_path / "ours")
    assert_same_base(load(tmp_path / "ours", lora=False)[0], model)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] == options.get("double_quant", True)
    assert config["llm_int8_skip_modules"] == options.get("skip", ["lm_head"])
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    down = hf.get_submodule("model.layers.0.mlp.down_proj")
    assert (type(down) is torch.nn.Linear) == ("skip" in options)


def test_an_adapter_is_no_part_of_the_base_and_fits_it(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "m"))
    before = model(input_ids=IDS).logits
    save_4bit(model, tmp_path / "nf4", tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "nf4", lora=False)
    assert_same_base(again, model)
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(again(input_ids=IDS).logits, before)


def test_shards_tokenizer_and_generation_config_come_along(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "m"), lora=False)
    folder = save_4bit(model, tmp_path / "nf4", tokenizer, shard_bytes=40_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    again, found = load(folder, lora=False)
    assert_same_base(again, model)
    assert found.encode("twelve lamps") == tokenizer.encode("twelve lamps")
    generation = "generation_config.json"
    assert (folder / generation).read_bytes() == (model.folder / generation).read_bytes()


def test_an_adapter_that_was_merged_before_is_not_merged_again(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "m"))
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_to_folder(model, tmp_path / "merged", tokenizer)
    save_4bit(load(merged, lora=False)[0], tmp_path / "nf4")
    again, _ = load(tmp_path / "nf4", lora=False)
    again.load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="this adapter is merged into it already"):
        merge_to_folder(again, tmp_path / "twice", tokenizer)


def test_a_model_in_16_bit_and_an_existing_folder_are_refused(tmp_path):
    source = make_tiny_model(tmp_path / "m")
    model, _ = FastLanguageModel.from_pretrained(source, device="cpu", load_in_4bit=False)
    with pytest.raises(ValueError, match="no NF4 weights to save; load it with load_in_4bit=True"):
        model.save_4bit(tmp_path / "nf4")
    model, _ = FastLanguageModel.from_pretrained(source, device="cpu")
    with pytest.raises(ValueError, match="is the base model's own folder"):
        model.save_4bit(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        model.save_4bit(tmp_path / "full")
    assert not (tmp_path / "nf4").exists()


def test_a_disk_without_room_leaves_nothing(tmp_path, monkeypatch):
    model, _ = load(make_tiny_model(tmp_path / "m"), lora=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    with files_limited_to(20_000), pytest.raises(ValueError, match="could not be written"):
        model.save_4bit(tmp_path / "nf4")
    usage = namedtuple("Usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"nf4: needs .* bytes, but only 1,000 are left"):
        model.save_4bit(tmp_path / "nf4")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_export_command_saves_the_base_and_takes_no_adapter_then(tmp_path, capsys):
    source = make_tiny_model(tmp_path / "m")
    base = ["--model", str(source)]
    command = [*base, "--save-4bit", str(tmp_path / "nf4"), "--merged", str(tmp_path / "merged")]
    assert export.main(command) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [str(tmp_path / "merged"), str(tmp_path / "nf4")]
    assert_same_base(load(tmp_path / "nf4", lora=False)[0], load(source, lora=False)[0])
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(merged[name], tensor), name
    load(source)[0].save_pretrained(tmp_path / "adapter")
    command = [*base, "--adapter", str(tmp_path / "adapter"), "--save-4bit", str(tmp_path / "x")]
    assert export.main(command) == 2
    error = capsys.readouterr().err
    assert re.search("--save-4bit writes the model without an adapter; write --merged first", error)

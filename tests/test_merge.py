"""Merged weights equal float64 and PEFT; the folder loads elsewhere; failures leave nothing."""

import json

import pytest
import torch
from fp8_folders import make_fp8
from full_disk import files_limited_to
from gguf_files import make_tiny_gguf
from safetensors.torch import load_file, save_file
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel, api
from minitune.checkpoints.merge import adapter_digest, merge_to_folder, merged_tensors
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.commands import export

IDS = torch.randint(3, 400, (1, 40), generator=torch.Generator().manual_seed(1))
SCALING = 3.0  # lora_alpha / r of the adapter that `load` attaches


def load(folder, lora=True, **kwargs):
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, dtype=torch.float32, device="cpu", **kwargs
    )
    if lora:
        FastLanguageModel.get_peft_model(model, r=4, lora_alpha=12)
        # moves every weight by several units in the last place of bfloat16
        draw_adapter(model, b=0.03)
    return model, tokenizer


def bitsandbytes_tensors(name, nf4):
    """Return the tensors of an NF4 linear under bitsandbytes' names."""
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "shape": list(nf4.shape),
        "dtype": "bfloat16",
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": nf4.nested_offset.item(),
    }
    return {
        f"{name}.weight": nf4.packed[:, None],
        f"{name}.weight.absmax": nf4.absmax,
        f"{name}.weight.quant_map": nf4.code.clone(),
        f"{name}.weight.nested_absmax": nf4.nested_absmax,
        f"{name}.weight.nested_quant_map": nf4.nested_code.clone(),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def write_prequantized(model, folder):
    """Write a model's base in bitsandbytes' NF4 layout, beside copies of its other files."""
    folder.mkdir()
    tensors = {name: p.detach() for name, p in model.named_parameters() if ".lora_" not in name}
    for name, linear in model.linears():
        tensors |= bitsandbytes_tensors(name, linear.quantized)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    for file in model.folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "bnb_4bit_quant_type": "nf4",
        "load_in_4bit": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(hf):
    with torch.no_grad():
        return hf(IDS).logits[0]


def transformers_logits(folder):
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return logits(model)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def exact_merge(linear, stored, merge_base):
    """Return (W, W + s B A) of a linear in float64."""
    base = linear.weight_as(torch.float32) if merge_base == "nf4" else stored
    A, B = (factor.weight.detach().double() for factor in (linear.lora_A, linear.lora_B))
    return base.double(), base.double() + SCALING * B @ A


@pytest.mark.parametrize("merge_base", ["nf4", "original"])
def test_every_merged_weight_is_the_float64_sum_rounded_once(tmp_path, merge_base):
    model, _ = load(make_tiny_model(tmp_path / "base", attention_bias=True, tie=False))
    base = SafetensorsFolder(tmp_path / "base")
    merged = dict(merged_tensors(model, merge_base))
    shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
    assert shapes == model.config.tensor_shapes() and set(merged) == set(base.names())
    linears = {f"{name}.weight": linear for name, linear in model.linears()}
    moved = 0
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        stored = base.load(name)
        if name not in linears:
            assert torch.equal(tensor, stored), name
            continue
        W, exact = exact_merge(linears[name], stored, merge_base)
        # float32 sums may fall on the other side of a tie, by one place
        assert (tensor != exact.to(torch.bfloat16)).float().mean() < 1e-3, name
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-7).all(), name
        moved += (tensor != W.to(torch.bfloat16)).float().mean().item()
    # the adapter changes nearly every weight, so no linear was left out
    assert moved / len(linears) > 0.9


def test_merging_onto_the_original_equals_pefts_own_merge(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    hf = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").merge_and_unload()
    theirs = {name: p for name, p in hf.state_dict().items() if name != "lm_head.weight"}
    merge_to_folder(model, tmp_path / "merged", tokenizer, "original")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    differing = sum((ours[name] != theirs[name].to(torch.bfloat16)).sum().item() for name in ours)
    # float32 sums near a rounding boundary
    assert differing <= 1e-4 * sum(tensor.numel() for tensor in ours.values())
    assert relative(transformers_logits(tmp_path / "merged"), logits(hf)) < 0.02


def test_a_merged_nf4_model_gives_the_trained_models_logits_in_transformers(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    trained = model(input_ids=IDS).logits[0].detach()
    merge_to_folder(model, tmp_path / "nf4", tokenizer, "nf4")
    merge_to_folder(model, tmp_path / "original", tokenizer)
    merged = transformers_logits(tmp_path / "nf4")
    error = relative(merged, trained)
    assert error < 0.02  # the rounding of the merged weights to bfloat16
    # another base gives other logits, and so does a base without the adapter
    assert relative(transformers_logits(tmp_path / "original"), trained) > 5 * error
    assert relative(transformers_logits(tmp_path / "base"), trained) > 10 * error
    # both load the same rounded weights, so the logits are the same
    reloaded, _ = load(tmp_path / "nf4", lora=False, load_in_4bit=False)
    assert relative(reloaded(input_ids=IDS).logits[0], merged) < 1e-5


def test_shards_hold_the_same_tensors_as_one_file(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base", layers=3, tie=False))
    merge_to_folder(model, tmp_path / "one", tokenizer)
    merge_to_folder(model, tmp_path / "many", tokenizer, shard_bytes=100_000)
    one, many = SafetensorsFolder(tmp_path / "one"), SafetensorsFolder(tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert all(size <= 100_000 for size in sizes)
    assert sorted(one.names()) == sorted(many.names())
    assert all(torch.equal(one.load(name), many.load(name)) for name in one.names())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(one.load(name).nbytes for name in one.names())
    expected = transformers_logits(tmp_path / "one")
    assert relative(transformers_logits(tmp_path / "many"), expected) == 0


def test_config_and_tokenizer_travel_with_the_merged_weights(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base", dtype=torch.float32))
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == {**model.config.raw, "torch_dtype": "bfloat16"}


def test_a_float16_base_stays_float16(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "base", dtype=torch.float16))
    assert {tensor.dtype for _, tensor in merged_tensors(model)} == {torch.float16}


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float16", "fp8", "gguf", "gguf f16"])
def test_computing_in_float16_does_not_change_the_dtype_of_a_merge(tmp_path, kind, monkeypatch):
    if kind.startswith("gguf"):
        base = make_tiny_gguf(tmp_path, "f16" if kind == "gguf f16" else "q8_0", layers=1)
    else:
        base = tmp_path / "base"
        dtype = torch.bfloat16 if kind == "fp8" else getattr(torch, kind)
        (make_fp8 if kind == "fp8" else make_tiny_model)(base, layers=1, dtype=dtype)
    expected = torch.float16 if kind in ("float16", "gguf f16") else torch.bfloat16
    # A command computes in float16 too, as on a GPU without bfloat16.
    monkeypatch.setattr(api, "choose_dtype", lambda *arguments: torch.float16)
    model, _ = FastLanguageModel.from_pretrained(base, dtype="float16", device="cpu")
    FastLanguageModel.get_peft_model(model, r=4)
    draw_adapter(model, b=0.03)
    assert model.dtype == torch.float16
    assert {tensor.dtype for _, tensor in merged_tensors(model)} == {expected}
    model.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    arguments = ["--model", base, "--adapter", tmp_path / "adapter", "--merged", merged]
    assert export.main(list(map(str, arguments))) == 0
    tensors = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}


def test_a_base_of_4_bit_weights_merges_onto_them_and_onto_nothing_else(tmp_path):
    source, _ = load(make_tiny_model(tmp_path / "source"), lora=False)
    model, tokenizer = load(write_prequantized(source, tmp_path / "base"))
    message = "holds 4-bit weights only; merge_base must be 'nf4' or 'auto'"
    with pytest.raises(ValueError, match=message):
        merged_tensors(model, "original")
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    trained = model(input_ids=IDS).logits[0].detach()
    assert relative(transformers_logits(tmp_path / "merged"), trained) < 0.02


def test_the_same_adapter_is_not_merged_twice(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(model, tmp_path / "once", tokenizer)
    again, _ = load(tmp_path / "once", lora=False)
    again.load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="this adapter is merged into it already"):
        merge_to_folder(again, tmp_path / "twice", tokenizer)
    # another adapter may follow, and then neither may come again
    draw_adapter(again, b=0.03, seed=1)
    merge_to_folder(again, tmp_path / "second", tokenizer)
    third, _ = load(tmp_path / "second", lora=False)
    third.load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="this adapter is merged into it already"):
        merged_tensors(third)


def test_an_adapter_with_another_scaling_is_another_one(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    digest = adapter_digest(model)
    assert adapter_digest(model) == digest
    for _, linear in model.linears():
        linear.scaling *= 2
    assert adapter_digest(model) != digest


def test_an_adapter_saved_beside_merged_weights_does_not_hide_that_it_is_merged(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    model.save_pretrained(tmp_path / "merged")
    again, _ = load(tmp_path / "merged", lora=False)
    again.load_adapter(tmp_path / "merged")
    with pytest.raises(ValueError, match="this adapter is merged into it already"):
        merged_tensors(again)


@pytest.mark.parametrize("lora", [False, True], ids=["no adapter", "untrained adapter"])
def test_without_an_adapter_the_result_is_the_base(tmp_path, lora):
    model, _ = load(make_tiny_model(tmp_path / "base"), lora=False)
    if lora:
        FastLanguageModel.get_peft_model(model, r=4)
    base = SafetensorsFolder(tmp_path / "base")
    for name, tensor in merged_tensors(model):
        assert torch.equal(tensor, base.load(name)), name


REQUESTS = [  # (folder, merge_base, error)
    ("base", "auto", "is the base model's own folder"),
    ("full", "auto", "full: exists and is not empty; remove it or choose another folder"),
    ("full/notes.txt", "auto", "exists and is not empty"),
    ("out", "fp16", "merge_base 'fp16' does not exist; choose from auto, original, nf4"),
]


def test_bad_requests_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    plain, _ = load(tmp_path / "base", lora=False, load_in_4bit=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for folder, merge_base, message in REQUESTS:
        with pytest.raises(ValueError, match=message):
            merge_to_folder(model, tmp_path / folder, tokenizer, merge_base)
    message = "loaded in 16 bit and has no NF4 weights; choose 'original'"
    with pytest.raises(ValueError, match=message):
        merge_to_folder(plain, tmp_path / "out", tokenizer, "nf4")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    message = r"out: needs [\d,]+ bytes, but only 1,000 are left on the disk"
    with pytest.raises(ValueError, match=message):
        merge_to_folder(model, tmp_path / "out", tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "full"]


def test_a_weight_that_is_not_finite_is_named_and_leaves_nothing(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_A.weight[2, 3] = float("nan")
    message = r"model.layers.1.mlp.up_proj.weight: the merged weight is not finite"
    with pytest.raises(ValueError, match=message):
        merge_to_folder(model, tmp_path / "out", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_write_that_fails_midway_leaves_nothing(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    with (
        files_limited_to(100_000),
        pytest.raises(ValueError, match="out: could not be written"),
    ):
        merge_to_folder(model, tmp_path / "out", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]

"""FP8 checkpoints are dequantised as in transformers, bit for bit, and used like 16-bit models."""

import json

import pytest
import torch
import transformers
from fp8_folders import KINDS, UP, deepseek, make_fp8, quantize, write_fp8
from gguf_files import tensors_of
from safetensors.torch import load_file
from tiny import make_tiny_model
from transformers.integrations import finegrained_fp8
from weight_folders import edit_tensors, load

from minitune import FastLanguageModel, Tokenizer
from minitune.checkpoints.fp8 import dequantize_fp8
from minitune.checkpoints.merge import merge_to_folder
from minitune.commands import export
from minitune.gguf.export import convert_folder
from minitune.model.nf4 import NF4

IDS = torch.randint(3, 400, (1, 40), generator=torch.Generator().manual_seed(1))
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_weight_is_its_fp8_value_times_its_scale_rounded_once(tmp_path, kind):
    exact = make_fp8(tmp_path / "m", kind)
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = FastLanguageModel.from_pretrained(
            tmp_path / "m", dtype=dtype, device="cpu", load_in_4bit=False
        )
        for name, linear in model.linears():
            assert linear.weight.dtype == dtype
            assert torch.equal(linear.weight, exact[f"{name}.weight"].to(dtype)), name
    assert len(exact) == 14


@every_kind
def test_nf4_is_made_of_the_float32_values(tmp_path, kind):
    exact = make_fp8(tmp_path / "m", kind)
    model = load(tmp_path / "m")
    for name, linear in model.linears():
        expected = NF4.quantize(exact[f"{name}.weight"])
        assert torch.equal(linear.quantized.packed, expected.packed), name
        assert torch.equal(linear.quantized.absmax, expected.absmax), name
        assert torch.equal(linear.quantized.nested_absmax, expected.nested_absmax), name


@pytest.mark.parametrize("shape", [(128, 128), (192, 320), (130, 96), (1, 7), (300, 1)], ids=str)
def test_dequantised_values_equal_those_of_transformers_bit_for_bit(shape):
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize(torch.randn(shape, generator=generator), (128, 128))
    found = dequantize_fp8(weight, scale, (128, 128))
    if not hasattr(finegrained_fp8, "_dequantize_fp8_weight"):
        pytest.skip("this version of transformers dequantises elsewhere")
    theirs = finegrained_fp8._dequantize_fp8_weight(weight, scale, [128, 128], torch.float32)
    assert torch.equal(found, theirs)
    if shape[0] % 128 == shape[1] % 128 == 0:  # their loader takes whole blocks only
        assert torch.equal(
            found, finegrained_fp8.Fp8Dequantize(None)._dequantize_one(weight, scale)
        )
    for scalar in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]]).bfloat16()):
        theirs = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(weight, scalar, torch.float32)
        assert torch.equal(dequantize_fp8(weight, scalar, shape), theirs)


@pytest.mark.parametrize("kind", ["scales in bfloat16", "one scale and static activations"])
def test_logits_equal_those_of_transformers(tmp_path, kind):
    pytest.importorskip("accelerate")
    make_tiny_model(tmp_path / "m", hidden=64, ffn=128, dtype=torch.float32)
    write_fp8(tmp_path / "m", *KINDS[kind])
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    model = load(tmp_path / "m", load_in_4bit=False)
    with torch.no_grad():
        for name, linear in model.linears():
            assert torch.equal(hf.get_submodule(name).weight, linear.weight), name
        expected = hf(IDS).logits
        assert (model(input_ids=IDS).logits - expected).norm() / expected.norm() < 1e-5


def test_merging_onto_the_original_takes_the_dequantised_weights(tmp_path):
    exact = make_fp8(tmp_path / "m")
    tokenizer = Tokenizer.from_folder(tmp_path / "m")
    for load_in_4bit in (False, True):
        model = load(tmp_path / "m", load_in_4bit=load_in_4bit)
        merged = merge_to_folder(model, tmp_path / f"merged {load_in_4bit}", tokenizer)
        tensors = load_file(merged / "model.safetensors")
        assert not any(name.endswith("_scale_inv") for name in tensors)
        for name, values in exact.items():
            assert torch.equal(tensors[name], values.bfloat16()), name
        assert "quantization_config" not in json.loads((merged / "config.json").read_text())
        hf = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        again = load(merged, load_in_4bit=False)
        with torch.no_grad():
            expected = hf(IDS).logits
            assert (again(input_ids=IDS).logits - expected).norm() / expected.norm() < 1e-5


def test_an_adapter_is_added_to_the_float32_values_in_any_compute_dtype(tmp_path):
    exact = make_fp8(tmp_path / "m")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = FastLanguageModel.from_pretrained(
            tmp_path / "m", dtype=dtype, device="cpu", load_in_4bit=False
        )
        FastLanguageModel.get_peft_model(model, r=4, target_modules=["up_proj"])
        linear = model.get_submodule(UP.removesuffix(".weight"))
        torch.nn.init.normal_(linear.lora_B.weight, generator=torch.Generator().manual_seed(0))
        merged = merge_to_folder(model, tmp_path / str(dtype), tokenizer)
        found[dtype] = load_file(merged / "model.safetensors")[UP]
    A, B = (factor.double() for factor in linear.adapter())
    exact_sum = exact[UP].double() + linear.scaling * B @ A
    assert torch.equal(*found.values())
    assert (found[dtype] != exact_sum.bfloat16()).float().mean() < 1e-3


def test_a_gguf_file_holds_the_float32_values(tmp_path):
    exact = make_fp8(tmp_path / "m")
    file = tensors_of(convert_folder(tmp_path / "m", tmp_path / "x.gguf", "f32"))
    found = torch.from_numpy(file["blk.1.ffn_up.weight"].data.copy())
    assert torch.equal(found.view(exact[UP].shape), exact[UP])
    arguments = ["--model", str(tmp_path / "m"), "--merged", str(tmp_path / "merged")]
    assert export.main(arguments) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[UP], exact[UP].bfloat16())


def test_a_power_of_two_may_be_the_scale(tmp_path):
    make_tiny_model(tmp_path / "m")
    powers = lambda scale: scale.to(torch.float8_e8m0fnu)  # noqa: E731
    exact = write_fp8(tmp_path / "m", (64, 64), deepseek((64, 64)), "_scale_inv", powers)
    model = load(tmp_path / "m", load_in_4bit=False)
    assert torch.equal(model.get_parameter(UP), exact[UP])


def test_an_fp8_head_and_embedding_are_dequantised_too(tmp_path):
    make_fp8(tmp_path / "m")
    names = ("lm_head.weight", "model.embed_tokens.weight")
    exact = {}

    def replace(tensors):
        for name in names:
            weight, scale = quantize(tensors[name], tensors[name].shape)
            tensors[name], tensors[name + "_scale"] = weight, scale.view(())
            exact[name] = weight.float() * scale

    edit_tensors(tmp_path / "m", replace)
    model = load(tmp_path / "m")
    for name in names:
        assert torch.equal(model.get_parameter(name), exact[name])

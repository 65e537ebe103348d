"""The text model of a multimodal folder loads, merges and exports like a plain text model."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from command_inputs import train, train_arguments, write_inputs
from family_configs import WRAPPERS
from fp8_folders import KINDS, write_fp8
from gguf_files import tensors_of
from safetensors.torch import load_file, save_file
from transformers_twin import batch, load, relative
from weight_folders import edit_json, edit_tensors
from wrapper_folders import make_wrapper

from minitune.checkpoints.merge import merge_to_folder
from minitune.checkpoints.save_4bit import save_4bit
from minitune.commands import export, generate
from minitune.config.architectures import ARCHITECTURES
from minitune.config.layer_kinds import FULL, SLIDING
from minitune.config.model_config import ModelConfig
from minitune.gguf.export import convert_folder

every_wrapper = pytest.mark.parametrize("case", WRAPPERS)


@every_wrapper
def test_logits_equal_those_that_transformers_computes_with_the_whole_model(tmp_path, case):
    hf = make_wrapper(tmp_path / "m", case)
    model, _ = load(tmp_path / "m", load_in_4bit=False, with_adapter=False)
    ids = torch.randint(20, 400, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # The wrappers of transformers 5 have heads of their own, without Granite's logits_scaling.
        expected = hf(input_ids=ids).logits / WRAPPERS[case][1].get("logits_scaling", 1.0)
        assert relative(model(input_ids=ids).logits, expected) < 1e-5


@every_wrapper
def test_the_merged_folder_is_a_plain_text_model_in_transformers(tmp_path, case):
    make_wrapper(tmp_path / "m", case)
    model, tokenizer = load(tmp_path / "m", load_in_4bit=False)
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["model_type"] in ARCHITECTURES and "text_config" not in written
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(hf).__name__ == written["architectures"][0]
    again, _ = load(tmp_path / "merged", load_in_4bit=False, with_adapter=False)
    assert not again.config.notes
    ids = batch(model, rows=1, length=60)[0]
    with torch.no_grad():
        expected = hf(ids).logits
        assert relative(again(input_ids=ids).logits, expected) < 1e-5
        # A merge rounds the sum of weights and adapter to bfloat16.
        assert relative(model(input_ids=ids).logits, expected) < 0.06


def test_a_gguf_file_of_the_text_model_needs_no_merge_first(tmp_path):
    make_wrapper(tmp_path / "m", "mistral3")
    model, tokenizer = load(tmp_path / "m", load_in_4bit=False, with_adapter=False)
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    direct = tensors_of(convert_folder(tmp_path / "m", tmp_path / "x.gguf", "bf16"))
    merged = tensors_of(convert_folder(tmp_path / "merged", tmp_path / "y.gguf", "bf16"))
    assert direct.keys() == merged.keys()
    assert (direct["blk.1.attn_q.weight"].data == merged["blk.1.attn_q.weight"].data).all()


LAYOUTS = {  # beginnings of names as transformers 4 wrote them -> those of another layout
    "transformers 5": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
    },
    "idefics": {"language_model.model.": "model.text_model.", "language_model.lm": "lm"},
    "a decoder": {"language_model.model.": "language_model.", "language_model.lm": "lm"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_of_every_layout_load_alike(tmp_path, layout):
    make_wrapper(tmp_path / "m", "llava")
    ids = torch.arange(20, 60)[None]
    expected = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits

    def rename(tensors):
        for name in list(tensors):
            new = name
            for old, beginning in LAYOUTS[layout].items():
                if name.startswith(old):
                    new = beginning + name.removeprefix(old)
            tensors[new] = tensors.pop(name)

    edit_tensors(tmp_path / "m", rename)
    found = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits
    assert torch.equal(found, expected)


def test_a_wrapper_without_a_type_is_a_wrapper_all_the_same(tmp_path):
    make_wrapper(tmp_path / "m", "llava")
    edit_json(tmp_path / "m" / "config.json", model_type=None)
    model, _ = load(tmp_path / "m", with_adapter=False)
    assert model.config.notes[0].startswith("the folder holds a multimodal model")


@pytest.mark.parametrize("case", ["mistral3", "idefics3", "qwen3 with sections"])
def test_peft_finds_the_adapters_modules_in_the_wrapper(tmp_path, case):
    hf = make_wrapper(tmp_path / "m", case)
    model, tokenizer = load(tmp_path / "m", load_in_4bit=False)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20, 60)[None]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert relative(adapted(input_ids=ids).logits, expected) < 1e-5
    adapted.save_pretrained(tmp_path / "peft")
    plain = merge_to_folder(
        load(tmp_path / "m", load_in_4bit=False, with_adapter=False)[0], tmp_path / "t", tokenizer
    )
    for adapter in ("adapter", "peft"):
        for base in (tmp_path / "m", plain):
            again, _ = load(base, load_in_4bit=False, with_adapter=False)
            again.load_adapter(tmp_path / adapter)
            for (name, one), (_, two) in zip(
                again.trainable_parameters(), model.trainable_parameters(), strict=True
            ):
                assert torch.equal(one, two), name


def test_an_adapter_of_the_vision_tower_is_refused_by_name(tmp_path):
    make_wrapper(tmp_path / "m", "llava")
    model, _ = load(tmp_path / "m")
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model"
    name = f"{prefix}.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    vision = f"{prefix}.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {vision: tensors[name].clone()}, path)
    with pytest.raises(ValueError, match=rf"holds {vision}, which has no place in the model"):
        model.load_adapter(tmp_path / "adapter")
    plain = f"{prefix}.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {plain: tensors[name].clone()}, path)
    with pytest.raises(ValueError, match="holds the same matrix under two names"):
        model.load_adapter(tmp_path / "adapter")


def test_fp8_and_nf4_weights_of_a_text_model_are_found_by_their_prefix(tmp_path):
    make_wrapper(tmp_path / "plain", "mistral3")
    model, tokenizer = load(tmp_path / "plain", with_adapter=False)
    ids = torch.arange(20, 60)[None]
    merge_to_folder(model, tmp_path / "fp8", tokenizer)
    write_fp8(tmp_path / "fp8", *KINDS["one scale and static activations"])
    save_4bit(model, tmp_path / "nf4")
    for name in ("fp8", "nf4"):
        folder = tmp_path / name
        expected = load(folder, with_adapter=False)[0](input_ids=ids).logits

        def wrap(tensors):
            for plain in list(tensors):
                tensors[f"language_model.{plain}"] = tensors.pop(plain)
            tensors["vision_tower.ln_pre.weight"] = torch.ones(3, dtype=torch.float8_e4m3fn)

        edit_tensors(folder, wrap)
        text = json.loads((folder / "config.json").read_text())
        outer = {"model_type": "mistral3", "vision_config": {}}
        outer["quantization_config"] = text.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(outer | {"text_config": text}))
        wrapped, _ = load(folder, with_adapter=False)
        assert wrapped.config.wrapper == "mistral3"
        assert torch.equal(wrapped(input_ids=ids).logits, expected)


def test_gemma3s_first_layout_has_rope_scaling_for_the_full_layers_alone(tmp_path):
    hf = make_wrapper(tmp_path / "m", "gemma3")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    ropes = raw["text_config"].pop("rope_parameters")
    for key in ("layer_types", "tie_word_embeddings", "max_position_embeddings"):
        del raw["text_config"][key]
    del raw["tie_word_embeddings"]
    raw["text_config"] |= {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": ropes[FULL]["rope_theta"],
        "rope_local_base_freq": ropes[SLIDING]["rope_theta"],
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    model, tokenizer = load(tmp_path / "m", load_in_4bit=False, with_adapter=False)
    ids = torch.arange(20, 80)[None]
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    with torch.no_grad():
        expected = hf(input_ids=ids).logits
        assert relative(model(input_ids=ids).logits, expected) < 1e-5
        assert relative(merged(ids).logits, expected) < 1e-5


def test_qwen2_vls_first_layout_has_the_text_models_values_at_the_top(tmp_path):
    make_wrapper(tmp_path / "m", "qwen2.5 with sections")
    ids = torch.arange(20, 60)[None]
    expected = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(text | raw))

    def rename(tensors):
        for name in list(tensors):
            new = name.replace("model.language_model.", "model.").replace("model.visual", "visual")
            tensors[new] = tensors.pop(name)

    edit_tensors(tmp_path / "m", rename)
    hf = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "m", dtype=torch.float32
    )
    model = load(tmp_path / "m", load_in_4bit=False, with_adapter=False)[0]
    with torch.no_grad():
        assert relative(model(input_ids=ids).logits, hf(input_ids=ids).logits) < 1e-5
    found = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits
    assert torch.equal(found, expected)


def test_the_commands_say_that_the_text_model_is_used(tmp_path, capsys):
    note = "the folder holds a llava model; its text model, of type llama, is used"
    inputs = write_inputs(tmp_path)
    make_wrapper(tmp_path / "m", "llava")
    arguments = ["--model", str(tmp_path / "m"), "--device", "cpu"]
    run = tmp_path / "run"
    assert train(train_arguments(inputs, run, "--merge", *arguments)) == 0
    assert f"note       {note}" in capsys.readouterr().err
    hf = transformers.AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    model, _ = load(run / "merged", load_in_4bit=False, with_adapter=False)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        assert relative(model(input_ids=ids).logits, hf(ids).logits) < 1e-5
    assert generate.main([*arguments, "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert f"note: {note}" in capsys.readouterr().err
    assert export.main([*arguments[:2], "--output", str(tmp_path / "x.gguf")]) == 0
    assert f"note: {note}" in capsys.readouterr().err


def test_values_of_the_wrapper_count_if_the_text_config_has_none(tmp_path):
    outer = {"eos_token_id": [7, 8], "torch_dtype": "bfloat16", "bos_token_id": 3}
    text = {"model_type": "llama", "eos_token_id": None, "bos_token_id": 4}
    raw = {"model_type": "wrapper", "text_config": text, "vocab_size": 9} | outer
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = ModelConfig.from_folder(tmp_path).raw
    assert found["eos_token_id"] == [7, 8] and found["torch_dtype"] == "bfloat16"
    assert found["bos_token_id"] == 4 and found["vocab_size"] == 32000

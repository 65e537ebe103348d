"""An adapter as a GGUF file: llama.cpp computes the trained model from the base and the adapter."""

import warnings

import pytest
import torch
from gguf_files import dequantised, make_tiny_gguf, metadata_of, tensors_of
from referees.llama_cpp import LlamaCpp
from tiny import draw_adapter, make_tiny_model
from tiny_families import make_tiny_family

from minitune import FastLanguageModel, get_chat_template
from minitune.commands.next_commands import after_export
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf import lora_adapter
from minitune.gguf.export import convert_folder
from minitune.gguf.lora_adapter import plan_gguf_adapter, save_gguf_adapter

# case of tiny_families.py -> True for rsLoRA
CASES = {
    "llama": True,
    "qwen3": False,
    "phi3 in part rotated": True,
    "granite tied": False,
    "olmo2": True,
    "gemma3": False,
    "ministral3": True,
}
LENGTHS = (1, 17, 60)  # tokens


def load(folder, r=4, **settings):
    """Return a model with an adapter whose B is not zero, in float32."""
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=128, dtype=torch.float32, device="cpu", load_in_4bit=False
    )
    FastLanguageModel.get_peft_model(model, r=r, lora_alpha=12, **settings)
    draw_adapter(model, b=0.1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_trained_model_from_base_and_adapter(tmp_path, case):
    folder = tmp_path / "m"
    if case == "llama":
        make_tiny_model(folder, dtype=torch.float32, attention_bias=True)
    else:
        make_tiny_family(folder, case)
    model = load(folder, use_rslora=CASES[case])
    ids = torch.randint(3, 400, (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].log_softmax(-1)
        with model.disable_adapter():
            of_base = model(input_ids=ids).logits[0].log_softmax(-1)
    assert (of_base - expected).abs().max() > 0.2  # so an adapter without effect would show
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Phi's window, which is longer than these prompts
        base = convert_folder(folder, tmp_path / "base.gguf", "f32", verify=False)
        adapter = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    llama_cpp = LlamaCpp(base, adapter)
    # Both compute in float32. llama.cpp takes Gemma's GELU from a table in float16.
    tolerance = 5e-3 if case.startswith("gemma") else 1e-4
    for length in LENGTHS:
        found = llama_cpp.next_log_probabilities(ids[0, :length].tolist(), 512)
        assert (found - expected[length - 1]).abs().max() < tolerance, length


def test_the_gguf_file_that_was_trained_on_and_the_adapter_are_the_trained_model(tmp_path):
    base = make_tiny_gguf(tmp_path, "q4_k_m")
    model = load(base, use_rslora=True)
    adapter = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    in_float32 = dequantised(base, tmp_path / "float32.gguf")
    ids = torch.randint(3, 400, (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].log_softmax(-1)
        with model.disable_adapter():
            of_base = model(input_ids=ids).logits[0].log_softmax(-1)
    assert (of_base - expected).abs().max() > 5
    # With blocks of few bits, llama.cpp rounds activations to 8 bits: 0.2 to 0.5.
    for path, tolerance in ((in_float32, 1e-4), (base, 1.0)):
        llama_cpp = LlamaCpp(path, adapter)
        for length in LENGTHS:
            found = llama_cpp.next_log_probabilities(ids[0, :length].tolist(), 512)
            assert (found - expected[length - 1]).abs().max() < tolerance, (path, length)


def test_the_file_holds_the_adapter_in_float32_and_the_keys_of_llama_cpp(tmp_path):
    model = load(make_tiny_model(tmp_path / "base"), r=9, use_rslora=True)
    path = save_gguf_adapter(model, tmp_path / "out")
    assert path.name == "base-minitune-F32-LORA.gguf"
    keys = {key: value for key, value in metadata_of(path).items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "base-minitune",
        "general.base_model.count": 1,
        "general.base_model.0.name": "base",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 36.0,  # 12 * sqrt(9), because llama.cpp divides by 9
    }
    tensors, parameters = tensors_of(path), dict(model.trainable_parameters())
    assert len(tensors) == len(parameters)
    for name, stored in (
        ("self_attn.v_proj.lora_B", "attn_v.weight.lora_b"),
        ("self_attn.q_proj.lora_A", "attn_q.weight.lora_a"),
        ("mlp.down_proj.lora_A", "ffn_down.weight.lora_a"),
    ):
        expected = parameters[f"model.layers.1.{name}.weight"].detach()
        assert torch.equal(torch.from_numpy(tensors[f"blk.1.{stored}"].data.copy()), expected)


def test_a_missing_adapter_an_existing_file_and_a_foreign_layout_are_refused(tmp_path):
    model = load(make_tiny_model(tmp_path / "base"))
    path = save_gguf_adapter(model, tmp_path / "a.gguf")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a\.gguf: exists; remove it"):
        save_gguf_adapter(model, path)
    draw_adapter(model, b=0.2)
    save_gguf_adapter(model, path, overwrite=True)
    assert path.read_bytes() != before
    tied = load(make_tiny_family(tmp_path / "tied", "olmo2 tied"))
    with pytest.raises(ValueError, match="olmo2 has a head that is not the embedding"):
        save_gguf_adapter(tied, tmp_path / "b.gguf")
    plain, _ = FastLanguageModel.from_pretrained(tmp_path / "base", device="cpu")
    with pytest.raises(ValueError, match=r"no adapter .*get_peft_model"):
        save_gguf_adapter(plain, tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_an_adapter_that_was_trained_on_other_weights_than_the_bases_is_warned_of(tmp_path):
    base = make_tiny_gguf(tmp_path, "q8_0")
    plain, path = tmp_path / "plain", tmp_path / "a.gguf"
    for trained_on, served_with, message in (
        ({}, base, None),
        ({}, plain, "the weights of a GGUF file; .*take the file of the training"),
        ({"load_in_4bit": False}, plain, None),
        ({"load_in_4bit": False}, base, "16-bit weights; .*take the 16-bit weights"),
        ({"load_in_4bit": True}, plain, 'NF4 weights; .*merge_base="nf4" answers as in training'),
    ):
        start = plain if trained_on else base
        model, _ = FastLanguageModel.from_pretrained(start, device="cpu", **trained_on)
        FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
        model, _ = FastLanguageModel.from_pretrained(
            served_with, adapter=tmp_path / "adapter", device="cpu", load_in_4bit=False
        )
        warned = pytest.warns(match=message) if message else warnings.catch_warnings()
        with warned:
            if message is None:
                warnings.simplefilter("error")
            save_gguf_adapter(model, path, overwrite=True)


def test_training_beyond_a_window_that_llama_cpp_ignores_is_refused(tmp_path):
    model = load(make_tiny_family(tmp_path / "m", "mistral with a window"))
    model.max_trained_seqlen = 14
    with pytest.warns(match="at most 13"), pytest.raises(ValueError, match="has 14 tokens"):
        save_gguf_adapter(model, tmp_path / "a.gguf")


@pytest.mark.parametrize("damage", ["a value", "the rows of q"])
def test_a_file_that_differs_from_the_adapter_gets_no_name(tmp_path, monkeypatch, damage):
    write_gguf = lora_adapter.write_gguf

    def write_damaged(files, tensors, **settings):
        tensors = [tensor.clone() for tensor in tensors]
        if damage == "a value":
            tensors[-1][0, 0] += 2**-20
        else:
            tensors[1] = tensors[1].flip(0)
        write_gguf(files, tensors, **settings)

    model = load(make_tiny_model(tmp_path / "base"))
    monkeypatch.setattr(lora_adapter, "write_gguf", write_damaged)
    with pytest.raises(ValueError, match=r"a\.gguf: was not written, .* other values"):
        save_gguf_adapter(model, tmp_path / "out" / "a.gguf")
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path):
    model = load(make_tiny_model(tmp_path / "base"))
    with torch.no_grad():
        model.trainable_parameters()[0][1][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight\.lora_a: a weight is nan"):
        save_gguf_adapter(model, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_save_pretrained_gguf_writes_the_adapter_with_save_method_lora(tmp_path):
    model = load(make_tiny_model(tmp_path / "base"))
    expected = save_gguf_adapter(model, tmp_path / "expected.gguf").read_bytes()
    path = model.save_pretrained_gguf(tmp_path / "out", save_method="lora")
    assert path.parent == tmp_path / "out" and path.read_bytes() == expected
    file = tmp_path / "a.gguf"
    for settings, message in (
        ({"quantization_method": "q4_k_m"}, "'q4_k_m': an adapter is written in float32"),
        ({"merge_base": "nf4"}, "merge_base belongs to a merged model"),
        ({"imatrix": "x.gguf"}, "imatrix belongs to a merged model"),
        ({"ollama": True}, r"base is none; export the base .* ollama=True then"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained_gguf(file, save_method="lora", **settings)
    with pytest.raises(ValueError, match="save_method 'x' does not exist"):
        model.save_pretrained_gguf(file, save_method="x")
    with pytest.raises(AttributeError, match="save_method='lora'"):
        model.save_pretrained_ggml(file)
    assert not file.exists()
    assert model.save_pretrained_gguf(file, quantization_method="f32", save_method="lora") == file


def test_an_assigned_chat_template_is_written_beside_the_adapter(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    model, tokenizer = load(folder), Tokenizer.from_folder(folder)
    save_gguf_adapter(model, tmp_path / "plain" / "a.gguf", tokenizer)
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["a.gguf"]
    tokenizer = get_chat_template(tokenizer, "chatml")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    plan = plan_gguf_adapter(model, tmp_path / "a.gguf", tokenizer)
    template = tmp_path / "a.jinja"
    assert plan.write() == plan.paths == [tmp_path / "a.gguf", template]
    assert template.read_text(encoding="utf-8") == tokenizer.chat_template["default"]
    shown = after_export("minitune export", plan.paths, plan)
    assert shown.endswith(f"--lora {plan.target} --jinja --chat-template-file {template}")
    with pytest.raises(ValueError, match=r"a\.jinja: exists"):
        plan.target.unlink()
        save_gguf_adapter(model, plan.target, tokenizer)


@pytest.mark.parametrize("beside", [True, False])
def test_the_modelfile_of_an_adapter_begins_with_the_base_that_was_trained_on(tmp_path, beside):
    base = make_tiny_gguf(tmp_path, "q8_0")
    model = load(base)
    target = (tmp_path if beside else tmp_path / "out") / "My Adapter.gguf"
    with pytest.warns(match=r"up to version 0\.34\.0"):
        plan = plan_gguf_adapter(model, target, ollama=True)
    modelfile = target.with_suffix(".Modelfile")
    assert plan.write() == [target, modelfile]
    lines = modelfile.read_text(encoding="utf-8").splitlines()
    start = "./tiny-q8_0.gguf" if beside else str(base)
    assert lines[:2] == [f"FROM {start}", "ADAPTER ./My Adapter.gguf"]
    assert lines[2].startswith('TEMPLATE """') and 'PARAMETER stop "<|im_end|>"' in lines
    shown = after_export("minitune export", plan.paths, plan)
    assert f"llama-server -m {base} --lora '{target}'" in shown
    assert f"ollama create 'my adapter' -f '{modelfile}'" in shown and "note" not in shown


def test_an_adapter_as_a_gguf_file_is_not_taken_for_a_model_or_an_adapter(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    path = save_gguf_adapter(load(folder), tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"a\.gguf: is an adapter; give the file of the model"):
        FastLanguageModel.from_pretrained(path, device="cpu")
    with pytest.raises(ValueError, match=r"a\.gguf is a GGUF file, .*adapter in PEFT's format"):
        FastLanguageModel.from_pretrained(folder, adapter=path, device="cpu")
    with pytest.raises(ValueError, match=r"a\.gguf is a GGUF file, .*adapter in PEFT's format"):
        load(folder).load_adapter(path)

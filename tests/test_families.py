"""Each model family against transformers + PEFT and a plain autograd model."""

import contextlib
import json
import shutil

import pytest
import torch
import transformers
from command_inputs import train, train_arguments, write_inputs
from family_configs import FAMILIES
from plain_llama import PlainLlama
from referees.llama_cpp import LlamaCpp
from tiny_families import make_tiny_family
from transformers_twin import (
    batch,
    clear_gradients,
    compare_with_transformers,
    flat_gradient,
    load,
    loss_and_gradient,
    relative,
)

from minitune import FastLanguageModel
from minitune.checkpoints.merge import merge_to_folder
from minitune.gguf.export import convert_folder

NOT_IN_GGUF = {
    "qwen3 with biases": "qwen3 has no biases in attention",
    "olmo3 with two thetas": "olmo2 has one rope_theta for all layers",
    "olmo2 tied": "olmo2 has a head that is not the embedding",
    "gemma3 untied": "gemma3 has the embedding as its head",
    "gemma3 with a scale": "gemma3 has query_pre_attn_scalar 16, not 40",
}
every_family = pytest.mark.parametrize("case", FAMILIES)


@every_family
def test_loss_logits_and_every_gradient_equal_transformers_and_peft(tmp_path, case):
    folder = make_tiny_family(tmp_path / "m", case)
    model, _ = load(folder)
    compare_with_transformers(model, folder, *batch(model), bound=2e-5)


@every_family
def test_every_gradient_equals_that_of_a_plain_autograd_model_in_float64(tmp_path, case):
    model, _ = load(make_tiny_family(tmp_path / "m", case))
    ids, labels = batch(model)
    loss, gradient = loss_and_gradient(model, input_ids=ids, labels=labels)
    plain = PlainLlama(model, torch.float64)
    exact = plain.loss(list(zip(ids, labels, strict=True)))
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert relative(gradient, torch.cat([p.grad.flatten() for p in plain.adapter.values()])) < 2e-5


def test_gradients_flow_through_capped_logits_as_through_the_loss(tmp_path):
    model, _ = load(make_tiny_family(tmp_path / "m", "gemma2"))
    ids, labels = batch(model)
    _, expected = loss_and_gradient(model, input_ids=ids, labels=labels)
    clear_gradients(model)
    logits = model(input_ids=ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    assert relative(flat_gradient(model), expected) < 1e-5


@every_family
def test_the_merged_folder_and_its_gguf_file_give_the_same_logits_everywhere(tmp_path, case):
    model, tokenizer = load(make_tiny_family(tmp_path / "m", case), load_in_4bit=False)
    merged = tmp_path / "merged"
    merge_to_folder(model, merged, tokenizer)
    again, _ = load(merged, load_in_4bit=False, with_adapter=False)
    hf = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = batch(model, rows=1, length=90)[0]
    with torch.no_grad():
        expected = hf(ids).logits
        assert relative(again(input_ids=ids).logits, expected) < 2e-5
        # A merge rounds the weights to bfloat16.
        assert relative(model(input_ids=ids).logits, expected) < 0.06
    expected = expected[0].log_softmax(-1)
    if case in NOT_IN_GGUF:
        with pytest.raises(ValueError, match=NOT_IN_GGUF[case]):
            convert_folder(merged, tmp_path / "m.gguf", "f16")
        return
    longest = 90
    window = max(kind.window or 0 for kind in model.config.layer_kinds)
    if is_ignored := window and model.config.architecture.gguf.window != "read":
        longest = min(window, 90)
    warned = pytest.warns(match=f"at most {window} tokens")
    with warned if is_ignored else contextlib.nullcontext():
        llama_cpp = LlamaCpp(convert_folder(merged, tmp_path / "m.gguf", "f16"))
    for length in (1, min(17, longest), longest):
        found = llama_cpp.next_log_probabilities(ids[0, :length].tolist(), 512)
        assert (found - expected[length - 1]).abs().max() < 0.05, length


@every_family
def test_the_adapter_is_saved_and_loaded(tmp_path, case):
    folder = make_tiny_family(tmp_path / "m", case)
    model, _ = load(folder)
    ids, _ = batch(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, dtype=torch.float32, device="cpu"
    )
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("targets", ["qkv_proj,down_proj", "v_proj,q_proj,k_proj,down_proj"])
def test_a_run_on_merged_linears_takes_both_names_and_resumes(tmp_path, targets):
    inputs = write_inputs(tmp_path)
    shutil.rmtree(inputs / "model")
    make_tiny_family(inputs / "model", "phi3", seed=1)
    run = tmp_path / "run"
    arguments = train_arguments(inputs, run, "--target-modules", targets, "--save-steps", "1")
    assert train(arguments) == 0
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["down_proj", "qkv_proj"]
    assert train([*arguments, "--max-steps", "3", "--resume"]) == 0

"""The importance matrix that our own forward pass collects."""

import numpy as np
import pytest
import torch
from referees.llama_imatrix import CHUNKS, CONTEXT, GOLDEN, make_seeded_model
from tiny import draw_adapter, make_tiny_model
from tiny_families import make_tiny_family
from transformers_twin import batch, hf_twin, load, loss_and_gradient, relative

from minitune import FastLanguageModel
from minitune.gguf.importance.imatrix_files import read_imatrix
from minitune.gguf.importance.importance import tensor_widths
from minitune.gguf.importance.importance_collection import (
    BATCH_TOKENS,
    collect_importance,
    importance_from_data,
)
from minitune.gguf.model_metadata import gguf_name


def random_samples(vocab, lengths=(37, 5, 61, 1, 20), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def hooked_mean_squares(model, folder, samples):
    """Return the mean squares that forward hooks see in transformers + PEFT, by GGUF name."""
    twin, sums = hf_twin(model, folder), {}

    def add_to(name):
        def hook(_, inputs):
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        return hook

    for name, _ in model.linears():
        key = gguf_name(f"{name}.weight", model.config.architecture)
        twin.get_submodule(f"base_model.model.{name}").register_forward_pre_hook(add_to(key))
    with torch.no_grad():
        for ids in samples:
            twin(input_ids=torch.tensor([ids]))
    return {name: total / sum(map(len, samples)) for name, total in sums.items()}


def make_model(folder, family):
    return make_tiny_model(folder) if family == "llama" else make_tiny_family(folder, family)


@pytest.mark.parametrize(
    ("family", "load_in_4bit"),
    [("llama", True), ("llama", False), ("phi3", False), ("gemma3", False), ("olmo2", True)],
)
def test_the_importance_is_the_mean_square_of_each_linears_inputs_with_the_adapter(
    tmp_path, family, load_in_4bit
):
    folder = make_model(tmp_path / "base", family)
    model, _ = load(folder, load_in_4bit=load_in_4bit)
    samples = random_samples(model.config.vocab_size)
    matrix = collect_importance(model, samples, dataset="data.jsonl")
    expected = hooked_mean_squares(model, folder, samples)
    assert matrix.values.keys() == expected.keys()
    for name, values in matrix.values.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-4, atol=1e-9)
    assert matrix.check_model(model.config) == []
    assert (matrix.tokens, matrix.chunks, matrix.dataset) == (124, 1, "data.jsonl")


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_the_importance_equals_that_of_llama_imatrix_on_the_same_tokens(tmp_path, form):
    golden = np.load(GOLDEN)
    path = tmp_path / f"imatrix.{form}"
    path.write_bytes(golden[form].tobytes())
    expected = read_imatrix(path)
    assert (expected.chunks, expected.dataset) == (CHUNKS, "calibration.txt")
    folder = make_seeded_model(tmp_path / "base")
    model, _ = load(folder, load_in_4bit=False, with_adapter=False)
    matrix = collect_importance(model, golden["ids"].reshape(CHUNKS, CONTEXT))
    assert matrix.values.keys() == expected.values.keys()
    for name, values in expected.values.items():
        # llama.cpp rounds the keys and values of attention to float16.
        assert relative(matrix.values[name], values) < 1e-3


def test_an_adapter_changes_the_importance(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    samples = random_samples(512)
    with_adapter = collect_importance(load(folder)[0], samples)
    without = collect_importance(load(folder, with_adapter=False)[0], samples)
    name = "blk.1.ffn_down.weight"
    assert relative(with_adapter.values[name], without.values[name]) > 0.01


def test_fused_linears_are_named_as_in_the_file_and_the_head_is_left_out(tmp_path):
    model, _ = load(make_tiny_family(tmp_path / "base", "phi3"))
    matrix = collect_importance(model, random_samples(512))
    layer = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    assert matrix.values.keys() == {f"blk.{i}.{name}.weight" for i in range(2) for name in layer}
    assert {"output.weight", "token_embd.weight"} < tensor_widths(model.config).keys()


def test_the_result_does_not_depend_on_the_batches(tmp_path, monkeypatch):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    samples = random_samples(512, [150] * 20)
    assert sum(map(len, samples)) > BATCH_TOKENS
    whole = collect_importance(model, samples)
    monkeypatch.setattr("minitune.gguf.importance.importance_collection.BATCH_TOKENS", 100)
    single = collect_importance(model, samples)
    assert whole.tokens == single.tokens == 3000
    for name, values in whole.values.items():
        torch.testing.assert_close(values, single.values[name], rtol=1e-5, atol=1e-9)


def test_the_limit_cuts_the_sample_that_reaches_it(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    samples = random_samples(512, (30, 40, 50))
    limited = collect_importance(model, samples, max_tokens=45)
    cut = collect_importance(model, [samples[0], samples[1][:15]])
    assert limited.tokens == 45
    assert all(torch.equal(limited.values[name], values) for name, values in cut.values.items())


def test_a_limit_uses_samples_from_all_over_the_data(tmp_path, monkeypatch):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    used = []
    monkeypatch.setattr(
        "minitune.gguf.importance.importance_collection.collect_importance",
        lambda model, samples, *_: used.append([tuple(ids) for ids in samples]),
    )
    records = [{"text": f"lamp number {i}"} for i in range(40)]
    importance_from_data(model, tokenizer, records)
    importance_from_data(model, tokenizer, records, max_tokens=100)
    importance_from_data(model, tokenizer, records, max_tokens=100)
    whole, limited, again = used
    assert limited == again != whole
    assert set(limited) == set(whole)
    assert {whole.index(ids) // 20 for ids in limited[:10]} == {0, 1}


def test_collecting_changes_no_bit_of_a_later_step(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    ids, labels = batch(model)
    loss, gradient = loss_and_gradient(model, input_ids=ids, labels=labels)
    collect_importance(model, random_samples(512))
    again, same_gradient = loss_and_gradient(model, input_ids=ids, labels=labels)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, same_gradient)


@pytest.mark.parametrize(
    ("samples", "limit", "message"),
    [
        ([], 100, "data.jsonl: no token to collect an importance from"),
        ([[3, 4]], 0, "max_tokens is 0; expected at least 1"),
        ([[3, 600]], 100, "input_ids reach 600, but the vocabulary has 512 rows"),
        ([[3] * 300], 1000, "a sample has 300 tokens, but the model was loaded for 256"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(tmp_path, samples, limit, message):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    with pytest.raises(ValueError, match=message):
        collect_importance(model, samples, "data.jsonl", limit)


def test_activations_that_are_not_finite_are_refused(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"blk\.1\.attn_q\.weight has values that are not finite"):
        collect_importance(model, random_samples(512), "data.jsonl")


@pytest.mark.gpu
def test_a_gpu_collects_the_importance_that_the_cpu_collects(tmp_path):
    folder = make_tiny_model(tmp_path / "base", hidden=256, heads=4, ffn=704)
    samples = random_samples(512)
    expected = collect_importance(load(folder)[0], samples)
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=256, device="cuda")
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=12)
    draw_adapter(model, b=0.1)
    found = collect_importance(model, samples)
    assert found.values.keys() == expected.values.keys()
    for name, values in expected.values.items():
        assert relative(found.values[name], values) < 0.02  # bfloat16

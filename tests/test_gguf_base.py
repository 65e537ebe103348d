"""A GGUF file as the base: what is trained is what llama.cpp serves from the file."""

import shutil
import warnings

import pytest
import torch
from gguf_files import make_tiny_gguf
from micro_step_checks import assert_same_bits, random_samples, results
from tiny import draw_adapter
from tiny_families import make_tiny_family
from transformers_twin import batch, compare_with_transformers, flat_gradient, load, relative

from minitune import FastLanguageModel
from minitune.checkpoints.find_model import find_model
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.training_config import GGUF_METHODS
from minitune.data.batching import collate
from minitune.gguf.base.load import open_base
from minitune.gguf.export import convert_folder, export_gguf
from minitune.gguf.lora_adapter import save_gguf_adapter
from minitune.model.quantized_weight import set_frozen_weight
from minitune.training.micro_step import MicroStep

WIDE = {"hidden": 256, "ffn": 512, "layers": 3}


def dense_twin(path):
    """Return a model of a GGUF file whose weights are dequantised, float32."""
    model, _ = load(path)
    _, weights = open_base(path)
    for name in model.config.tensor_shapes():
        module_name, _, kind = name.rpartition(".")
        if kind == "weight":
            set_frozen_weight(model.get_submodule(module_name), weights.load(name))
    if model.config.tie_word_embeddings:
        set_frozen_weight(model.lm_head, weights.load("model.embed_tokens.weight"))
    return model


@pytest.mark.parametrize("method", ["q4_k_m", "q8_0", "q3_k_m"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_gradients_equal_transformers_and_peft_on_the_dequantised_weights(tmp_path, method, tie):
    path = make_tiny_gguf(tmp_path, method, tie=tie, layers=3)
    model, _ = load(path)
    assert model.gguf == path and len(model.weight_formats) > (method != "q8_0")
    assert (model.lm_head.quantized is model.model.embed_tokens.quantized) == tie
    compare_with_transformers(model, tmp_path / "plain", *batch(model), bound=2e-5)


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "phi3 in part rotated", "granite", "gemma2", "gemma3", "olmo2"]
)
def test_a_family_in_a_gguf_file_trains_as_in_transformers(tmp_path, family):
    folder = make_tiny_family(tmp_path / "plain", family)
    path = convert_folder(folder, tmp_path / "base.gguf", "q8_0", verify=False)
    model, _ = load(path)
    assert model.weight_formats == ("Q8_0",)
    compare_with_transformers(model, folder, *batch(model), bound=1e-4)


def test_smollm2_on_its_own_file_trains_as_in_transformers(smollm2_gguf, smollm2):
    model, tokenizer = load(smollm2_gguf)
    assert model.weight_formats == ("Q4_1",) and model.lm_head.quantized.format == "Q8_0"
    ids = torch.tensor([tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 4)])
    compare_with_transformers(model, smollm2, ids, ids, bound=1e-4)


@pytest.mark.parametrize("method", [m for m in GGUF_METHODS if not m.startswith("q8")])
def test_every_type_of_file_computes_with_its_dequantised_weights_to_the_bit(tmp_path, method):
    path = make_tiny_gguf(tmp_path, method)
    model, dense = load(path)[0], dense_twin(path)
    ids, labels = batch(model)
    for twin in (model, dense):
        twin(input_ids=ids, labels=labels).loss.backward()
    for (name, p), (_, other) in zip(
        model.trainable_parameters(), dense.trainable_parameters(), strict=True
    ):
        assert torch.equal(p.grad, other.grad), name
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)


def test_answers_are_those_of_the_dequantised_model_with_and_without_resident_weights(tmp_path):
    path = make_tiny_gguf(tmp_path, "q4_k_m", tie=False)
    model, prompts = load(path)[0], [[5, 9, 30], [7, 8]]
    answers = model.generate(prompts, max_new_tokens=12)
    assert answers == dense_twin(path).generate(prompts, max_new_tokens=12)
    model.resident_weights_if_they_fit = lambda: model.as_current_device()
    assert model.generate(prompts, max_new_tokens=12) == answers


def test_a_merge_adds_the_adapter_to_the_weights_of_the_file_in_float32(tmp_path):
    path = make_tiny_gguf(tmp_path, "q4_k_m", tie=False)
    model, tokenizer = load(path)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    _, weights = open_base(path)
    merged = SafetensorsFolder(tmp_path / "merged")
    linears = dict(model.linears())
    for name, shape in model.config.tensor_shapes().items():
        expected = weights.load(name)
        if linear := linears.get(name.removesuffix(".weight")):
            A, B = linear.adapter()
            expected = expected + linear.scaling * B @ A
        found = merged.load(name, shape)
        assert torch.allclose(found.float(), expected, rtol=2**-8, atol=1e-8), name
        assert found.dtype == torch.bfloat16
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "merged", load_in_4bit=False)
    ids, _ = batch(model)
    with torch.no_grad():
        assert relative(again(ids).logits, model(ids).logits) < 0.03
    for base in ("original", "nf4"):
        with pytest.raises(ValueError, match=r"tiny-q4_k_m.gguf; merge_base must be 'auto'"):
            model.save_pretrained_merged(tmp_path / "b", tokenizer, merge_base=base)


def test_an_export_of_a_gguf_base_is_named_after_the_file(tmp_path):
    model, tokenizer = load(make_tiny_gguf(tmp_path, "q4_k_m"))
    model.save_pretrained(tmp_path / "adapter")
    path = model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q8_0")
    assert path.name == "tiny-minitune-Q8_0.gguf"
    again, _ = load(path, with_adapter=False)
    ids, _ = batch(model)
    with torch.no_grad():
        assert relative(again(ids).logits, model(ids).logits) < 0.05


def test_an_adapter_names_the_file_and_finds_it_again(tmp_path):
    path = make_tiny_gguf(tmp_path, "q4_1")
    model, _ = load(path)
    model.save_pretrained(tmp_path / "adapter")
    source = find_model(tmp_path / "adapter")
    assert source.base == path and source.adapter == tmp_path / "adapter"
    again, _ = load(tmp_path / "adapter", with_adapter=False)
    assert again.gguf == path
    ids, _ = batch(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_link_in_hugging_faces_cache_keeps_its_name(tmp_path):
    blob, link = tmp_path / "blobs" / "0a1b", tmp_path / "snapshots" / "tiny-Q8_0.GGUF"
    blob.parent.mkdir()
    link.parent.mkdir()
    make_tiny_gguf(tmp_path, "q8_0").rename(blob)
    link.symlink_to(blob)
    model, tokenizer = load(link)
    model.save_pretrained(tmp_path / "adapter")
    assert find_model(tmp_path / "adapter").base == link
    path = model.save_pretrained_gguf(blob.parent, tokenizer, save_method="lora", ollama=True)
    assert path == blob.with_name("tiny-minitune-F32-LORA.gguf")
    assert path.with_suffix(".Modelfile").read_text().startswith(f"FROM {link}\n")
    with pytest.raises(
        ValueError, match=r"is a file; .* or a GGUF file, whose name ends in \.gguf"
    ):
        find_model(blob)


def test_no_export_replaces_the_file_of_the_base(tmp_path):
    path = make_tiny_gguf(tmp_path, "q8_0")
    model, tokenizer = load(path)
    for write in (save_gguf_adapter, export_gguf):
        with pytest.raises(ValueError, match="is the base model's own file"):
            write(model, path, tokenizer, overwrite=True)


def test_a_tokenizer_whose_folder_is_gone_is_not_saved_without_its_files(tmp_path):
    model, tokenizer = load(make_tiny_gguf(tmp_path, "q8_0"))
    shutil.rmtree(model.folder)
    with pytest.raises(ValueError, match="was removed meanwhile; load the model again"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_a_file_that_it_was_not_trained_on_gets_a_warning(tmp_path):
    first, second = (make_tiny_gguf(tmp_path / name, name) for name in ("q4_1", "q8_0"))
    model, _ = load(first)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path / "adapter")
    other, _ = load(second, with_adapter=False)
    with pytest.warns(UserWarning, match=r"trained on .*tiny-q4_1.gguf, and the model is .*q8_0"):
        other.load_adapter(tmp_path / "adapter")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["q4_k_m", "q8_0", "iq4_xs", "q2_k"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_gpu_trains_in_graphs_on_a_file_as_a_cpu_does(tmp_path, method, tie):
    path = make_tiny_gguf(tmp_path, method, tie=tie, **WIDE)
    found = []
    for device in ("cpu", "cuda"):
        model = load_on(path, torch.float32, device)
        ids, labels = batch(model)
        model(input_ids=ids, labels=labels).loss.backward()
        found.append(flat_gradient(model).cpu())
    assert relative(found[1], found[0]) < 1e-4
    model = load_on(path, torch.bfloat16, "cuda")
    # 256 rows, a size that graphs have: cuBLAS may sum a padded step in another order.
    steps = [collate(random_samples([40, 200, 16], model.config.vocab_size))] * 2
    eager, replayed = (results(MicroStep(model, capture=x), steps) for x in (False, True))
    assert_same_bits(replayed, eager)


@pytest.mark.gpu
def test_a_gpu_reads_an_embedding_of_few_bits_from_pinned_memory(tmp_path):
    path = make_tiny_gguf(tmp_path, "q4_k_m", tie=False, **WIDE)
    ids = torch.arange(3, 40)[None]
    logits = []
    for offload in (False, True):
        model = load_on(path, torch.bfloat16, "cuda", offload_embedding=offload)
        assert model.model.embed_tokens.table.is_cuda != offload
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def load_on(path, dtype, device, **options):
    model, _ = FastLanguageModel.from_pretrained(
        path, max_seq_length=256, dtype=dtype, device=device, **options
    )
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=12)
    draw_adapter(model, b=0.1)
    return model

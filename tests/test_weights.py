"""Loading: bitsandbytes' weights come in bit for bit, shards like one file, ids from the cache."""

import json

import pytest
import torch
from gguf_files import tensors_of
from safetensors.torch import load_file
from tiny import make_tiny_model
from weight_folders import SKIPPED, edit_tensors, load, write_bitsandbytes

from minitune import FastLanguageModel, Tokenizer
from minitune.checkpoints.merge import merge_to_folder
from minitune.checkpoints.resolve_model import resolve_model
from minitune.gguf.export import convert_folder


def replace_linears(hf, model):
    """Give a transformers model our dequantised weights in plain linears."""
    for name, linear in model.linears():
        module = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        module.weight.data = linear.weight_as(torch.float32)
        parent, child = name.rsplit(".", 1)
        setattr(hf.get_submodule(parent), child, module)


def training_losses(model, ids, steps=5):
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"skip": ["lm_head", *SKIPPED]}],
    ids=["nested scales", "plain scales", "skipped modules"],
)
def test_a_folder_written_by_bitsandbytes_loads_bit_for_bit_and_trains(tmp_path, options):
    functional = pytest.importorskip("bitsandbytes.functional")
    source = make_tiny_model(tmp_path / "base", tie=False)
    hf = write_bitsandbytes(source, tmp_path / "bnb", **options)
    skipped = options.get("skip", ())
    model = load(tmp_path / "bnb")
    quantized = 0
    for name, linear in model.linears():
        theirs = hf.get_submodule(name).weight
        assert linear.is_quantized == (name not in skipped), name
        if linear.is_quantized:
            quantized += 1
            assert torch.equal(linear.quantized.packed, theirs.data.view(-1))
            assert torch.equal(linear.quantized.absmax, theirs.quant_state.absmax)
            theirs = functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(linear.weight_as(torch.float32), theirs.float()), name
    assert quantized == 14 - len([name for name in skipped if name in SKIPPED])
    ids = torch.randint(3, 400, (1, 23), generator=torch.Generator().manual_seed(0))
    # bitsandbytes' own 4-bit matmul on a CPU is 1.4% off in float32 (0.50.2)
    replace_linears(hf, model)
    expected = hf(input_ids=ids).logits
    assert ((model(input_ids=ids).logits - expected).norm() / expected.norm()) < 1e-5
    FastLanguageModel.get_peft_model(model, r=4)
    losses = training_losses(model, ids)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nf4_codes_stored_in_another_dtype_are_the_same_bytes(tmp_path, dtype):
    source = make_tiny_model(tmp_path / "base", tie=False)
    write_bitsandbytes(source, tmp_path / "bytes")
    write_bitsandbytes(source, tmp_path / "other", bnb_4bit_quant_storage=dtype)
    packed = load_file(tmp_path / "other" / "model.safetensors")
    assert packed["model.layers.0.self_attn.q_proj.weight"].dtype == dtype
    found, expected = load(tmp_path / "other"), load(tmp_path / "bytes")
    for (name, linear), (_, other) in zip(found.linears(), expected.linears(), strict=True):
        assert torch.equal(linear.weight_as(torch.float32), other.weight_as(torch.float32)), name


def test_sixteen_bit_weights_stay_as_stored_on_request(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"), load_in_4bit=False)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for name, linear in model.linears():
        assert not linear.is_quantized and torch.equal(linear.weight, stored[f"{name}.weight"])


def test_shards_load_like_one_file(tmp_path):
    one = load(make_tiny_model(tmp_path / "one", tie=False))
    three = load(make_tiny_model(tmp_path / "three", tie=False, shards=3))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(one(input_ids=ids).logits, three(input_ids=ids).logits)


def test_a_head_that_differs_from_the_embedding_counts_although_the_config_ties_them(tmp_path):
    folder = make_tiny_model(tmp_path / "m", tie=True)
    ids = torch.arange(3, 20)[None]
    tied = load(folder, load_in_4bit=False)(input_ids=ids).logits
    head = "lm_head.weight"
    edit_tensors(folder, lambda t: t.update({head: t["model.embed_tokens.weight"].clone()}))
    same = load(folder, load_in_4bit=False)
    assert same.config.tie_word_embeddings
    assert torch.equal(same(input_ids=ids).logits, tied)

    edit_tensors(folder, lambda t: t.update({head: t[head].flip(0)}))
    model = load(folder, load_in_4bit=False)
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = hf(ids).logits.detach()
    assert (model(input_ids=ids).logits - expected).norm() / expected.norm() < 1e-5
    tokenizer = Tokenizer.from_folder(folder)
    merged = merge_to_folder(model, tmp_path / "merged", tokenizer)
    again = load(merged, load_in_4bit=False)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    direct = model.save_pretrained_gguf(tmp_path / "x.gguf", tokenizer, "f16")
    converted = convert_folder(folder, tmp_path / "y.gguf", "f16")
    assert "output.weight" in tensors_of(direct) and "output.weight" in tensors_of(converted)


def test_an_index_may_list_tensors_that_no_model_needs(tmp_path):
    folder = make_tiny_model(tmp_path / "m", tie=True, shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = "model-00001-of-00003.safetensors"
    index["weight_map"] |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": shard,
        "lm_head.weight": shard,
    }
    path.write_text(json.dumps(index))
    ids = torch.arange(3, 20)[None]
    expected = load(make_tiny_model(tmp_path / "one", tie=True))(input_ids=ids).logits
    assert torch.equal(load(folder)(input_ids=ids).logits, expected)


CACHES = {  # environment variable -> the cache below it
    "HF_HUB_CACHE": "",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "huggingface/hub",
    "HOME": ".cache/huggingface/hub",
}


@pytest.mark.parametrize("variable", CACHES)
def test_an_id_is_found_in_the_local_cache(tmp_path, monkeypatch, variable):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    entry = tmp_path / CACHES[variable] / "models--some--llama"
    snapshot = make_tiny_model(entry / "snapshots" / "abc123")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc123\n")
    assert resolve_model("some/llama") == snapshot
    message = r"model some/other is neither a folder nor in the local cache .*hf download"
    with pytest.raises(ValueError, match=message):
        resolve_model("some/other")


def test_an_adapter_or_another_file_beside_the_weights_does_not_disturb_them(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    ids = torch.arange(3, 20)[None]
    expected = load(folder)(input_ids=ids).logits
    other = make_tiny_model(tmp_path / "other", seed=1) / "model.safetensors"
    for name in ("model_old.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(other.read_bytes())
    assert torch.equal(load(folder)(input_ids=ids).logits, expected)


# A case named "gpu" would carry the mark `gpu` and be skipped, so the names have a prefix.
@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"], ids="device {}".format)
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match="device"):
        FastLanguageModel.from_pretrained(make_tiny_model(tmp_path / "m"), device=device)


def test_a_context_shorter_than_the_default_is_taken_as_it_is(tmp_path):
    model, _ = FastLanguageModel.from_pretrained(make_tiny_model(tmp_path / "m"), device="cpu")
    assert model.max_seq_length == 256


def test_a_missing_folder_and_too_long_a_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    folder = make_tiny_model(tmp_path / "m")
    message = "max_seq_length 512 is not within the model's 256 positions"
    with pytest.raises(ValueError, match=message):
        FastLanguageModel.from_pretrained(folder, max_seq_length=512, device="cpu")

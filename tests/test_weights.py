"""Loading: what bitsandbytes wrote comes in bit for bit, the cache is searched offline, broken folders are named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.checkpoints.safetensors_folder import SafetensorsFolder, resolve_model


def load(folder, **kwargs):
    return FastLanguageModel.from_pretrained(
        folder, max_seq_length=64, dtype=torch.float32, device="cpu", **kwargs
    )[0]


def write_bitsandbytes(source, folder, double_quant=True, skip=None, quant_type="nf4"):
    """`source` quantised and written by transformers + bitsandbytes; returns their model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=config,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="eager",
    )
    hf.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((source / file).read_bytes())
    return hf


SKIPPED = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")


@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"skip": ["lm_head", *SKIPPED]}],
    ids=["nested scales", "plain scales", "skipped modules"],
)
def test_a_folder_written_by_bitsandbytes_loads_bit_for_bit_and_trains(tmp_path, options):
    functional = pytest.importorskip("bitsandbytes.functional")
    source = make_tiny_model(tmp_path / "base", tie=False)
    hf = write_bitsandbytes(source, tmp_path / "bnb", **options)
    model = load(tmp_path / "bnb")
    quantized = 0
    for name, linear in model.linears():
        theirs = hf.get_submodule(name).weight
        assert linear.is_quantized == (name not in options.get("skip", ())), name
        if linear.is_quantized:
            quantized += 1
            assert torch.equal(linear.nf4.packed, theirs.data.view(-1))
            assert torch.equal(linear.nf4.absmax, theirs.quant_state.absmax)
            theirs = functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(linear.weight_as(torch.float32), theirs.float()), name
    assert quantized == 14 - len([name for name in options.get("skip", ()) if name in SKIPPED])
    ids = torch.randint(3, 400, (1, 23), generator=torch.Generator().manual_seed(0))
    # their logits over their dequantised weights: their own 4-bit matmul on a CPU is 1.4% off in float32 (0.50.2)
    for name, linear in model.linears():
        module = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
        module.weight.data = linear.weight_as(torch.float32)
        parent, child = name.rsplit(".", 1)
        setattr(hf.get_submodule(parent), child, module)
    expected = hf(input_ids=ids).logits
    assert ((model(input_ids=ids).logits - expected).norm() / expected.norm()) < 1e-5
    FastLanguageModel.get_peft_model(model, r=4)
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_other_quantisations_are_refused_by_name(tmp_path):
    source = make_tiny_model(tmp_path / "base")
    cases = {
        "FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "8-bit": {"load_in_8bit": True},
        "gptq": {"quant_method": "gptq", "bits": 4},
    }
    config = json.loads((source / "config.json").read_text())
    for name, quantization in cases.items():
        (source / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
        with pytest.raises(ValueError, match=f"quantised with .*{name}"):
            load(source)


def test_an_fp4_linear_is_refused_even_where_config_says_nothing(tmp_path):
    source = make_tiny_model(tmp_path / "base", tie=False)
    write_bitsandbytes(source, tmp_path / "bnb", quant_type="fp4")
    (tmp_path / "bnb" / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match="q_proj is quantised as FP4; only NF4 is read"):
        load(tmp_path / "bnb")


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


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_an_id_is_found_in_the_local_cache(tmp_path, monkeypatch, variable):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    below = {
        "HF_HUB_CACHE": "",
        "HF_HOME": "hub",
        "XDG_CACHE_HOME": "huggingface/hub",
        "HOME": ".cache/huggingface/hub",
    }
    entry = tmp_path / below[variable] / "models--some--llama"
    snapshot = make_tiny_model(entry / "snapshots" / "abc123")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc123\n")
    assert resolve_model("some/llama") == snapshot
    with pytest.raises(
        ValueError,
        match=r"model some/other is neither a folder nor in the local cache .*hf download",
    ):
        resolve_model("some/other")


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"model\.safetensors: truncated or not a safetensors file"


def shard_missing(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    return r"index\.json: names the shard model-00002-of-00003\.safetensors, which is not in the folder"


def not_in_index(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    return r"model-00003-of-00003\.safetensors: holds model\.norm\.weight, which is missing from"


def index_names_more(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    return (
        r"says that model-00001-of-00003\.safetensors holds model\.extra\.weight, but it does not"
    )


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(folder):
    edit(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 128)}))
    return r"up_proj\.weight has shape \(64, 128\), config\.json asks for \(128, 64\)"


def tensor_missing(folder):
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    return r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"


def foreign_tensor(folder):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(16)}))
    return r"model\.layers\.0\.self_attn\.q_norm\.weight has no place in the model"


def integers(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}))
    return r"model\.norm\.weight is I32; weights are F32, F16 or BF16"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return r"holds no \*\.safetensors"


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    return r"is an adapter; load the model it was trained on"


def no_config(folder):
    (folder / "config.json").unlink()
    return r"config\.json: not found"


def other_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    return r"config\.json: model_type 'gemma' is not supported"


def other_rope(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_scaling": {"rope_type": "yarn", "factor": 4}})
    )
    return r"rope scaling 'yarn' is not supported"


def bias_missing(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    return r"holds no tensor model\.layers\.0\.self_attn\.q_proj\.bias"


def bias_unexpected(folder):
    edit(folder, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}))
    return r"model\.layers\.1\.self_attn\.q_proj\.bias has no place in the model"


def two_files(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    return r"model\.\S+ is in both a\.safetensors and b\.safetensors"


def odd_width(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"intermediate_size": 130, "hidden_size": 40, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    rows = {"q_proj": (64, 40), "k_proj": (32, 40), "v_proj": (32, 40), "o_proj": (40, 64)}
    rows |= {"gate_proj": (130, 40), "up_proj": (130, 40), "down_proj": (40, 130)}

    def shrink(tensors):
        for name, t in tensors.items():
            kind = name.split(".")[-2]
            tensors[name] = torch.zeros(rows.get(kind, (512, 40) if t.dim() == 2 else (40,)))

    edit(folder, shrink)
    return r"gate_proj\.weight has shape \(130, 40\), which NF4 cannot divide into blocks of 64"


def small_embedding(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    return "tokenizer"


@pytest.mark.parametrize(
    "damage",
    [truncated, wrong_shape, tensor_missing, foreign_tensor, integers, no_weights, no_config, other_family, other_rope,
     small_embedding, adapter, bias_missing, bias_unexpected, two_files, odd_width],
)  # fmt: skip
def test_a_broken_folder_is_refused_by_name(tmp_path, damage):
    folder = make_tiny_model(tmp_path / "m")
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


CONFIGS = {
    "holds a list, not an object": [],
    "num_attention_heads is 0; expected a whole number above 0": {"num_attention_heads": 0},
    "vocab_size is True; expected a whole number": {"vocab_size": True},
    "head_dim is '16'; expected a whole number": {"head_dim": "16"},
    "head_dim 20 is not supported; attention takes multiples of 8": {"head_dim": 20},
    "rms_norm_eps is '1e-5'; expected a number": {"rms_norm_eps": "1e-5"},
    "tie_word_embeddings is 'false'; expected true or false": {"tie_word_embeddings": "false"},
    "rope_scaling is 'linear'; expected an object": {"rope_scaling": "linear"},
    "factor is missing": {"rope_scaling": {"rope_type": "linear", "factor": None}},
    "4 is not a multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
    "quantization_config is \\['nf4'\\]; expected an object": {"quantization_config": ["nf4"]},
    "sliding_window 4096 is not supported": {"sliding_window": 4096},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_is_no_llamas_is_refused_by_field(tmp_path, message):
    folder, change = make_tiny_model(tmp_path / "m"), CONFIGS[message]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | change if isinstance(change, dict) else change)
    )
    with pytest.raises(ValueError, match=message):
        load(folder)


STATES = [{"blocksize": 0}, {"nested_offset": None}, {"nested_blocksize": 0}, {"shape": 64}]


@pytest.mark.parametrize("change", STATES, ids=str)
def test_a_broken_state_of_a_quantised_linear_is_named(tmp_path, change):
    source = make_tiny_model(tmp_path / "base", tie=False)
    write_bitsandbytes(source, tmp_path / "bnb")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"

    def damage(tensors):
        state = json.loads(bytes(tensors[name].tolist())) | change
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit(tmp_path / "bnb", damage)
    with pytest.raises(ValueError, match=f"{name} is not the JSON that bitsandbytes writes"):
        load(tmp_path / "bnb")


def test_an_adapter_or_another_file_beside_the_weights_does_not_disturb_them(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    ids = torch.arange(3, 20)[None]
    expected = load(folder)(input_ids=ids).logits
    make_tiny_model(tmp_path / "other", seed=1)
    (tmp_path / "other" / "model.safetensors").rename(folder / "model_old.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(
        (folder / "model_old.safetensors").read_bytes()
    )
    assert torch.equal(load(folder)(input_ids=ids).logits, expected)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    with pytest.raises(ValueError, match="device"):
        FastLanguageModel.from_pretrained(make_tiny_model(tmp_path / "m"), device=device)


def test_a_context_shorter_than_the_default_is_taken_as_it_is(tmp_path):
    model, _ = FastLanguageModel.from_pretrained(make_tiny_model(tmp_path / "m"), device="cpu")
    assert model.max_seq_length == 256


@pytest.mark.parametrize("damage", [shard_missing, not_in_index, index_names_more])
def test_a_broken_index_is_refused_by_name(tmp_path, damage):
    folder = make_tiny_model(tmp_path / "m", shards=3)
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(folder)


def test_a_missing_folder_and_too_long_a_context_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    folder = make_tiny_model(tmp_path / "m")
    with pytest.raises(
        ValueError, match="max_seq_length 512 is not within the model's 256 positions"
    ):
        FastLanguageModel.from_pretrained(folder, max_seq_length=512, device="cpu")

"""Adapters go to PEFT and come back; checkpoints restore a run; unsupported ones are refused."""

import json
import os

import pytest
import torch
from full_disk import files_limited_to
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.checkpoints.adapter import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    load_adapter_values,
    save_adapter,
)
from minitune.training.checkpoint import STATE, load_checkpoint, save_checkpoint
from minitune.training.optimizer import FlatAdamW

IDS = torch.tensor([[5, 17, 300, 42, 7, 7, 260, 99, 3]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def base(folder):
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=64, dtype=torch.float32, load_in_4bit=False, device="cpu"
    )
    return model


def adapted(folder, r=4, **options):
    """Return a model whose adapter changes it: B is drawn at random."""
    model = FastLanguageModel.get_peft_model(base(folder), r=r, **options)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.trainable_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=generator)
    return model


def new_optimizer(model):
    return FlatAdamW([p for _, p in model.trainable_parameters()])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def hugging_face_base(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 8},
        {"target_modules": ["q_proj", "down_proj"], "r": 2},
    ],
)
def test_peft_computes_the_same_logits_with_our_adapter(tiny, tmp_path, options):
    peft = pytest.importorskip("peft")
    model = adapted(tiny, **options)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hugging_face_base(tiny), tmp_path / "adapter")
    expected = logits(theirs)
    error = (logits(model) - expected).norm() / expected.norm()
    effect = (logits(base(tiny)) - expected).norm() / expected.norm()
    assert error < 1e-5 and effect > 1e-2


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapter_that_peft_wrote_computes_the_same_logits_here(tiny, tmp_path, use_rslora):
    peft = pytest.importorskip("peft")
    targets = ["k_proj", "v_proj", "gate_proj"]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=use_rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(hugging_face_base(tiny), config)
    theirs.save_pretrained(tmp_path)
    model = base(tiny)
    model.load_adapter(tmp_path)
    assert model.lora.r == 3 and set(model.lora.target_modules) == set(targets)
    expected = logits(theirs)
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()


def test_saved_adapter_comes_back_bit_for_bit_into_a_bare_and_into_an_adapted_model(tiny, tmp_path):
    model = adapted(tiny)
    save_adapter(model, tmp_path / "a")
    for other in (base(tiny), FastLanguageModel.get_peft_model(base(tiny), r=4)):
        load_adapter(other, tmp_path / "a")
        pairs = zip(model.trainable_parameters(), other.trainable_parameters(), strict=True)
        for (name, p), (_, q) in pairs:
            assert torch.equal(p, q), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "'pissa' altered the base weights"),
        ({"r": 8}, r"has shape \(4, 64\), but rank and model need \(8, 64\)"),
        ({"lora_alpha": 99}, "lora_alpha is 99, but the model's adapter has 16"),
        ({"use_rslora": True}, "use_rslora is True, but the model's adapter has False"),
        ({"r": 0}, "adapter_config.json: r is 0"),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha is None; expected a number"),
        ({"lora_alpha": "16"}, "adapter_config.json: lora_alpha is '16'; expected a number"),
        ({"use_rslora": "no"}, "adapter_config.json: use_rslora is 'no'; expected true or false"),
    ],
)
def test_adapter_configurations_that_are_not_supported_are_refused_by_name(
    tiny, tmp_path, change, message
):
    model = adapted(tiny)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter_values(model, tmp_path)


def test_adapter_files_that_do_not_fit_are_refused_and_the_model_is_unchanged(tiny, tmp_path):
    model = adapted(tiny)
    save_adapter(model, tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    first = min(whole)
    beyond = first.replace("layers.0", "layers.9")
    broken = {
        f"lacks {first}": {name: t for name, t in whole.items() if name != first},
        "holds .*layers.9.*no place": whole | {beyond: whole[first].clone()},
        "has shape": whole | {first: whole[first][:-1].contiguous()},
        "not a LoRA matrix": whole | {"base_model.model.lm_head.weight": torch.zeros(2, 2)},
        "holds no LoRA matrix": {},
        "adapts lm_head": whole | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 2)},
    }
    for message, tensors in broken.items():
        save_file(tensors, tmp_path / WEIGHTS)
        bare = base(tiny)
        with pytest.raises(ValueError, match=message):
            load_adapter(bare, tmp_path)
        assert bare.lora is None
    (tmp_path / CONFIG).write_text("[1]")
    with pytest.raises(ValueError, match=r"adapter_config.json: holds a list, not an object"):
        load_adapter(base(tiny), tmp_path)
    save_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        load_adapter(base(tiny), tmp_path)
    with pytest.raises(ValueError, match="not found; an adapter folder holds"):
        load_adapter(base(tiny), tmp_path / "absent")


def test_model_without_an_adapter_has_none_to_save(tiny, tmp_path):
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(base(tiny), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_brings_back_adapter_moments_and_state(tiny, tmp_path):
    folder = tmp_path / "checkpoint-3"
    model = adapted(tiny)
    optimizer = new_optimizer(model)
    for _ in range(3):
        optimizer.grads.normal_(generator=torch.Generator().manual_seed(0))
        optimizer.step(1e-2)
    save_checkpoint(model, optimizer, {"step": 3}, folder)
    other = adapted(tiny)
    restored = new_optimizer(other)
    assert load_checkpoint(other, restored, folder)["step"] == 3
    assert restored.steps == 3
    for name in ("values", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(restored, name), getattr(optimizer, name)), name
    small = adapted(tiny, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="target_modules"):
        load_checkpoint(small, new_optimizer(small), folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("[]", "holds a list[;,] .*an object"),
        ("{}", "optimizer_steps is missing"),
        ("{", "not JSON"),
    ],
)
def test_broken_state_of_a_checkpoint_names_the_file(tiny, tmp_path, state, message):
    model = adapted(tiny)
    optimizer = new_optimizer(model)
    save_checkpoint(model, optimizer, {}, tmp_path)
    (tmp_path / STATE).write_text(state)
    with pytest.raises(ValueError, match=f"state.json: {message}"):
        load_checkpoint(model, optimizer, tmp_path)


def test_full_disk_names_the_folder_and_leaves_the_earlier_save_whole(tiny, tmp_path):
    model = adapted(tiny)
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = r"adapter: could not be written .*unchanged"
    with files_limited_to(8192), pytest.raises(ValueError, match=message):
        save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_saved_files_get_the_mode_that_open_gives(tiny, tmp_path, umask, mode):
    model = adapted(tiny)
    previous = os.umask(umask)
    try:
        save_adapter(model, tmp_path / "adapter")
    finally:
        os.umask(previous)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == {CONFIG: mode, WEIGHTS: mode}


def test_other_files_in_the_folder_stay(tiny, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = adapted(tiny)
    for _ in range(2):
        save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(model, tmp_path / "README.md")

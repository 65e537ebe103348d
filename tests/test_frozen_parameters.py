"""Parameters of the adapter that requires_grad_(False) freezes, in runs and in own loops."""

import peft
import pytest
import torch
import transformers
from micro_step_checks import load, random_samples
from tiny import make_tiny_model
from training_runs import (
    RECORDS,
    adapter_bytes,
    make_smallest_model,
    new_trainer,
    read_metrics,
)

from minitune import FastLanguageModel, TrainerCallback
from minitune.checkpoints.safetensors_folder import read_safetensors
from minitune.data.batching import collate
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW

BATCH = collate(random_samples([20, 11]))
EVERY_A = ("lora_A",)
FIRST_LAYER = ("layers.0.",)
O_PROJ = ("o_proj",)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """Return the folder of the smallest model with two layers."""
    return make_smallest_model(tmp_path_factory.mktemp("smallest"), layers=2)


@pytest.fixture
def model(tmp_path):
    """Return a model with a trained adapter."""
    return load(make_tiny_model(tmp_path / "m"))


def freeze(model, parts, requires_grad=False):
    """Freeze the adapter's parameters whose names hold one of the parts; return their names."""
    chosen = [(n, p) for n, p in model.adapter_parameters() if any(part in n for part in parts)]
    for _, p in chosen:
        p.requires_grad_(requires_grad)
    return {name for name, _ in chosen}


def values(model):
    return {name: p.detach().clone() for name, p in model.adapter_parameters()}


def loop_gradients(model):
    """Return the `.grad` of every adapter parameter after a backward in a loop of one's own."""
    for _, p in model.adapter_parameters():
        p.grad = None
    model(
        input_ids=BATCH.input_ids, labels=BATCH.labels, position_ids=BATCH.position_ids
    ).loss.backward()
    return {name: p.grad for name, p in model.adapter_parameters()}


def micro_step_gradients(model):
    """Return the `.grad` of every adapter parameter after a micro-step."""
    for _, p in model.adapter_parameters():
        p.grad = None
    MicroStep(model)(BATCH, BATCH.targets)
    return {name: p.grad for name, p in model.adapter_parameters()}


@pytest.mark.parametrize("gradients", [loop_gradients, micro_step_gradients])
@pytest.mark.parametrize("parts", [EVERY_A, FIRST_LAYER, O_PROJ, ("lora_B",), ("q_proj", "down")])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same_bits(model, parts, gradients):
    expected = gradients(model)
    frozen = freeze(model, parts)
    found = gradients(model)
    assert {name for name, gradient in found.items() if gradient is None} == frozen
    for name in found.keys() - frozen:
        assert torch.equal(found[name], expected[name]) and found[name].any()
    freeze(model, parts, requires_grad=True)
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_optimizer_leaves_frozen_values_alone_and_out_of_the_norm(model, eight_bit):
    frozen = freeze(model, EVERY_A)
    micro_step_gradients(model)
    before = values(model)
    parameters = [p for _, p in model.adapter_parameters()]
    optimizer = FlatAdamW(parameters, weight_decay=0.5, eight_bit=eight_bit)
    assert len(optimizer.values) == sum(p.numel() for _, p in model.trainable_parameters())
    trained = torch.cat([p.grad.flatten() for _, p in model.trainable_parameters()])
    norm = optimizer.step(0.1)
    assert torch.allclose(norm, trained.norm())
    after = values(model)
    assert all(torch.equal(before[name], after[name]) == (name in frozen) for name in before)


@pytest.mark.parametrize("parts", [EVERY_A, FIRST_LAYER])
def test_a_run_trains_as_torch_does_with_frozen_parameters(smallest, tmp_path, parts):
    trainer = new_trainer(smallest, tmp_path, max_steps=2, weight_decay=0.1, max_grad_norm=0.1)
    model = trainer.model
    twin = new_trainer(smallest, tmp_path / "twin", max_steps=2).model
    twin.load_state_dict(model.state_dict())
    frozen = freeze(model, parts) & freeze(twin, parts)
    before = values(model)
    trainer.train()
    optimizer = torch.optim.AdamW([p for _, p in twin.adapter_parameters()], weight_decay=0.1)
    norms = []
    for step in range(2):
        batch = collate(trainer.order.samples_of_step(step))
        optimizer.zero_grad()
        twin(
            input_ids=batch.input_ids, labels=batch.labels, position_ids=batch.position_ids
        ).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1).item())
        optimizer.param_groups[0]["lr"] = trainer.learning_rate(step)
        optimizer.step()
    after, expected = values(model), values(twin)
    for name in before:
        assert torch.equal(after[name], before[name]) == (name in frozen)
        assert torch.allclose(after[name], expected[name], atol=1e-6)
    assert trainer.progress.grad_norm == pytest.approx(norms[-1], rel=1e-4)
    saved = read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(before)  # the frozen ones too


def test_an_adapter_that_is_all_frozen_is_refused_before_the_run_folder_changes(smallest, tmp_path):
    new_trainer(smallest, tmp_path, max_steps=1).train()
    before = sorted(tmp_path.rglob("*"))
    trainer = new_trainer(smallest, tmp_path, max_steps=1, overwrite=True)
    freeze(trainer.model, [""])
    with pytest.raises(ValueError, match="every parameter of the adapter is frozen"):
        trainer.train()
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="no parameters to train"):
        FlatAdamW([p for _, p in trainer.model.adapter_parameters()])
    logits = trainer.model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert not logits.requires_grad  # evaluation goes on


def test_freezing_between_two_calls_of_train_takes_effect(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path, max_steps=2, overwrite=True, weight_decay=0.1)
    model = trainer.model
    trainer.train()
    first = values(model)
    frozen = freeze(model, EVERY_A)
    trainer.train()
    second = values(model)
    assert {name for name in first if torch.equal(first[name], second[name])} == frozen
    freeze(model, EVERY_A, requires_grad=True)
    trainer.train()
    third = values(model)
    assert not any(torch.equal(second[name], third[name]) for name in second)


class FreezeAfterStep(TrainerCallback):
    """Freezes or unfreezes parameters after the first step."""

    def __init__(self, requires_grad):
        self._requires_grad = requires_grad

    def on_step_end(self, args, state, control, model=None, **kwargs):
        freeze(model, O_PROJ, self._requires_grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_change_during_a_run_is_refused(smallest, tmp_path, requires_grad):
    trainer = new_trainer(smallest, tmp_path, max_steps=3)
    freeze(trainer.model, O_PROJ, not requires_grad)
    trainer.add_callback(FreezeAfterStep(requires_grad))
    with pytest.raises(ValueError, match="requires_grad of a parameter changed during training"):
        trainer.train()
    assert trainer.progress.step == 1


def test_a_run_resumes_with_the_same_frozen_parameters_alone(smallest, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = new_trainer(smallest, tmp_path / "whole", **settings)
    freeze(whole.model, ("layers.0.self_attn.q_proj",))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for parts in ((), ("layers.1.self_attn.q_proj",)):  # as many numbers, but others
        other = new_trainer(smallest, tmp_path / "other", **settings)
        freeze(other.model, parts)
        before = values(other.model)
        with pytest.raises(ValueError, match=r"the run froze other parameters .*q_proj.lora_A"):
            other.train(resume_from_checkpoint=checkpoint)
        after = values(other.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
    resumed = new_trainer(smallest, tmp_path / "resumed", **settings)
    freeze(resumed.model, ("layers.0.self_attn.q_proj",))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")
    assert read_metrics(tmp_path / "whole")[-1]["step"] == 4


def test_a_weight_of_the_base_that_requires_a_gradient_is_refused(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path / "run", max_steps=1)
    trainer.model.requires_grad_(True)
    with pytest.raises(ValueError, match="requires a gradient, but only the adapter is trained"):
        trainer.train()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="the base is frozen and only the adapter is trained"):
        trainer.model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("owner", ["model", "layer", "parameter", "after_accumulation"])
def test_a_hook_that_a_run_would_skip_is_refused(smallest, tmp_path, owner):
    trainer = new_trainer(smallest, tmp_path / "run", max_steps=1)
    model, p = trainer.model, trainer.model.adapter_parameters()[0][1]
    handle = {
        "model": model.register_forward_hook,
        "layer": model.model.layers[1].register_full_backward_hook,
        "parameter": p.register_hook,
        "after_accumulation": p.register_post_accumulate_grad_hook,
    }[owner](print)
    with pytest.raises(ValueError, match=r"a hook of .* would never run"):
        trainer.train()
    assert not (tmp_path / "run").exists()
    handle.remove()
    trainer.train()


def test_the_count_of_trainable_parameters_is_that_of_peft(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "m")
    model, _ = FastLanguageModel.from_pretrained(folder, device="cpu", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    model.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    freeze(model, EVERY_A)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_B" in name)
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_run_inside_of_inference_mode_is_the_run_outside(smallest, tmp_path, mode):
    settings = {"eval_dataset": RECORDS[:2], "eval_strategy": "steps", "eval_steps": 1}
    plain = new_trainer(smallest, tmp_path / "plain", max_steps=2, **settings)
    plain.train()
    trainer = new_trainer(smallest, tmp_path / "mode", max_steps=2, **settings)
    with mode():
        trainer.evaluate()
        trainer.train()
        trainer.evaluate()
    assert adapter_bytes(tmp_path / "mode") == adapter_bytes(tmp_path / "plain")
    trainer.model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()

"""Another adapter replaces the present one, and a disabled adapter leaves the bare base."""

import pytest
import torch
from labelled_records import PAIR
from micro_step_checks import DEVICE, GRAPH_SHAPE, gradients, random_samples
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer, TrainerCallback
from minitune.data.batching import collate
from minitune.model.adapter_switch import remove_lora_
from minitune.training.micro_step import MicroStep

IDS = torch.tensor([[5, 17, 300, 42, 7, 7, 260, 99, 3]])
LABELS = IDS.clone()
SETTINGS = {  # of two adapters that share the padded rank, or differ in it, or in linears
    "smaller rank": ({"r": 8}, {"r": 3}),
    "larger rank": ({"r": 4}, {"r": 40}),
    "fewer linears": ({}, {"target_modules": ["k_proj", "down_proj"]}),
    "other linears": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}),
    "other scaling": ({"lora_alpha": 16}, {"lora_alpha": 5}),
    "rslora": ({"r": 8}, {"r": 8, "use_rslora": True}),
    "same settings": ({"r": 8}, {"r": 8}),
}


def base(folder, **options):
    options = {"max_seq_length": 64, "device": "cpu"} | options
    return FastLanguageModel.from_pretrained(folder, **options)[0]


def adapted(folder, settings, seed=0, **options):
    model = FastLanguageModel.get_peft_model(base(folder, **options), **settings)
    draw_adapter(model, b=0.2, seed=seed)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loss_and_gradients(model):
    for _, p in model.trainable_parameters():
        p.grad = None
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for _, p in model.trainable_parameters())]


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("case", SETTINGS)
def test_a_replaced_adapter_computes_as_a_fresh_load_bit_for_bit(tmp_path, case, load_in_4bit):
    folder = make_tiny_model(tmp_path / "m")
    first, second = SETTINGS[case]
    adapted(folder, second, seed=1).save_pretrained(tmp_path / "second")
    model = adapted(folder, first, load_in_4bit=load_in_4bit)
    with model.resident_weights():
        logits(model)
    loss_and_gradients(model)  # fills the buffers with the first adapter
    model.load_adapter(tmp_path / "second")
    fresh = base(folder, load_in_4bit=load_in_4bit)
    fresh.load_adapter(tmp_path / "second")
    assert model.lora == fresh.lora
    assert torch.equal(logits(model), logits(fresh))
    found, expected = loss_and_gradients(model), loss_and_gradients(fresh)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert model.generate([[5, 9, 300]], max_new_tokens=9) == fresh.generate(
        [[5, 9, 300]], max_new_tokens=9
    )


def test_a_replaced_adapter_also_computes_right_while_weights_are_resident(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    adapted(folder, {"r": 3}, seed=1).save_pretrained(tmp_path / "second")
    model = adapted(folder, {"r": 8})
    with model.resident_weights():
        logits(model)
        model.load_adapter(tmp_path / "second")
        inside = logits(model)
    fresh = base(folder)
    fresh.load_adapter(tmp_path / "second")
    assert torch.equal(inside, logits(fresh)) and torch.equal(logits(model), inside)


def test_a_trainer_that_was_built_before_trains_the_adapter_that_was_loaded_since(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    adapted(folder, {"r": 3}, seed=1).save_pretrained(tmp_path / "second")
    adapters = []
    for name in ("before", "after"):
        model = adapted(folder, {"r": 8})
        args = SFTConfig(output_dir=str(tmp_path / name), max_steps=2, learning_rate=1e-2)
        if name == "after":
            model.load_adapter(tmp_path / "second")
        trainer = SFTTrainer(model, args, [{"messages": PAIR}])
        if name == "before":
            model.load_adapter(tmp_path / "second")
        trainer.train()
        adapters.append([p.detach().clone() for _, p in model.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*adapters, strict=True))
    untrained = base(folder)
    untrained.load_adapter(tmp_path / "second")
    assert not torch.equal(adapters[0][1], untrained.trainable_parameters()[1][1])


def test_captured_graphs_of_the_adapter_before_are_not_replayed(tmp_path):
    folder = make_tiny_model(tmp_path / "m", **GRAPH_SHAPE)
    adapted(folder, {"r": 3}, seed=1).save_pretrained(tmp_path / "second")
    batch, found = collate(random_samples([40, 24])), {}
    for name in ("replaced", "fresh"):
        model = base(folder, device=DEVICE, attention="triton")
        if name == "replaced":
            draw_adapter(FastLanguageModel.get_peft_model(model, r=8), b=0.2)
        else:
            model.load_adapter(tmp_path / "second")
        micro_step = MicroStep(model)
        for _ in range(3):  # on a GPU the first call captures and the others replay
            micro_step(batch, 9)
        if name == "replaced":
            model.load_adapter(tmp_path / "second")
            for _ in range(3):
                micro_step(batch, 9)
        found[name] = gradients(model)
        micro_step.close()
    assert torch.equal(found["replaced"], found["fresh"]) and found["fresh"].any()


def test_an_adapter_that_is_replaced_during_training_stops_the_run(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    adapted(folder, {"r": 3}, seed=1).save_pretrained(tmp_path / "second")
    model = adapted(folder, {"r": 8})

    class Replacing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model.load_adapter(tmp_path / "second")

    args = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=3)
    trainer = SFTTrainer(model, args, [{"messages": PAIR}])
    trainer.add_callback(Replacing())
    with pytest.raises(ValueError, match="another adapter was loaded during training"):
        trainer.train()


def test_a_removed_adapter_leaves_the_base(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    model = adapted(folder, {})
    assert not torch.equal(logits(model), logits(base(folder)))
    remove_lora_(model)
    assert torch.equal(logits(model), logits(base(folder)))
    assert model.lora is None and not model.trainable_parameters()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_disabled_adapter_gives_the_base_and_comes_back_with_the_same_bits(
    tmp_path, load_in_4bit
):
    folder = make_tiny_model(tmp_path / "m")
    model = adapted(folder, {"r": 8}, load_in_4bit=load_in_4bit)
    bare = base(folder, load_in_4bit=load_in_4bit)
    before, parameters = loss_and_gradients(model), model.trainable_parameters()
    with model.resident_weights():
        with pytest.raises(KeyError), model.disable_adapter():
            assert torch.equal(logits(model), logits(bare))
            prompt = [[5, 9, 300]]
            assert model.generate(prompt, max_new_tokens=9) == bare.generate(
                prompt, max_new_tokens=9
            )
            raise KeyError
        resident = loss_and_gradients(model)
    for found in (resident, loss_and_gradients(model)):
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    for (name, p), (same, q) in zip(model.trainable_parameters(), parameters, strict=True):
        assert name == same and p is q


def test_peft_agrees_with_the_disabled_adapter_and_with_the_printed_line(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = make_tiny_model(tmp_path / "m")
    model = adapted(folder, {"r": 4}, load_in_4bit=False)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tmp_path / "adapter",
        is_trainable=True,
    )
    with model.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert (logits(model) - expected).norm() < 1e-5 * expected.norm()
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()

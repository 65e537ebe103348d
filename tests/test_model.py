"""Loss, logits and LoRA gradients against transformers + PEFT and a plain autograd Llama."""

import copy

import pytest
import torch
from plain_llama import PlainLlama
from tiny import make_tiny_model
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
from minitune.model.activations import SaveLevel
from minitune.model.packed_sequences import PackedSequences

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "grouped queries, tied": {},
    "one kv head, wide heads, untied": {"kv_heads": 1, "head_dim": 24, "tie": False},
    "biases": {"attention_bias": True, "heads": 2, "kv_heads": 2},
    "llama3 rope": {"rope_scaling": LLAMA3, "tie": False},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_logits_and_every_gradient_equal_transformers_and_peft(tmp_path, shape):
    folder = make_tiny_model(tmp_path / "m", **shape)
    model, _ = load(folder)
    compare_with_transformers(model, folder, *batch(model), bound=2e-5)


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["down_proj", "k_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]]
)
def test_a_subset_of_the_linears_trains_as_in_peft(tmp_path, targets):
    folder = make_tiny_model(tmp_path / "m")
    model, _ = load(folder, targets)
    assert len(model.trainable_parameters()) == 2 * 2 * len(targets)
    compare_with_transformers(model, folder, *batch(model), bound=2e-5)


def test_smollm2_in_float32_equals_transformers_and_peft(smollm2):
    model, tokenizer = load(smollm2)
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3
    ids = torch.tensor([tokenizer.encode(text)])
    compare_with_transformers(model, smollm2, ids, ids, bound=1e-4)


def test_gradients_equal_a_plain_autograd_llama_in_float64(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m", tie=False))
    model.dtype = model.layer_context.dtype = torch.float64
    plain = PlainLlama(model, torch.float64)
    ids, labels = batch(model)
    expected = plain.loss(list(zip(ids, labels, strict=True)))
    expected.backward()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-9
    # The parameters are float32, so autograd rounds their gradients to float32.
    for name, p in model.trainable_parameters():
        assert relative(p.grad.double(), plain.adapter[name].grad) < 2e-7, name


@pytest.mark.parametrize("level", [SaveLevel.INPUT, SaveLevel.ATTENTION, SaveLevel.QKV])
def test_every_save_level_gives_the_bits_of_the_level_that_recomputes_nothing(tmp_path, level):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    ids, labels = batch(model)
    model.planner.level = SaveLevel.ALL
    expected_loss, expected = loss_and_gradient(model, input_ids=ids, labels=labels)
    model.planner.level = level
    loss, gradient = loss_and_gradient(model, input_ids=ids, labels=labels)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient, expected)


def test_packed_samples_equal_the_same_samples_padded_and_alone(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, 400, (n,), generator=generator) for n in (5, 1, 17, 9)]
    count = sum(len(s) - 1 for s in samples)
    packed = loss_and_gradient(
        model,
        input_ids=torch.cat(samples)[None],
        labels=torch.cat(samples)[None],
        position_ids=torch.cat([torch.arange(len(s)) for s in samples])[None],
    )
    for side in ("right", "left"):
        ids = torch.nn.utils.rnn.pad_sequence(
            samples, batch_first=True, padding_value=2, padding_side=side
        )
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in samples], True, 0, side)
        padded = loss_and_gradient(
            model, input_ids=ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask
        )
        assert abs(padded[0] - packed[0]) < 1e-6 and relative(padded[1], packed[1]) < 1e-5
    alone = [
        loss_and_gradient(model, input_ids=s[None], labels=s[None], num_items_in_batch=count)
        for s in samples
        if len(s) > 1
    ]
    assert abs(sum(a[0] for a in alone) - packed[0]) < 1e-6
    assert relative(sum(a[1] for a in alone), packed[1]) < 1e-5


def test_a_samples_first_label_is_never_predicted_from_the_sample_before(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    ids, positions = torch.arange(10, 20), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    labels = torch.full((10,), -100)
    labels[5] = ids[5]  # the only label is the second sample's first token: nothing predicts it
    loss, gradient = loss_and_gradient(model, input_ids=ids, labels=labels, position_ids=positions)
    assert loss == 0 and not gradient.any()


def test_sample_bounds_follow_from_positions():
    packed = PackedSequences.from_positions(torch.tensor([0, 1, 2, 0, 0, 1]))
    assert packed.start.tolist() == [0, 0, 0, 3, 4, 4]
    assert packed.end.tolist() == [3, 3, 3, 4, 6, 6]
    assert (packed.uniform_seqlen, packed.max_seqlen) == (None, 3)
    same = PackedSequences.from_positions(torch.tensor([0, 1, 2, 0, 1, 2]))
    assert (same.uniform_seqlen, same.max_seqlen) == (3, 3)
    other = PackedSequences.from_positions(torch.tensor([0, 1, 0, 1, 2, 3]))
    assert (other.uniform_seqlen, other.max_seqlen) == (None, 4)


def test_padding_does_not_enter_the_logits(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    ids, _ = batch(model, rows=1, length=9)
    padded = torch.nn.functional.pad(ids, (4, 3), value=2)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 3), value=0)
    logits = model(input_ids=padded, attention_mask=mask).logits
    assert torch.allclose(logits[:, 4:-3], model(input_ids=ids).logits, atol=1e-5)
    assert not logits[:, :4].any() and not logits[:, -3:].any()


def test_gradients_flow_through_the_logits_as_through_the_loss(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    ids, labels = batch(model)
    _, expected = loss_and_gradient(model, input_ids=ids, labels=labels)
    clear_gradients(model)
    logits = model(input_ids=ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    assert relative(flat_gradient(model), expected) < 1e-5


def test_gradients_accumulate_and_a_changed_parameter_takes_effect_at_once(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    ids, labels = batch(model)
    _, once = loss_and_gradient(model, input_ids=ids, labels=labels)
    model(input_ids=ids, labels=labels).loss.backward()
    assert relative(flat_gradient(model), 2 * once) < 1e-6
    before = model(input_ids=ids, labels=labels).loss.item()
    with torch.no_grad():
        model.trainable_parameters()[1][1].mul_(3)
    assert abs(model(input_ids=ids, labels=labels).loss.item() - before) > 1e-4


def test_a_fresh_adapter_changes_nothing_and_its_seed_decides_a(tmp_path):
    folder = make_tiny_model(tmp_path / "m")
    base, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=256, device="cpu")
    ids, _ = batch(base)
    plain = base(input_ids=ids).logits
    models = [copy.deepcopy(base) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        FastLanguageModel.get_peft_model(model, r=8, random_state=seed)
    assert torch.equal(models[0](input_ids=ids).logits, plain)
    up, gate = (f"model.layers.1.mlp.{name}_proj.lora_A.weight" for name in ("up", "gate"))
    a = [dict(m.trainable_parameters())[up] for m in models]
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])
    assert not torch.equal(a[0], dict(models[0].trainable_parameters())[gate])
    # Kaiming uniform with a = sqrt(5): bound 1 / sqrt(in), deviation bound / sqrt(3)
    assert a[0].abs().max() <= 64**-0.5
    assert abs(a[0].std() - (64 * 3) ** -0.5) < 0.01


def test_resident_weights_change_no_number(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    ids, labels = batch(model)
    plain = loss_and_gradient(model, input_ids=ids, labels=labels)
    with model.resident_weights():
        resident = loss_and_gradient(model, input_ids=ids, labels=labels)
    assert torch.equal(plain[1], resident[1])
    assert all(fused.resident_weight is None for fused in model.fused_linears())


BAD_CALLS = {
    "input_ids reach 512": {"input_ids": torch.tensor([[1, 512]])},
    "a sample has 257 tokens": {"input_ids": torch.ones(1, 257, dtype=torch.long)},
    "differ in shape": {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "labels": torch.ones(1, 3, dtype=torch.long),
    },
    "restart at 0": {
        "input_ids": torch.ones(1, 3, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 3]]),
    },
    "label 512 is neither": {
        "input_ids": torch.ones(1, 2, dtype=torch.long),
        "labels": torch.tensor([[1, 512]]),
    },
    "label -1 is neither": {
        "input_ids": torch.ones(1, 2, dtype=torch.long),
        "labels": torch.tensor([[1, -1]]),
    },
    "hold no token": {"input_ids": torch.ones(1, 0, dtype=torch.long)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_bad_call_is_refused(tmp_path, message):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    with pytest.raises(ValueError, match=message):
        model(**BAD_CALLS[message])


BAD_ADAPTERS = {
    "target module 'qproj' does not exist": {"target_modules": ["qproj"]},
    "r is 0; expected at least 1": {"r": 0},
    "lora_dropout=0.1 is not supported": {"lora_dropout": 0.1},
    "bias='all' is not supported": {"bias": "all"},
    "use_gradient_checkpointing is 'some'": {"use_gradient_checkpointing": "some"},
}


@pytest.mark.parametrize("message", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_and_leaves_the_model_as_it_was(tmp_path, message):
    model, _ = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "m"), max_seq_length=256, device="cpu"
    )
    with pytest.raises(ValueError, match=message):
        FastLanguageModel.get_peft_model(model, **BAD_ADAPTERS[message])
    assert model.lora is None and not model.trainable_parameters()


def test_an_unknown_argument_is_a_type_error_and_another_adapter_is_refused(tmp_path):
    model, _ = load(make_tiny_model(tmp_path / "m"))
    with pytest.raises(TypeError, match="did you mean lora_alpha"):
        FastLanguageModel.get_peft_model(model, lora_alhpa=4)
    with pytest.raises(ValueError, match="has an adapter with other settings already"):
        FastLanguageModel.get_peft_model(model, r=model.lora.r + 1)

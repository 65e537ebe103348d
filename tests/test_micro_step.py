"""A micro-step without the autograd engine gives the numbers of `loss.backward()`."""

import dataclasses
import random
import weakref

import pytest
import torch
from gguf_files import make_tiny_gguf
from micro_step_checks import (
    DEVICE,
    FixedPlanner,
    assert_same_bits,
    gradients,
    load,
    random_samples,
    results,
)
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.config.architectures import LORA_TARGETS
from minitune.data.batching import collate, micro_steps
from minitune.memory.offload import ActivationOffloader
from minitune.memory.plan import Plan
from minitune.memory.planner import Planner
from minitune.model.activations import Activations, LayerPlan, SaveLevel
from minitune.model.resident_weights import ResidentWeights
from minitune.training.cuda_graphs import bucket_size
from minitune.training.micro_step import MicroStep, _pad_batch


def autograd_results(model, batch, denominator):
    """Return loss and gradients of a batch, computed by autograd."""
    loss = model(
        input_ids=batch.input_ids,
        labels=batch.labels,
        position_ids=batch.position_ids,
        num_items_in_batch=denominator,
    ).loss
    loss.backward()
    return loss.detach(), gradients(model)


# ---- against autograd


@pytest.mark.parametrize(
    "level", [SaveLevel.INPUT, SaveLevel.ATTENTION, SaveLevel.QKV, SaveLevel.ALL, None]
)
def test_a_micro_step_gives_the_bits_of_autograd(tmp_path, level):
    model = load(make_tiny_model(tmp_path / "m"))
    model.planner.level = level
    batch = collate(random_samples([40, 9, 30]))
    micro_step = MicroStep(model, capture=False)
    loss = micro_step(batch, 50)
    assert not loss.requires_grad
    found = gradients(model)
    expected_loss, expected = autograd_results(model, batch, 50)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(found, expected) and found.any()
    micro_step(batch, 50)
    micro_step(batch, 50)
    assert torch.allclose(gradients(model), 2 * found)  # gradients add up


@pytest.mark.parametrize("tie", [True, False])
def test_a_micro_step_with_room_for_a_quantised_head_gives_the_bits_of_autograd(tmp_path, tie):
    model = load(make_tiny_gguf(tmp_path, "q4_k_m", tie=tie))
    assert model.new_loss_buffers(8).head.shape == (512, 256)
    batch = collate(random_samples([40, 9, 30]))
    found = results(MicroStep(model, capture=False), [batch])
    assert_same_bits(found, [autograd_results(model, batch, 50)])


@pytest.mark.parametrize("part", [1, 3, 5])
def test_a_micro_step_trains_the_adapted_linears_only(tmp_path, part):
    model, _ = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "m"), max_seq_length=256, device=DEVICE
    )
    FastLanguageModel.get_peft_model(model, r=4, target_modules=LORA_TARGETS[part - 1 : part + 1])
    with torch.no_grad():
        for _, p in model.trainable_parameters():
            p.normal_(std=0.1)
    batch = collate(random_samples([40, 9, 30]))
    loss = MicroStep(model, capture=False)(batch, 50)
    assert torch.equal(gradients(model), autograd_results(model, batch, 50)[1])
    assert loss > 0


@pytest.mark.parametrize(("parts", "tokens"), [(1, 200), (2, 100), (4, 60)])
def test_loss_and_gradients_do_not_depend_on_how_samples_are_split_into_micro_steps(
    tmp_path, parts, tokens
):
    model = load(make_tiny_model(tmp_path / "m"), dtype=torch.float32)
    samples = random_samples([40, 9, 30, 25, 31, 12, 4, 27])
    alone = [collate([sample]) for sample in samples]  # no sample attends to another
    targets = sum(batch.targets for batch in alone)
    of_each = [autograd_results(model, batch, targets) for batch in alone]
    expected_loss = sum(loss for loss, _ in of_each)
    expected = sum(grads for _, grads in of_each)
    packs = micro_steps(samples, tokens)
    assert len(packs) == parts
    micro_step = MicroStep(model)
    for _ in range(2):  # on a GPU the first runs eagerly, the second replays graphs
        loss = sum(micro_step(collate(pack), targets) for pack in packs)
        assert torch.allclose(loss, expected_loss, rtol=1e-5)
        assert (gradients(model) - expected).norm() < 1e-5 * expected.norm()


def test_autocast_around_a_micro_step_changes_nothing(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    batches, micro_step = [collate(random_samples([40, 9, 30]))], MicroStep(model, capture=False)
    expected = results(micro_step, batches)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = results(micro_step, batches)
    assert_same_bits(found, expected)


# ---- padding


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500, 1000, 4096, 5000, 100_000])
def test_padding_is_less_than_64_tokens_or_at_most_a_quarter(tokens):
    size = bucket_size(tokens)
    assert tokens <= size < tokens + max(64, tokens / 4)
    assert bucket_size(size) == size


@pytest.mark.parametrize(
    ("lengths", "max_seq_length"), [([40, 9], 256), ([100], 256), ([100], 110), ([3], 5)]
)
def test_padding_follows_the_samples_and_stays_within_the_known_positions(lengths, max_seq_length):
    batch = collate(random_samples(lengths))
    ids, positions = _pad_batch(batch, 128, max_seq_length)
    n = sum(lengths)
    assert len(ids) == len(positions) == 128
    assert torch.equal(ids[:n], batch.input_ids) and torch.equal(positions[:n], batch.position_ids)
    assert positions.max() < max_seq_length
    follows = positions[1:] == positions[:-1] + 1
    assert (follows | (positions[1:] == 0)).all()
    # padding extends a single sample if the model has the positions for it
    assert (positions[n] == n) == (lengths == [100] and max_seq_length == 256)


# ---- refused


def test_tokens_and_labels_that_the_model_does_not_have_are_refused(tmp_path):
    micro_step = MicroStep(load(make_tiny_model(tmp_path / "m")))
    batch = collate(random_samples([40]))
    beyond = batch.input_ids + (512 - batch.input_ids.max())
    with pytest.raises(ValueError, match="input_ids reach 512"):
        micro_step(dataclasses.replace(batch, input_ids=beyond), 1)
    with pytest.raises(ValueError, match="label 600 is neither"):
        micro_step(dataclasses.replace(batch, labels=torch.full_like(batch.labels, 600)), 1)


def test_a_model_without_an_adapter_is_refused(tmp_path):
    model, _ = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "m"), max_seq_length=256, device=DEVICE
    )
    with pytest.raises(ValueError, match="no adapter to train"):
        MicroStep(model)


# ---- plans


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory):
    """Return a model of five layers, a batch, and its loss and gradients if layers save inputs."""
    model = load(make_tiny_model(tmp_path_factory.mktemp("five"), layers=5), dtype=torch.float32)
    batch = collate(random_samples([40, 9, 30, 57]))
    planner = Planner(SaveLevel.INPUT)
    return model, batch, results(MicroStep(model, planner, capture=False), [batch])


@pytest.mark.parametrize("seed", range(8))
def test_every_mixture_of_levels_places_and_tiles_gives_the_same_loss_and_gradients(
    five_layers, seed
):
    """Draw a mixture and hold it against layers that all save their input.

    The bits are the same in one tile if every layer saves. Several tiles sum rows in another order.
    A layer that saves nothing takes its LoRA columns from m as backward recomputes it.
    """
    model, batch, expected = five_layers
    ((expected_loss, expected_grads),) = expected
    draw = random.Random(seed)
    levels = [level for level in SaveLevel if level != SaveLevel.NOTHING]
    layers = [LayerPlan(draw.choice(levels), draw.random() < 0.5) for _ in range(5)]
    for i in range(1, 5):
        if draw.random() < 0.4:
            layers[i] = LayerPlan(SaveLevel.NOTHING)
    all_save = all(layer.level != SaveLevel.NOTHING for layer in layers)
    planner = FixedPlanner(None)
    micro_step = MicroStep(model, planner, capture=False)
    # Of 136 rows, tiles of 45 leave one row for the last tile; 200 is more than all rows.
    for tile_rows in (None, draw.choice([7, 45, 64, 200])):
        planner.plan = Plan(tuple(layers), tile_rows, host_bytes=5 << 20)
        for _ in range(2):
            found = results(micro_step, [batch])
            if tile_rows is None and all_save:
                assert_same_bits(found, expected)
            ((loss, grads),) = found
            assert torch.allclose(loss, expected_loss, rtol=1e-6)
            assert (grads - expected_grads).norm() < 1e-5 * expected_grads.norm()


def test_weights_that_stay_dequantised_change_nothing(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    batches, micro_step = [collate(random_samples([40, 9, 30]))], MicroStep(model, capture=False)
    expected = results(micro_step, batches)
    weights = ResidentWeights(model.dtype, model.device)
    for count in (1, 2, 0):
        layers = model.model.layers
        wanted = [fused for layer in layers[:count] for fused in layer.fused_linears]
        weights.keep_only(wanted)
        with model.resident_weights():
            assert all(fused.resident_weight is not None for fused in model.fused_linears())
        assert [
            fused for fused in model.fused_linears() if fused.resident_weight is not None
        ] == wanted
        assert weights.nbytes == sum(fused.resident_weight.nbytes for fused in wanted)
        assert_same_bits(results(micro_step, batches), expected)


def test_closing_a_micro_step_releases_the_weights_that_it_kept_dequantised(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    micro_step = MicroStep(model, capture=False)
    micro_step._passes.keep_resident(2)
    assert all(fused.resident_weight is not None for fused in model.fused_linears())
    micro_step.close()
    assert not any(fused.resident_weight is not None for fused in model.fused_linears())


# ---- offloading


def test_offloaded_tensors_are_freed_first_in_first_out():
    offloader, alive = ActivationOffloader(1 << 20, torch.device("cpu")), []
    for i in range(3):
        x = torch.full((128,), i)
        alive.append(weakref.ref(x))
        offloader.offload(i, Activations(x))
    del x
    for nbytes, left in ((4096, 3), (2048, 2), (1024, 1), (1023, 0)):
        offloader.wait_until_in_flight(nbytes)
        assert [ref() is not None for ref in alive] == [False] * (3 - left) + [True] * left
    assert [int(offloader.restore(i).x[0]) for i in (2, 1, 0)] == [2, 1, 0]


def test_a_step_that_fails_leaves_nothing_in_flight_and_the_next_one_is_right(
    tmp_path, monkeypatch
):
    model = load(make_tiny_model(tmp_path / "m"), dtype=torch.float32)
    batch = collate(random_samples([40, 9]))
    layers = (LayerPlan(SaveLevel.INPUT, offloaded=True), LayerPlan(SaveLevel.INPUT))
    planner = FixedPlanner(Plan(layers, host_bytes=1 << 20))
    micro_step = MicroStep(model, planner, capture=False)
    expected = results(micro_step, [batch])
    inputs = []
    offload = ActivationOffloader.offload

    def watched(self, i, a):
        offload(self, i, a)
        inputs.append(weakref.ref(a.x))

    monkeypatch.setattr(ActivationOffloader, "offload", watched)
    with pytest.raises(ValueError, match="label 600 is neither"):
        micro_step(dataclasses.replace(batch, labels=torch.full_like(batch.labels, 600)), 1)
    assert len(inputs) == 1 and inputs[0]() is None
    assert_same_bits(results(micro_step, [batch]), expected)


def test_an_arena_that_is_too_small_is_an_error(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    layers = (LayerPlan(SaveLevel.INPUT, offloaded=True),) * 2
    micro_step = MicroStep(model, FixedPlanner(Plan(layers, host_bytes=1000)), capture=False)
    with pytest.raises(ValueError, match="an arena of 1000 bytes has no room for layer 0"):
        micro_step(collate(random_samples([40])), 50)

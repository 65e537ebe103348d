"""A micro-step without the autograd engine, as CUDA graphs on a GPU: the same numbers as `loss.backward()`."""

import dataclasses
import random
import weakref

import pytest
import torch
from conftest import GPU
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.data.batching import collate, micro_steps
from minitune.data.tokenize_dataset import Sample
from minitune.memory.offload import ActivationOffloader
from minitune.memory.plan import Plan
from minitune.model.activations import Activations, LayerPlan, SaveLevel
from minitune.training.cuda_graphs import bucket_size
from minitune.training.micro_step import MicroStep, _pad_batch

DEVICE = "cuda" if GPU else "cpu"


def load(folder, **options):
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, device=DEVICE, **options
    )
    FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    draw_adapter(model, b=0.05)
    return model


def random_samples(lengths, vocab=512, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    return [
        Sample(sample, [-100] * (len(sample) // 3) + sample[len(sample) // 3 :]) for sample in ids
    ]


def gradients(model):
    found = torch.cat([p.grad.flatten().clone() for _, p in model.trainable_parameters()])
    for _, p in model.trainable_parameters():
        p.grad.zero_()
    return found


def of_autograd(model, batch, denominator):
    inputs = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
    }
    loss = model(**inputs, num_items_in_batch=denominator).loss
    loss.backward()
    return loss.detach(), gradients(model)


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
    mine = gradients(model)
    expected_loss, expected = of_autograd(model, batch, 50)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(mine, expected) and mine.any()
    micro_step(batch, 50)
    micro_step(batch, 50)
    assert torch.allclose(gradients(model), 2 * mine)  # added to what is there


@pytest.mark.parametrize("part", [1, 3, 5])
def test_a_micro_step_trains_the_adapted_linears_only(tmp_path, part):
    model, _ = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "m"), max_seq_length=256, device=DEVICE
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"][
        part - 1 : part + 1
    ]
    FastLanguageModel.get_peft_model(model, r=4, target_modules=names)
    with torch.no_grad():
        for _, p in model.trainable_parameters():
            p.normal_(std=0.1)
    batch = collate(random_samples([40, 9, 30]))
    loss = MicroStep(model, capture=False)(batch, 50)
    assert torch.equal(gradients(model), of_autograd(model, batch, 50)[1])
    assert loss > 0


@pytest.mark.parametrize(("parts", "tokens"), [(1, 200), (2, 100), (4, 60)])
def test_loss_and_gradients_do_not_depend_on_how_samples_are_split_into_micro_steps(
    tmp_path, parts, tokens
):
    model = load(make_tiny_model(tmp_path / "m"), dtype=torch.float32)
    samples = random_samples([40, 9, 30, 25, 31, 12, 4, 27])
    alone = [
        collate([sample]) for sample in samples
    ]  # as in padded batches, no sample sees another
    targets = sum(batch.targets for batch in alone)
    expected_loss = sum(of_autograd(model, batch, targets)[0] for batch in alone)
    expected = sum(of_autograd(model, batch, targets)[1] for batch in alone)
    packs = micro_steps(samples, tokens)
    assert len(packs) == parts
    micro_step = MicroStep(model)
    for _ in range(2):  # on a GPU, plainly and then as graphs
        loss = sum(micro_step(collate(pack), targets) for pack in packs)
        assert torch.allclose(loss, expected_loss, rtol=1e-5)
        assert (gradients(model) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500, 1000, 4096, 5000, 100_000])
def test_a_padded_size_is_at_most_a_quarter_more_or_64(tokens):
    size = bucket_size(tokens)
    assert tokens <= size < tokens + max(64, tokens / 4)
    assert bucket_size(size) == size


@pytest.mark.parametrize(
    ("lengths", "longest"), [([40, 9], 256), ([100], 256), ([100], 110), ([3], 5)]
)
def test_padding_is_behind_the_samples_and_stays_within_the_known_positions(lengths, longest):
    batch = collate(random_samples(lengths))
    ids, positions = _pad_batch(batch, 128, longest)
    n = sum(lengths)
    assert len(ids) == len(positions) == 128
    assert torch.equal(ids[:n], batch.input_ids) and torch.equal(positions[:n], batch.position_ids)
    assert positions.max() < longest
    follows = positions[1:] == positions[:-1] + 1
    assert (follows | (positions[1:] == 0)).all()
    assert (positions[n] == n) == (
        lengths == [100] and longest == 256
    )  # behind a single sample, more of it


def test_tokens_and_labels_that_the_model_does_not_have_are_refused(tmp_path):
    micro_step = MicroStep(load(make_tiny_model(tmp_path / "m")))
    batch = collate(random_samples([40]))
    with pytest.raises(ValueError, match="input_ids reach 512"):
        micro_step(
            dataclasses.replace(batch, input_ids=batch.input_ids + (512 - batch.input_ids.max())), 1
        )
    with pytest.raises(ValueError, match="label 600 is neither"):
        micro_step(dataclasses.replace(batch, labels=torch.full_like(batch.labels, 600)), 1)


def test_a_model_without_an_adapter_is_refused(tmp_path):
    model, _ = FastLanguageModel.from_pretrained(
        make_tiny_model(tmp_path / "m"), max_seq_length=256, device=DEVICE
    )
    with pytest.raises(ValueError, match="no adapter to train"):
        MicroStep(model)


def test_autocast_around_a_micro_step_changes_nothing(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    batch, micro_step = collate(random_samples([40, 9, 30])), MicroStep(model, capture=False)
    expected = micro_step(batch, 50), gradients(model)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = micro_step(batch, 50), gradients(model)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("seed", range(12))
def test_every_mixture_of_levels_places_and_tiles_gives_the_same_loss_and_gradients(
    tmp_path, seed, monkeypatch
):
    """Bit for bit in one tile; in several, sums over rows are taken in another order, and a layer that kept nothing
    takes its low-rank columns from m as backward computes it."""
    model = load(make_tiny_model(tmp_path / "m", layers=5), dtype=torch.float32)
    batch, micro_step = collate(random_samples([40, 9, 30, 57])), MicroStep(model, capture=False)
    model.planner.level = SaveLevel.INPUT
    expected = micro_step(batch, 50), gradients(model)
    draw = random.Random(seed)
    levels = [level for level in SaveLevel if level != SaveLevel.NOTHING]
    layers = tuple(LayerPlan(draw.choice(levels), draw.random() < 0.5) for _ in range(5))
    layers = tuple(
        LayerPlan(SaveLevel.NOTHING) if i and draw.random() < 0.4 else keep
        for i, keep in enumerate(layers)
    )
    for tile in (None, draw.choice([1, 7, 64, 200])):
        plan = Plan(layers, tile, host_bytes=5 << 20)
        monkeypatch.setattr(model.planner, "plan_for", lambda *_, plan=plan, **options: plan)
        for _ in range(2):
            loss, found = micro_step(batch, 50), gradients(model)
            if tile is None and all(keep.level != SaveLevel.NOTHING for keep in layers):
                assert torch.equal(loss, expected[0]) and torch.equal(found, expected[1])
            assert torch.allclose(loss, expected[0], rtol=1e-6)
            assert (found - expected[1]).norm() < 1e-5 * expected[1].norm()


def test_weights_that_stay_dequantised_change_nothing(tmp_path):
    model = load(make_tiny_model(tmp_path / "m"))
    batch, micro_step = collate(random_samples([40, 9, 30])), MicroStep(model, capture=False)
    expected = micro_step(batch, 50), gradients(model)
    for count in (1, 2, 0):
        micro_step._passes.keep_resident(count)
        assert [p.resident is not None for p in model.projections()] == [True] * 4 * count + [
            False
        ] * 4 * (2 - count)
        with model.resident_weights():
            pass
        loss, found = micro_step(batch, 50), gradients(model)
        assert torch.equal(loss, expected[0]) and torch.equal(found, expected[1])
    micro_step._passes.keep_resident(2)
    micro_step.close()
    assert not any(p.resident is not None for p in model.projections())


def test_tensors_that_leave_are_let_go_of_first_come_first_served():
    offload, alive = ActivationOffloader(1 << 20, torch.device("cpu")), []
    for i in range(3):
        x = torch.full((128,), i)
        alive.append(weakref.ref(x))
        offload.offload(i, Activations(x))
    del x
    for nbytes, left in ((4096, 3), (2048, 2), (1024, 1), (1023, 0)):
        offload.wait_until_in_flight(nbytes)
        assert [ref() is not None for ref in alive] == [False] * (3 - left) + [True] * left
    assert [int(offload.restore(i).x[0]) for i in (2, 1, 0)] == [2, 1, 0]


def test_a_step_that_fails_leaves_nothing_on_its_way_and_the_next_one_is_right(
    tmp_path, monkeypatch
):
    model = load(make_tiny_model(tmp_path / "m"), dtype=torch.float32)
    batch, micro_step = collate(random_samples([40, 9])), MicroStep(model, capture=False)
    layers = (LayerPlan(SaveLevel.INPUT, offloaded=True), LayerPlan(SaveLevel.INPUT))
    monkeypatch.setattr(
        model.planner, "plan_for", lambda *_, **options: Plan(layers, host_bytes=1 << 20)
    )
    expected, kept = (micro_step(batch, 50), gradients(model)), []
    put = ActivationOffloader.offload
    monkeypatch.setattr(
        ActivationOffloader,
        "offload",
        lambda self, i, a: (put(self, i, a), kept.append(weakref.ref(a.x))),
    )
    with pytest.raises(ValueError, match="label 600 is neither"):
        micro_step(dataclasses.replace(batch, labels=torch.full_like(batch.labels, 600)), 1)
    assert len(kept) == 1 and kept[0]() is None
    found = micro_step(batch, 50), gradients(model)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_an_arena_that_is_too_small_is_an_error(tmp_path, monkeypatch):
    model = load(make_tiny_model(tmp_path / "m"))
    monkeypatch.setattr(
        model.planner,
        "plan_for",
        lambda *_, **options: Plan(
            (LayerPlan(SaveLevel.INPUT, offloaded=True),) * 2, host_bytes=1000
        ),
    )
    with pytest.raises(ValueError, match="an arena of 1000 bytes has no room for layer 0"):
        MicroStep(model, capture=False)(collate(random_samples([40])), 50)

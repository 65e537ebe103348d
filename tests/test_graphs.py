"""Micro-steps as CUDA graphs: the same bits as plain launches, whatever happens in between."""

import gc
import json

import pytest
import torch
from test_micro_step import gradients, load, random_samples
from tiny import make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.data.batching import collate
from minitune.memory.offload import ActivationOffloader
from minitune.memory.plan import Plan
from minitune.memory.planner import Planner
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.packed_sequences import PackedSequences
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden": 256,
    "layers": 3,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "ffn": 704,
    "vocab": 512,
}


@pytest.fixture
def model(tmp_path):
    return load(make_tiny_model(tmp_path / "m", **SHAPE), dtype=torch.bfloat16)


@pytest.fixture
def micro_step(model):
    return MicroStep(model)


BATCHES = [
    collate(random_samples(lengths))
    for lengths in ([40, 9, 30], [200, 250, 100, 90], [128, 128], [3])
]


def results(step, batches, model):
    """Loss and gradients of each batch."""
    return [(step(batch, 50), gradients(model)) for batch in batches]


def assert_same_bits(found, expected):
    for (loss, mine), (expected_loss, theirs) in zip(found, expected, strict=True):
        assert torch.equal(loss, expected_loss) and torch.equal(mine, theirs) and mine.any()


@pytest.fixture
def plain(model):
    """What plain launches give."""
    return results(MicroStep(model, capture=False), BATCHES, model)


@pytest.mark.parametrize("attention", ["triton", "auto"])
@pytest.mark.parametrize("lengths", [[128, 128], [100], [40, 9, 30]])
def test_a_replayed_graph_gives_the_bits_of_plain_launches_and_waits_for_nothing(
    tmp_path, lengths, attention
):
    model = load(
        make_tiny_model(tmp_path / "m", **SHAPE), dtype=torch.bfloat16, attention=attention
    )
    batch, other = collate(random_samples(lengths)), collate(random_samples(lengths, seed=2))
    micro_step = MicroStep(model)
    plain = micro_step(batch, 50), gradients(model)  # and captured
    captured = micro_step(batch, 50), gradients(model)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        different = micro_step(other, 50)
        replayed = micro_step(batch, 50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    both = gradients(model)
    assert torch.equal(plain[0], captured[0]) and torch.equal(plain[1], captured[1])
    assert torch.equal(plain[0], replayed) and not torch.equal(plain[0], different)
    micro_step(other, 50)
    micro_step(batch, 50)
    assert torch.equal(both, gradients(model))


def test_sizes_may_come_in_any_order_larger_ones_after_smaller(micro_step, model, plain):
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 1, 0, 0]):
        assert_same_bits(
            results(micro_step, [BATCHES[i] for i in order], model), [plain[i] for i in order]
        )


def test_cudnn_attention_is_replayed_as_it_is_launched(tmp_path):
    folder = make_tiny_model(tmp_path / "m", **SHAPE, positions=4096)
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=4096, dtype=torch.bfloat16)
    FastLanguageModel.get_peft_model(model, r=8)
    for _, p in model.trainable_parameters():
        torch.nn.init.normal_(p, std=0.05)
    batch = collate(random_samples([4096]))
    assert (
        model.shared.attention_kwargs(PackedSequences.from_positions(batch.position_ids))[
            "uniform_seqlen"
        ]
        == 4096
    )
    expected, found = (
        results(MicroStep(model, capture=c), [batch] * 2, model)[1] for c in (False, True)
    )
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).norm() < 1e-2 * expected[
        1
    ].norm()  # its backward does not repeat bit for bit


def test_gradients_and_adapters_that_moved_are_found(micro_step, model, plain):
    assert_same_bits(results(micro_step, BATCHES[:2], model), plain[:2])
    for _, p in model.trainable_parameters():
        p.grad = torch.zeros_like(p)
    assert_same_bits(results(micro_step, BATCHES[:2], model), plain[:2])
    kept = [p.data for _, p in model.trainable_parameters()]
    for _, p in model.trainable_parameters():
        p.data = p.data.clone()
    for p in kept:
        p.fill_(float("nan"))
    assert_same_bits(results(micro_step, BATCHES[:2], model), plain[:2])


def test_evaluation_and_generation_and_dense_weights_between_replays_disturb_nothing(
    micro_step, model, plain
):
    inputs = {
        "input_ids": BATCHES[1].input_ids,
        "labels": BATCHES[1].labels,
        "position_ids": BATCHES[1].position_ids,
    }
    for _ in range(2):
        assert_same_bits(results(micro_step, BATCHES, model), plain)
        with micro_step.memory_pool(), torch.no_grad():
            model(**inputs)
        model.generate([[5, 6, 7]], max_new_tokens=3)
    with model.resident_weights():
        assert_same_bits(results(micro_step, BATCHES, model), plain)
    filler = [
        torch.full((64, 1024), float("nan"), device="cuda") for _ in range(64)
    ]  # where they were
    assert_same_bits(results(micro_step, BATCHES, model), plain)
    del filler


def test_closing_gives_the_memory_back(micro_step, model, plain):
    results(micro_step, BATCHES, model)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    micro_step.close()
    assert torch.cuda.memory_reserved() < before
    assert_same_bits(results(micro_step, BATCHES, model), plain)


@pytest.mark.parametrize(
    ("layers", "tile"),
    [
        (
            (
                LayerPlan(SaveLevel.INPUT, True),
                LayerPlan(SaveLevel.QKV, True),
                LayerPlan(SaveLevel.ALL),
            ),
            None,
        ),
        (
            (LayerPlan(SaveLevel.QKV, True), LayerPlan(SaveLevel.ALL), LayerPlan(SaveLevel.ALL)),
            None,
        ),  # its copies may wait while the second layer runs
        (
            (
                LayerPlan(SaveLevel.INPUT, True),
                LayerPlan(SaveLevel.NOTHING),
                LayerPlan(SaveLevel.QKV, True),
            ),
            64,
        ),
    ],
)
def test_offloading_and_tiles_within_graphs_change_nothing(
    micro_step, model, plain, monkeypatch, layers, tile
):
    plan = Plan(layers, tile, host_bytes=16 << 20, saved_bytes=16 << 20)
    monkeypatch.setattr(model.planner, "plan_for", lambda *_, **options: plan)
    exact = tile is None
    for _ in range(3):
        found = results(micro_step, BATCHES, model)
        for (loss, mine), (expected_loss, theirs) in zip(found, plain, strict=True):
            assert torch.equal(loss, expected_loss) or not exact
            assert (loss - expected_loss).abs() < 1e-3 * expected_loss
            assert (mine - theirs).norm() <= (0 if exact else 2e-2) * theirs.norm()


def test_a_tensor_stays_until_it_has_been_copied_out_however_long_that_takes(tmp_path, monkeypatch):
    model = load(make_tiny_model(tmp_path / "m", **SHAPE | {"layers": 6}), dtype=torch.bfloat16)
    expected, copy = (
        results(MicroStep(model, capture=False), BATCHES[:2], model),
        ActivationOffloader._copy,
    )
    far = 256 << 10  # bytes that may wait: some of the first three layers', not all

    def slowly(offload, sources, targets):
        with torch.cuda.stream(offload._stream):
            torch.cuda._sleep(5_000_000)
        copy(offload, sources, targets)

    monkeypatch.setattr(ActivationOffloader, "_copy", slowly)
    layers = (LayerPlan(SaveLevel.QKV, True),) * 3 + (LayerPlan(SaveLevel.ALL),) * 3
    plan = Plan(layers, host_bytes=16 << 20, saved_bytes=3 * far)
    monkeypatch.setattr(model.planner, "plan_for", lambda *_, **options: plan)
    micro_step = MicroStep(model)
    for _ in range(3):
        assert_same_bits(results(micro_step, BATCHES[:2], model), expected)


@pytest.mark.parametrize(
    ("lengths", "budgets"),
    [
        ([1024] * 8, ((2.0, 0), (1.0, 0), (0.8, 0), (0.8, 4), (1.4, 4))),
        ([65536], ((2.5, 0), (4.0, 0))),
    ],
)
def test_peak_memory_is_what_was_planned(tmp_path, lengths, budgets):
    """A layer of 8B's proportions; weights are counted as they are. Of the long sample, attention takes the most."""
    shape = {
        "hidden": 1024,
        "layers": 8,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 128,
        "ffn": 3584,
        "vocab": 4096,
    }
    folder = make_tiny_model(tmp_path / "m", **shape, positions=max(lengths))
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=max(lengths), dtype=torch.bfloat16
    )
    FastLanguageModel.get_peft_model(model, r=16)
    optimizer = FlatAdamW([p for _, p in model.trainable_parameters()])
    batch = collate(random_samples(lengths, vocab=4096))
    for budget, host in budgets:
        model.planner = Planner(None, int(budget * 2**30), host << 30)
        micro_step = MicroStep(model)
        optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            micro_step(batch, 8000)
        measured, planned = torch.cuda.max_memory_allocated(), micro_step.planner.largest
        reserved = torch.cuda.max_memory_reserved()
        figures = ", ".join(f"{x / 2**30:.3f}" for x in (planned.peak, measured, reserved))
        print(f"budget {budget} GiB, host {host}: planned, measured, reserved {figures}; {planned}")
        micro_step.close()
        assert measured == pytest.approx(
            planned.peak, rel=0.05
        ) and reserved < 1.2 * planned.peak + (128 << 20)


def test_weights_stay_dequantised_where_memory_is_left(micro_step, model, plain):
    assert model.planner.level is None
    for order in ([3, 0, 2, 1], [0, 1, 2, 3]):
        assert_same_bits(
            results(micro_step, [BATCHES[i] for i in order], model), [plain[i] for i in order]
        )
    assert micro_step.planner.largest.resident_layers == len(model.model.layers)
    assert all(projection.resident is not None for projection in model.projections())
    micro_step.close()
    assert all(projection.resident is None for projection in model.projections())
    model.planner.memory_budget = torch.cuda.memory_allocated() + (50 << 20)
    assert_same_bits(results(micro_step, BATCHES, model), plain)


def test_an_embedding_in_host_memory_changes_nothing(tmp_path):
    folder, found = make_tiny_model(tmp_path / "m", **SHAPE, tie=False), []
    for offload in (False, True):
        model = load(folder, dtype=torch.bfloat16, offload_embedding=offload)
        assert model.model.embed_tokens.weight.is_cuda != offload
        micro_step = MicroStep(model)
        found.append(results(micro_step, BATCHES, model) + results(micro_step, BATCHES, model))
    assert_same_bits(*found)


def fail():
    raise torch.OutOfMemoryError("no memory is left")


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def disturb(model, monkeypatch):
    """disturb(f): f runs in the middle of every backward pass that is being captured."""
    layer = model.model.layers[1]
    backward = type(layer).backward

    def disturb(f):
        def disturbed(self, *args, **options):
            if self is layer and torch.cuda.is_current_stream_capturing():
                f()
            return backward(self, *args, **options)

        monkeypatch.setattr(type(layer), "backward", disturbed)

    return disturb


@pytest.mark.alone
@pytest.mark.parametrize(
    ("happens", "why"), [(fail, "no memory is left"), (torch.cuda.synchronize, "")]
)
def test_after_a_capture_that_fails_everything_is_launched_plainly(
    micro_step, model, plain, disturb, happens, why
):
    """A wait for the device is what no capture allows."""
    assert_same_bits(results(micro_step, BATCHES[:1], model), plain[:1])
    disturb(happens)
    with pytest.warns(
        UserWarning, match=f"without CUDA graphs from now on: .* of 640 tokens.*{why}"
    ):
        assert_same_bits(results(micro_step, BATCHES[1:2], model), plain[1:2])
    assert_same_bits(results(micro_step, BATCHES, model), plain)


@pytest.mark.alone
def test_an_interrupt_during_a_capture_leaves_the_gpu_usable(
    micro_step, model, plain, disturb, monkeypatch
):
    disturb(interrupt)
    with pytest.raises(KeyboardInterrupt):
        micro_step(BATCHES[0], 50)
    monkeypatch.undo()
    gradients(model)
    with pytest.warns(
        UserWarning, match="without CUDA graphs from now on: a capture was interrupted"
    ):
        assert_same_bits(results(micro_step, BATCHES[:1], model), plain[:1])
    assert_same_bits(results(micro_step, BATCHES, model), plain)
    assert_same_bits(results(MicroStep(model), BATCHES, model), plain)


def trainer_of(folder, output, **settings):
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, dtype=torch.bfloat16
    )
    FastLanguageModel.get_peft_model(model, r=8)
    samples = random_samples(range(20, 60), vocab=300)
    records = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
    args = SFTConfig(
        output_dir=str(output), per_device_train_batch_size=4, learning_rate=1e-2, **settings
    )
    return SFTTrainer(model, args, records, records[:4], processing_class=tokenizer)


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_that_evaluates_or_resumes_with_graphs_ends_in_the_same_bits(tmp_path):
    folder = make_tiny_model(tmp_path / "m", **SHAPE)
    settings = {"max_steps": 8, "logging_steps": 1, "save_strategy": "no"}
    trainer_of(folder, tmp_path / "plain", cuda_graphs=False, **settings).train()
    often = settings | {"eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(folder, tmp_path / "graphs", **often)
    trainer.train()
    saved = settings | {"save_strategy": "steps", "save_steps": 4}
    trainer_of(folder, tmp_path / "saved", **saved).train()
    resumed = trainer_of(folder, tmp_path / "resumed", **saved)
    resumed.train(resume_from_checkpoint=tmp_path / "saved" / "checkpoint-4")
    found = {name: losses(tmp_path / name) for name in ("plain", "graphs", "saved", "resumed")}
    assert len(found["saved"]) == 8 and found["graphs"] == found["saved"]
    assert found["plain"] == pytest.approx(
        found["saved"], rel=1e-2
    )  # without padding a sum may take another order
    assert found["resumed"] == found["saved"][4:]
    adapters = [[p.detach() for _, p in t.model.trainable_parameters()] for t in (trainer, resumed)]
    assert all(map(torch.equal, *adapters))

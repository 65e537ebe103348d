"""Resumed runs: the same bits as without an interruption, and warnings if settings changed."""

import gc
import json
import shutil

import pytest
import torch
from micro_step_checks import WIDE_SHAPE, random_samples
from tiny import make_tiny_model
from training_runs import (
    ADAPTER_FILE,
    RECORDS,
    adapter_bytes,
    checkpoint_names,
    edit_json,
    make_smallest_model,
    new_trainer,
    read_metrics,
    without_times,
)

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.memory import planner as planner_module
from minitune.memory.planner import Planner
from minitune.training.checkpoint import STATE

CHECKPOINTS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def finished(smallest, tmp_path_factory):
    """Return a run of 6 steps with checkpoints 2, 4 and 6, which tests copy."""
    output = tmp_path_factory.mktemp("finished")
    new_trainer(smallest, output, **CHECKPOINTS).train()
    return output


def test_a_folder_without_a_checkpoint_is_not_resumed(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path / "new", **CHECKPOINTS)
    with pytest.raises(ValueError, match=r"no checkpoint to resume from; call train\(\) without"):
        trainer.train(resume_from_checkpoint=True)


def test_resumed_run_is_bit_identical_to_one_that_was_not_interrupted(smallest, tmp_path):
    settings = {
        "max_steps": 10,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "warmup_steps": 2,
    }
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    new_trainer(smallest, straight, **settings).train()
    shutil.copytree(straight, resumed)
    for name in ("checkpoint-8", "checkpoint-10", "adapter"):
        shutil.rmtree(resumed / name)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # a line that a crash cut short
    result = new_trainer(smallest, resumed, **settings).train(resume_from_checkpoint=True)
    assert without_times(read_metrics(resumed)) == without_times(read_metrics(straight))
    assert result.global_step == 10
    for file in (ADAPTER_FILE, "checkpoint-10/optimizer.safetensors"):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes()


@pytest.mark.parametrize(("strategy", "kept"), [("steps", [2, 5, 6]), ("no", [2])])
def test_run_that_goes_back_to_an_earlier_checkpoint_drops_the_later_ones(
    smallest, run, strategy, kept
):
    settings = {**CHECKPOINTS, "save_strategy": strategy, "save_steps": 5}
    trainer = new_trainer(smallest, run, **settings)
    trainer.train(resume_from_checkpoint=run / "checkpoint-2")
    assert checkpoint_names(run) == [f"checkpoint-{step}" for step in kept]


def test_checkpoint_just_written_outlives_those_of_a_branch_that_was_left(smallest, run):
    trainer = new_trainer(smallest, run, **CHECKPOINTS, save_total_limit=1)
    accumulate, checkpoints_at = trainer.accumulate, {}

    def recording(samples):
        checkpoints_at[trainer.progress.step] = checkpoint_names(run)
        return accumulate(samples)

    trainer.accumulate = recording
    trainer.train(resume_from_checkpoint=run / "checkpoint-2")
    assert checkpoints_at[4] == ["checkpoint-4"] and len(checkpoints_at[2]) == 3


def test_resume_with_nothing_saved_says_that_it_starts_from_the_beginning(
    smallest, tmp_path, capsys
):
    settings = {"max_steps": 1, "resume": True}
    assert new_trainer(smallest, tmp_path / "run", **settings).train().global_step == 1
    note = "holds no checkpoint to resume: the run starts at step 0"
    assert note in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="an adapter but no checkpoint"):
        new_trainer(smallest, tmp_path / "run", **settings).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"progress": None}, "progress is None"),
        ({"progress": {}}, "step is None"),
        ({"identity": []}, "identity is "),
        ({"plan_inputs": None}, "plan_inputs is None"),
        ({"plan_inputs": {"memory_budget": 1.5}}, "plan_inputs.memory_budget is 1.5"),
        (
            {"plan_inputs": {"memory_budget": 1, "host_budget": -1}},
            "plan_inputs.host_budget is -1",
        ),
    ],
)
def test_checkpoint_whose_state_lacks_something_is_refused_by_file(smallest, run, change, message):
    edit_json(run / "checkpoint-6" / STATE, **change)
    with pytest.raises(ValueError, match=f"state.json: {message}"):
        new_trainer(smallest, run, **CHECKPOINTS, resume=True).train()


def test_checkpoint_past_the_last_step_is_refused_and_one_at_it_has_nothing_left_to_train(
    smallest, run, capsys
):
    before = sorted(run.rglob("*"))
    settings = {"save_strategy": "steps", "save_steps": 2, "resume": True}
    capsys.readouterr()
    for less, words in (
        ({"max_steps": 5}, "checkpoint-6 is already past max_steps 5"),
        (
            {"num_train_epochs": 0.4},
            "checkpoint-6 is already past the 2 steps of num_train_epochs 0.4",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            new_trainer(smallest, run, **settings, **less).train()
    assert capsys.readouterr().err == "" and sorted(run.rglob("*")) == before
    assert new_trainer(smallest, run, **settings, max_steps=6).train().global_step == 6
    assert "checkpoint-6 is of the last step: nothing is left to train" in capsys.readouterr().err


# ---- changed settings


def test_resume_refuses_what_changes_the_order_and_warns_of_what_changes_the_mathematics(
    smallest, run, capsys
):
    for change in (
        {"seed": 1},
        {"per_device_train_batch_size": 4},
        {"records": RECORDS[:20]},
        {"max_length": 64},
    ):
        with pytest.raises(ValueError, match="cannot be continued"):
            new_trainer(smallest, run, **{**CHECKPOINTS, **change}, resume=True).train()
    capsys.readouterr()
    settings = {**CHECKPOINTS, "max_steps": 7, "learning_rate": 5e-3}
    new_trainer(smallest, run, **settings, resume=True).train()
    assert "learning_rate 0.01 -> 0.005, total_steps 6 -> 7" in capsys.readouterr().err
    model_options = {"dtype": torch.bfloat16, "load_in_4bit": False}
    trainer = new_trainer(smallest, run, model_options=model_options, **settings)
    trainer.train(resume_from_checkpoint=run / "checkpoint-6")
    assert "load_in_4bit True -> False, dtype float32 -> bfloat16" in capsys.readouterr().err
    model, tokenizer = FastLanguageModel.from_pretrained(smallest, max_seq_length=128, device="cpu")
    FastLanguageModel.get_peft_model(model, r=2)
    args = SFTConfig(**settings, output_dir=run, per_device_train_batch_size=5)
    with pytest.raises(ValueError, match="r is 4, but the model's adapter has 2"):
        SFTTrainer(model, args, RECORDS, None, tokenizer).train(
            resume_from_checkpoint=run / "checkpoint-6"
        )
    assert "other settings" not in capsys.readouterr().err


def test_the_refusal_of_a_resume_names_only_what_refuses_and_shows_no_hash(smallest, run):
    changes = {**CHECKPOINTS, "seed": 1, "learning_rate": 5e-3, "records": RECORDS[:20]}
    with pytest.raises(ValueError, match=r"would follow: seed \d+ -> 1, the data changed; restore"):
        new_trainer(smallest, run, **changes, resume=True).train()


def test_resume_names_a_changed_setting_that_decides_the_order_of_sums(smallest, run, capsys):
    new_trainer(smallest, run, **CHECKPOINTS, resume=True).train()
    assert "warning" not in capsys.readouterr().err
    new_trainer(smallest, run, **CHECKPOINTS, resume=True, micro_step_tokens=64).train()
    assert (
        "checkpoint-6 is continued with micro_step_tokens None -> 64: losses may differ in rounding"
    ) in capsys.readouterr().err
    path = run / "checkpoint-6" / STATE
    identity = json.loads(path.read_text())["identity"]
    for name, value in {
        "memory_budget": "8GiB",
        "host_memory": "4GiB",
        "use_gradient_checkpointing": "true",
        "cuda_graphs": False,
        "attention": "triton",
        "device": "another GPU",
        "threads": 7,
    }.items():
        edit_json(path, identity={**identity, name: value})
        new_trainer(smallest, run, **CHECKPOINTS, resume=True).train()
        error = capsys.readouterr().err
        assert f"is continued with {name} {value} -> {identity[name]}: losses may" in error


def test_checkpoint_of_an_older_version_without_these_settings_is_continued(smallest, run, capsys):
    path = run / "checkpoint-4" / STATE
    state = json.loads(path.read_text())
    del state["plan_inputs"]
    for name in ("micro_step_tokens", "memory_budget", "cuda_graphs", "device"):
        del state["identity"][name]
    path.write_text(json.dumps(state))
    before = adapter_bytes(run)
    trainer = new_trainer(smallest, run, **CHECKPOINTS)
    trainer.train(resume_from_checkpoint=run / "checkpoint-4")
    assert "warning" not in capsys.readouterr().err
    assert adapter_bytes(run) == before


# ---- plans


class Memory:
    """The free memory that planners see, in bytes."""

    def __init__(self, monkeypatch):
        self.free = 0
        monkeypatch.setattr(planner_module, "free_memory", lambda device: self.free)


@pytest.fixture
def memory(monkeypatch):
    """Return free memory that a test sets."""
    return Memory(monkeypatch)


def test_resumed_run_plans_as_before_although_more_memory_is_free(tmp_path, memory, capsys):
    wide = make_smallest_model(tmp_path / "model", ffn=512)
    # With 12 samples a step has more than 256 tokens. Without memory the plan cuts them into tiles
    # of 256 rows, and the gradients of the MLP's adapter are then sums of tiles.
    settings = {**CHECKPOINTS, "max_steps": 4, "per_device_train_batch_size": 12}
    scarce, ample = 1, 64 << 20
    output, other = tmp_path / "run", tmp_path / "other"

    memory.free = ample
    trainer = new_trainer(wide, other, **settings)
    trainer.train()
    assert trainer.planner.largest.tile_rows is None
    memory.free = scarce
    trainer = new_trainer(wide, output, **settings)
    trainer.train()
    plan = trainer.planner.largest
    assert plan.tile_rows == 256
    expected = adapter_bytes(output)
    assert adapter_bytes(other) != expected  # otherwise this test could not fail

    memory.free = ample
    capsys.readouterr()
    resumed = new_trainer(wide, output, **settings)
    resumed.train(resume_from_checkpoint=output / "checkpoint-2")
    assert resumed.planner.largest == plan
    assert adapter_bytes(output) == expected
    assert "warning" not in capsys.readouterr().err

    memory.free = scarce
    resumed = new_trainer(wide, other, **settings)
    resumed.train(resume_from_checkpoint=other / "checkpoint-2")
    assert resumed.planner.largest == plan
    assert (
        "checkpoint-2 was planned with 0.05 GiB of memory on cpu, of which 0.00 GiB are free: "
        "losses may differ in rounding"
    ) in capsys.readouterr().err


def test_resumed_run_keeps_the_budgets_that_out_of_memory_errors_lowered(
    smallest, tmp_path, memory, monkeypatch
):
    memory.free = 64 << 20
    trainer = new_trainer(smallest, tmp_path, **CHECKPOINTS)
    loss, failed = trainer.model.rows_loss, []

    def full_once(*arguments, **options):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*arguments, **options)

    monkeypatch.setattr(trainer.model, "rows_loss", full_once)
    with pytest.warns(UserWarning, match="trying the step again"):
        trainer.train()
    lowered = trainer.planner.memory_budget
    assert lowered < 0.7 * memory.free
    resumed = new_trainer(smallest, tmp_path, **CHECKPOINTS)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert resumed.planner.memory_budget == lowered


def test_resumed_run_takes_micro_steps_of_the_recorded_size(smallest, run):
    path = run / "checkpoint-2" / STATE
    inputs = json.loads(path.read_text())["plan_inputs"]
    assert inputs["micro_step_tokens"] == 4096
    edit_json(path, plan_inputs={**inputs, "micro_step_tokens": 100})
    trainer = new_trainer(smallest, run, **CHECKPOINTS)
    trainer.train(resume_from_checkpoint=run / "checkpoint-2")
    assert trainer.micro_step_tokens == 100


@pytest.mark.gpu
@pytest.mark.alone
def test_resumed_run_on_a_gpu_with_more_free_memory_ends_in_the_same_bits(tmp_path):
    folder = make_tiny_model(tmp_path / "model", **WIDE_SHAPE, positions=1024)
    samples = random_samples([1024] * 24, vocab=400)
    settings = {
        "records": [{"input_ids": s.input_ids, "labels": s.labels} for s in samples],
        "model_options": {"device": "cuda", "dtype": torch.bfloat16, "max_seq_length": 1024},
        **CHECKPOINTS,
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    trainer = new_trainer(folder, tmp_path / "run", **settings)
    trainer.train()
    scarce = trainer.planner.largest
    expected = adapter_bytes(tmp_path / "run")

    torch.cuda.set_per_process_memory_fraction(1.0)
    ample = Planner(None).plan_for_tokens(trainer.model, 8192, 1024)
    assert ample.layers != scarce.layers
    del trainer  # its memory would count as allocated in the plans of the resumed run
    gc.collect()
    torch.cuda.empty_cache()
    resumed = new_trainer(folder, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    plan = resumed.planner.largest
    assert (plan.layers, plan.tile_rows) == (scarce.layers, scarce.tile_rows)
    assert adapter_bytes(tmp_path / "run") == expected

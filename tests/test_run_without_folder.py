"""A program in Python trains without a run folder, and nothing is written."""

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gguf_files import make_tiny_gguf
from safetensors.torch import load_file
from training_runs import RECORDS, new_trainer, train_with_ctrl_c, without_times

from minitune import TrainerCallback
from minitune.commands.train import main as train_command
from minitune.config.sft_config import SFTConfig

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "max_steps": 4}
WRITING_EVENTS = ("os.link", "os.mkdir", "os.rename", "os.symlink", "os.truncate", "shutil.")
_watched: list[list[tuple]] = []  # the audit events of the innermost `writes`


def _audit(event, arguments):
    if not _watched:
        return
    if event == "open":
        path, _, flags = arguments
        is_writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_writing and path != os.devnull:
            _watched[-1].append((event, path))
    elif event.startswith(WRITING_EVENTS):
        _watched[-1].append((event, *arguments))


sys.addaudithook(_audit)  # there is no way to remove one


@contextmanager
def writes():
    """Yield the list of everything that is opened for writing, made or renamed in the block."""
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


@pytest.fixture(autouse=True)
def inside_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def adapter(model):
    """Return the trained values of a model, by name."""
    return {name: p.detach().clone() for name, p in model.trainable_parameters()}


def test_a_run_without_a_folder_writes_nothing_and_gives_the_bits_of_one_with_a_folder(
    smallest, tmp_path
):
    settings = {**EVALUATED, "sample_prompts": ("3 lamps",)}
    saved = new_trainer(smallest, tmp_path / "run", RECORDS[:3], **settings)
    result = saved.train()
    with writes() as written:
        trainer = new_trainer(smallest, None, RECORDS[:3], **settings)
        same = trainer.train()
    assert written == [] and os.listdir() == ["run"]
    assert trainer.output is None
    assert same.training_loss == result.training_loss
    records, saved_records = (run.state.log_history[:-1] for run in (trainer, saved))
    assert without_times(records) == without_times(saved_records)
    assert trainer.state.sample_answers == saved.state.sample_answers
    assert [record["step"] for record in trainer.state.sample_answers] == [0, 2, 4]
    values, file = adapter(trainer.model), load_file("run/adapter/adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in values} == set(file)
    assert all(torch.equal(p, file[f"base_model.model.{name}"]) for name, p in values.items())


def test_a_gguf_base_writes_its_small_files_for_the_time_of_the_process(tmp_path, monkeypatch):
    base = make_tiny_gguf(tmp_path, "q8_0", layers=1, heads=2, kv_heads=1)
    before, temporary = set(os.listdir()), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with writes() as loading:
        trainer = new_trainer(base, None, max_steps=1)
    with writes() as training:
        trainer.train()
    assert loading != [] and training == []
    assert all(Path(path).is_relative_to(temporary) for _, path, *_ in loading)
    assert set(os.listdir()) == {*before, "temporary"}


def test_the_lines_of_the_run_say_that_nothing_is_saved(smallest, capsys):
    new_trainer(smallest, None, max_steps=1).train()
    lines = capsys.readouterr().err.splitlines()
    assert "output     nothing is written: the run has no folder" in lines
    assert lines[-1] == (
        "saved      nothing: the adapter is in the model; save_model(FOLDER) writes it"
    )


def test_save_model_needs_a_folder_of_the_caller(smallest, tmp_path):
    trainer = new_trainer(smallest, None, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match=r"this run has no folder.*pass a folder to save_model"):
        trainer.save_model()
    trainer.save_model("mine")
    saved = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    values = adapter(trainer.model)
    assert all(torch.equal(p, saved[f"base_model.model.{name}"]) for name, p in values.items())
    assert os.listdir() == ["mine"]


@pytest.mark.parametrize("step", [0, 2])
def test_ctrl_c_ends_after_the_step_and_says_that_nothing_was_saved(smallest, capsys, step):
    trainer = new_trainer(smallest, None, max_steps=4)
    with writes() as written:
        train_with_ctrl_c(trainer, step)
    assert written == [] and trainer.progress.step == step + 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted after step {step + 1} of 4; nothing was saved, because the run has no "
        "folder; save_model(FOLDER) writes the adapter as it is now"
    )


def test_a_second_ctrl_c_before_the_first_step_offers_no_adapter(smallest, capsys):
    train_with_ctrl_c(new_trainer(smallest, None, max_steps=4), step=0, times=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "interrupted after step 0 of 4; nothing was saved, because the run has no folder"
    )


@pytest.mark.parametrize("resume", [True, "runs/1/checkpoint-1"])
def test_resuming_needs_a_folder(smallest, resume):
    trainer = new_trainer(smallest, None, max_steps=2)
    with pytest.raises(ValueError, match="resume needs output_dir"):
        trainer.train(resume_from_checkpoint=resume)
    with pytest.raises(ValueError, match="resume needs output_dir"):
        new_trainer(smallest, None, max_steps=2, resume=True).train()


def test_tensorboard_needs_a_folder(smallest, tmp_path, monkeypatch):
    ignore = SimpleNamespace(add_scalar=lambda *_: None, flush=lambda: None, close=lambda: None)
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda log_dir: Path(log_dir).mkdir() or ignore
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer = new_trainer(smallest, None, max_steps=1, report_to="tensorboard")
    with pytest.raises(
        ValueError, match=r"report_to 'tensorboard'.*name logging_dir, or output_dir"
    ):
        trainer.train()
    settings = {"report_to": "tensorboard", "logging_dir": tmp_path / "board"}
    new_trainer(smallest, None, max_steps=1, **settings).train()
    assert os.listdir() == ["board"]


def test_a_checkpoint_that_a_callback_wants_is_refused(smallest):
    class Saving(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    trainer = new_trainer(smallest, None, max_steps=2)
    trainer.add_callback(Saving)
    with pytest.raises(ValueError, match=r"should_save.*no folder; name output_dir"):
        trainer.train()
    assert os.listdir() == []


def test_the_best_checkpoint_needs_checkpoints():
    with pytest.raises(ValueError, match="load_best_model_at_end needs checkpoints"):
        SFTConfig(eval_strategy="steps", save_strategy="no", load_best_model_at_end=True)


def test_a_loss_that_is_not_finite_names_no_checkpoint(smallest):
    trainer = new_trainer(smallest, None, max_steps=3, logging_steps=1)
    with torch.no_grad():
        next(iter(trainer.model.trainable_parameters()))[1].fill_(float("nan"))
    with pytest.raises(ValueError, match="last checkpoint: none was saved"):
        trainer.train()
    assert os.listdir() == []


def test_a_program_that_saves_checkpoints_gets_a_numbered_folder(smallest):
    trainer = new_trainer(smallest, None, max_steps=1, save_strategy="steps")
    trainer.train()
    assert trainer.output.as_posix() == "runs/1"
    assert "checkpoint-1" in os.listdir(trainer.output)


def test_a_command_makes_a_numbered_folder_in_any_case(smallest, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "3 lamps", "completion": " ok"}\n' * 4)
    arguments = ["--model", str(smallest), "--data", "data.jsonl", "--max-steps", "1"]
    assert train_command([*arguments, "--save-strategy", "no"]) == 0
    assert {"adapter", "config.toml", "metrics.jsonl"} <= set(os.listdir("runs/1"))


def test_two_trainings_one_after_the_other_are_independent(smallest):
    first, second = (new_trainer(smallest, None, max_steps=2) for _ in range(2))
    first.train()
    before = adapter(first.model)
    second.train()
    assert all(torch.equal(p, before[name]) for name, p in adapter(first.model).items())
    assert all(torch.equal(p, before[name]) for name, p in adapter(second.model).items())

"""Only files that a run wrote are deleted; a run removes what a killed process left."""

import json
import shutil

import pytest
from training_runs import adapter_bytes, checkpoint_names, new_trainer

from minitune.training.checkpoint import STATE
from minitune.training.own_files import OUTPUTS, checkpoints, delete, remove_leftovers
from minitune.training.run_folder import clear_run
from minitune.training.write_models import write_models

CHECKPOINTS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def finished(smallest, tmp_path_factory):
    """Return a run of 4 steps with checkpoint-2 and checkpoint-4, which tests copy."""
    output = tmp_path_factory.mktemp("finished")
    new_trainer(smallest, output, **CHECKPOINTS).train()
    return output


def mine(folder, name="precious.txt", text="mine"):
    """Make a folder with a file of the user's, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


# ---- folders of other programs


@pytest.mark.parametrize("state", ['{"version": 3}', "not JSON", "[]"])
def test_a_checkpoint_folder_with_a_state_of_another_program_is_not_a_runs(smallest, run, state):
    foreign = mine(run / "checkpoint-9", STATE, state)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    new_trainer(smallest, run, **CHECKPOINTS, overwrite=True).train()
    assert foreign.read_text() == state
    before = sorted(run.rglob("*"))
    longer = {**CHECKPOINTS, "max_steps": 10}
    for settings in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="checkpoint-9 has the name of a checkpoint, but no"):
            new_trainer(smallest, run, **longer, **settings).train()
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("name", ["adapter", "config.toml", "metrics.jsonl", "run.json"])
@pytest.mark.parametrize("settings", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_users_own_file_of_a_name_that_a_run_writes_is_refused_and_stays(
    smallest, tmp_path, name, settings
):
    path = tmp_path / name if "." in name else tmp_path / name / "adapter_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"{name} exists, but no run wrote it"):
        new_trainer(smallest, tmp_path, **CHECKPOINTS, **settings).train()
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_users_own_merged_folder_is_neither_deleted_nor_replaced(smallest, run):
    mine(run / "merged")
    trainer = new_trainer(smallest, run, **CHECKPOINTS, overwrite=True)
    trainer.train()
    with pytest.raises(ValueError, match="merged exists, but no run wrote it"):
        write_models(trainer.model, trainer.processing_class, run, merge=True)
    assert (run / "merged" / "precious.txt").read_text() == "mine"


def test_a_strangers_list_of_outputs_is_refused_and_deletes_nothing(smallest, tmp_path):
    mine(tmp_path / "src")
    (tmp_path / OUTPUTS).write_text(json.dumps({"names": ["adapter", "src"]}))
    with pytest.raises(ValueError, match=r"outputs.json: lists 'src', which no run writes; remove"):
        new_trainer(smallest, tmp_path, **CHECKPOINTS, overwrite=True).train()
    assert (tmp_path / "src" / "precious.txt").read_text() == "mine"


def test_a_users_files_inside_of_a_runs_folders_survive_overwrite(smallest, run):
    write_run = new_trainer(smallest, run, **CHECKPOINTS, overwrite=True)
    write_run.train()
    write_models(write_run.model, write_run.processing_class, run, merge=True)
    kept = [mine(run / name) for name in ("adapter", "checkpoint-2", "merged")]
    clear_run(run)
    assert sorted(path for path in run.rglob("*") if path.is_file()) == sorted(kept)
    with pytest.raises(ValueError, match="adapter exists, but no run wrote it"):
        new_trainer(smallest, run, **CHECKPOINTS).train()


def test_a_run_that_overwrites_keeps_a_users_files_beside_its_own(smallest, run):
    kept = [mine(run / name) for name in ("adapter", "checkpoint-2")]
    new_trainer(smallest, run, **CHECKPOINTS, seed=3, overwrite=True).train()
    assert all(path.read_text() == "mine" for path in kept)
    assert (run / "checkpoint-2" / STATE).is_file() and adapter_bytes(run)


@pytest.mark.parametrize("settings", [{"overwrite": True}, {"resume": True, "max_steps": 6}])
def test_a_users_file_in_a_rotated_checkpoint_stays_and_refuses_no_run(smallest, run, settings):
    kept = mine(run / "checkpoint-2", ".DS_Store")
    delete(run / "checkpoint-2")
    assert list((run / "checkpoint-2").iterdir()) == [kept]
    new_trainer(smallest, run, **{**CHECKPOINTS, **settings}).train()
    assert kept.read_text() == "mine"
    assert (run / "checkpoint-2" / STATE).is_file() == ("overwrite" in settings)


def test_a_merged_folder_with_a_users_file_is_not_replaced(smallest, run):
    trainer = new_trainer(smallest, run, **CHECKPOINTS, overwrite=True)
    trainer.train()
    for _ in range(2):
        write_models(trainer.model, trainer.processing_class, run, merge=True)
    note = mine(run / "merged")
    with pytest.raises(ValueError, match=r"precious.txt: no run wrote it, and the merged model"):
        write_models(trainer.model, trainer.processing_class, run, merge=True)
    assert note.read_text() == "mine"


# ---- links


@pytest.mark.parametrize("settings", [{"overwrite": True}, {"save_total_limit": 1, "resume": True}])
def test_a_linked_checkpoint_is_unlinked_and_its_target_keeps_its_bytes(
    smallest, run, tmp_path, settings
):
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.glob("checkpoint-*/*")}
    new_trainer(smallest, run, **{**CHECKPOINTS, "max_steps": 6}, **settings).train()
    assert {path: path.read_bytes() for path in tmp_path.glob("checkpoint-*/*")} == before
    assert not any(path.is_symlink() for path in run.iterdir())


def test_a_linked_adapter_of_a_run_is_replaced_and_its_target_stays(smallest, run, tmp_path):
    shutil.move(run / "adapter", tmp_path / "elsewhere")
    (run / "adapter").symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").iterdir())
    new_trainer(smallest, run, **{**CHECKPOINTS, "max_steps": 5}, resume=True).train()
    assert sorted((tmp_path / "elsewhere").iterdir()) == before
    assert not (run / "adapter").is_symlink() and adapter_bytes(run)


# ---- leftovers


def test_leftovers_of_a_killed_run_are_removed_and_others_stay(smallest, run):
    names = ["checkpoint-6", "adapter", "config.toml", "outputs.json", "metrics.jsonl", "run.json"]
    for name in names:
        (run / f".{name}.partial").write_text("half")
        (run / f".{name}.lock").write_text("1 host")
    (run / ".checkpoint-8.old").mkdir()
    (run / ".checkpoint-10.deleted").mkdir()
    (run / ".merged.partial").mkdir()
    (run / "..merged.partial.partial").mkdir()
    others = [".notes.partial", ".x.gguf.partial", ".checkpoint-best.partial"]
    for name in others:
        (run / name).write_text("mine")
    new_trainer(smallest, run, **CHECKPOINTS, resume=True).train()
    hidden = sorted(path.name for path in run.glob(".*"))
    assert hidden == sorted(others)
    assert checkpoint_names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]


def test_partial_file_of_a_listed_model_is_removed(run):
    listed = json.loads((run / OUTPUTS).read_text())["names"]
    (run / OUTPUTS).write_text(json.dumps({"names": [*listed, "x.gguf"]}))
    (run / ".x.gguf.partial").write_text("half")
    remove_leftovers(run)
    assert not list(run.glob(".*"))


def test_a_checkpoint_that_was_renamed_when_the_process_was_killed_is_resumed(smallest, run):
    expected = adapter_bytes(run)
    shutil.rmtree(run / "adapter")
    (run / "checkpoint-4").rename(run / ".checkpoint-4.old")
    assert new_trainer(smallest, run, **CHECKPOINTS, resume=True).train().global_step == 4
    assert adapter_bytes(run) == expected and (run / "checkpoint-4").is_dir()


def test_deletion_that_was_killed_is_finished_and_leaves_no_half_of_a_checkpoint(run, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        delete(run / "checkpoint-4")
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    remove_leftovers(run)
    assert not list(run.glob(".*"))

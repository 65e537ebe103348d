"""Callbacks have transformers' form: order of events, wishes, failures, TensorBoard."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from training_runs import (
    RECORDS,
    adapter_bytes,
    checkpoint_names,
    make_smallest_model,
    new_trainer,
    read_metrics,
    without_times,
)

from minitune import TrainerCallback, TrainerControl
from minitune.training.callbacks import ABSENT_EVENTS

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    return make_smallest_model(tmp_path_factory.mktemp("smallest"))


def recorder(base, calls):
    """Return a callback that appends (event, step, epoch) to `calls`."""

    def event(name):
        def method(self, args, state, control, **kwargs):
            if name == "on_log":
                name_of_log = "train" if "train_runtime" in kwargs["logs"] else "step"
                name_of_log = "eval" if "eval_loss" in kwargs["logs"] else name_of_log
                calls.append((f"on_log {name_of_log}", state.global_step, round(state.epoch, 6)))
            else:
                calls.append((name, state.global_step, round(state.epoch, 6)))

        return method

    return type("Recorder", (base,), {name: event(name) for name in EVENTS})()


class OneWeight(nn.Module):
    """The smallest model that transformers' Trainer trains."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


INTERVALS = [
    {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4},
    {"logging_steps": 5, "eval_strategy": "epoch", "save_strategy": "epoch"},
    {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 5},
    {
        "logging_steps": 2,
        "logging_first_step": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 4,
        "load_best_model_at_end": True,
        "eval_on_start": True,
    },
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", INTERVALS)
def test_events_come_in_the_order_of_transformers(smallest, tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    settings = {"num_train_epochs": 2, "save_strategy": "steps", **settings}
    ours, theirs = [], []
    # 25 samples in steps of 5: two epochs are 10 steps
    data = RECORDS + RECORDS[:1]
    trainer = new_trainer(smallest, tmp_path / "ours", RECORDS[:5], data, **settings)
    trainer.add_callback(recorder(TrainerCallback, ours))
    trainer.train()
    rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0])} for i in range(25)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=5,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    peer = transformers.Trainer(OneWeight(), args, train_dataset=rows, eval_dataset=rows[:5])
    peer.add_callback(recorder(transformers.TrainerCallback, theirs))
    peer.train()
    assert ours == theirs
    for name in ("global_step", "max_steps", "num_train_epochs", "epoch", "eval_steps"):
        assert getattr(trainer.state, name) == getattr(peer.state, name) or name == "eval_steps"
    for record in peer.state.log_history:
        kind = next(key for key in ("loss", "eval_loss", "train_runtime") if key in record)
        own = next(r for r in trainer.state.log_history if kind in r)
        assert record.keys() - own.keys() <= {"total_flos", "eval_steps_per_second"}


class Wishes(TrainerCallback):
    """Asks for everything at step 2, and for the end at step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        """Set the wishes."""
        if state.global_step == 2:
            control.should_log = control.should_evaluate = control.should_save = True
        control.should_training_stop = state.global_step == 3


class Returned(TrainerCallback):
    """Asks for the end by a control of its own."""

    def on_step_end(self, args, state, control, **kwargs):
        """Return another control."""
        return TrainerControl(should_training_stop=True)


def test_a_callback_asks_for_logs_evaluations_checkpoints_and_the_end(smallest, tmp_path, capsys):
    output = tmp_path / "run"
    trainer = new_trainer(smallest, output, RECORDS[:5], logging_steps=100)
    trainer.add_callback(Wishes)
    result = trainer.train()
    assert result.global_step == 3 and checkpoint_names(output) == ["checkpoint-2"]
    assert [(r["step"], "eval_loss" in r) for r in read_metrics(output)] == [(2, False), (2, True)]
    assert "a callback ended the run after step 3" in capsys.readouterr().err
    assert trainer.state.log_history[:2] == read_metrics(output)
    trainer = new_trainer(smallest, tmp_path / "other")
    trainer.add_callback(Returned())
    assert trainer.train().global_step == 1


def test_callbacks_change_no_bit_of_a_run(smallest, tmp_path):
    settings = {"max_steps": 4, "logging_steps": 1}
    new_trainer(smallest, tmp_path / "a", **settings).train()
    trainer = new_trainer(smallest, tmp_path / "b", **settings)
    trainer.add_callback(recorder(TrainerCallback, []))
    trainer.train()
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


def test_callbacks_are_added_and_removed_by_class_and_by_object(smallest, tmp_path):
    trainer, wishes = new_trainer(smallest, tmp_path), Wishes()
    trainer.add_callback(wishes)
    trainer.add_callback(Returned)
    assert isinstance(trainer.pop_callback(Returned), Returned)
    trainer.remove_callback(wishes)
    assert trainer.pop_callback(Wishes) is None
    with pytest.raises(ValueError, match="no callback; derive its class from TrainerCallback"):
        trainer.add_callback(print)


@pytest.mark.parametrize("event", ABSENT_EVENTS)
def test_a_callback_that_would_never_run_is_refused(smallest, tmp_path, event):
    trainer = new_trainer(smallest, tmp_path)
    waiting = type("Waiting", (TrainerCallback,), {event: lambda *_, **__: None})
    with pytest.raises(ValueError, match=rf"Waiting\.{event} would never run: .*; use on_"):
        trainer.add_callback(waiting())


def test_an_epoch_cannot_be_ended_early(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path / "run")
    trainer.add_callback(
        type("E", (TrainerCallback,), {"on_step_end": lambda *_, **__: TrainerControl(False, True)})
    )
    with pytest.raises(ValueError, match="set should_training_stop, or lower num_train_epochs"):
        trainer.train()


class Fails(TrainerCallback):
    """Raises an error at step 5."""

    def on_step_end(self, args, state, control, **kwargs):
        """Raise the error."""
        if state.global_step == 5:
            raise RuntimeError("the service is down")


def test_a_run_continues_with_the_same_bits_after_a_callback_failed(smallest, tmp_path):
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    new_trainer(smallest, tmp_path / "whole", **settings).train()
    broken = new_trainer(smallest, tmp_path / "broken", **settings)
    broken.add_callback(Fails())
    with pytest.raises(RuntimeError, match="the service is down"):
        broken.train()
    assert checkpoint_names(tmp_path / "broken") == ["checkpoint-2", "checkpoint-4"]
    resumed = new_trainer(smallest, tmp_path / "broken", resume=True, **settings)
    resumed.train()
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")
    metrics = [without_times(read_metrics(tmp_path / name)) for name in ("broken", "whole")]
    assert metrics[0] == metrics[1]
    history = [record for record in resumed.state.log_history if "loss" in record]
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5, 6, 7]


def test_a_callback_state_that_is_not_json_is_named(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path / "run", save_strategy="steps", max_steps=1)
    state = {"attributes": {"tensor": torch.zeros(1)}}
    trainer.add_callback(type("Odd", (TrainerCallback,), {"state": lambda self: state})())
    with pytest.raises(ValueError, match=r"Odd\.state\(\) cannot be saved"):
        trainer.train()


@pytest.mark.parametrize(
    ("key", "value"), [("best", 3), ("best", {"loss": "low"}), ("callbacks", {"a": 1})]
)
def test_a_broken_state_of_callbacks_is_named(smallest, tmp_path, key, value):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    new_trainer(smallest, tmp_path / "run", **settings).train()
    path = tmp_path / "run" / "checkpoint-2" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"state.json: {key}.*resume from another checkpoint"):
        new_trainer(smallest, tmp_path / "run", resume=True, **settings).train()


# ---- TensorBoard


def test_tensorboard_gets_every_number_or_is_refused_by_name(smallest, tmp_path, monkeypatch):
    settings = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "epoch"}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        new_trainer(smallest, tmp_path, RECORDS[:2], report_to="tensorboard", **settings)
    scalars, folders = [], []

    class Writer(SimpleNamespace):
        def __init__(self, log_dir):
            super().__init__(flush=lambda: None, close=lambda: scalars.append("closed"))
            folders.append(log_dir)
            Path(log_dir).mkdir(parents=True)

        def add_scalar(self, name, value, step):
            scalars.append((name, step))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    output = tmp_path / "run"
    trainer = new_trainer(smallest, output, RECORDS[:2], report_to=["tensorboard"], **settings)
    trainer.train()
    assert folders == [str(output / "tensorboard")] and scalars[-1] == "closed"
    assert {("train/loss", 1), ("train/loss", 2), ("eval/loss", 2), ("train/runtime", 2)} < set(
        scalars[:-1]
    )
    assert "tensorboard" in json.loads((output / "outputs.json").read_text())["names"]

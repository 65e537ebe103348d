"""The training loop on tiny models."""

import json
import math
import resource
import shutil
import signal
import tomllib

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_model

from minitune import FastLanguageModel, SFTConfig, SFTTrainer
from minitune.config.training_config import LoraConfig
from minitune.training.log import TrainingLog
from minitune.training.micro_step import MicroStep
from minitune.training.checkpoint import RunSize
from minitune.training.run_data import epoch_order

RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} lamps to {city}"},
            {"role": "assistant", "content": " ".join(["blue lamp"] * (1 + i % 5)) + f" {i}"},
        ]
    }
    for i, city in enumerate(["Lisbon", "Köln", "Paris", "Oslo"] * 6)
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def new_trainer(folder, output, eval_dataset=None, records=RECORDS, **settings):
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=128, device="cpu")
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    settings = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 5,
        "save_strategy": "no",
        **settings,
    }
    return SFTTrainer(
        model, SFTConfig(output_dir=output, **settings), records, eval_dataset, tokenizer
    )


def records_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_times(records):
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


@pytest.mark.parametrize("packing", [False, True])
def test_split_of_a_step_into_micro_steps_changes_neither_loss_nor_gradients(
    tiny, tmp_path, packing
):
    trainer = new_trainer(tiny, tmp_path, packing=packing, max_length=64)
    for (
        _,
        p,
    ) in trainer.model.trainable_parameters():  # B is zero at first, and A then has no gradient
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    samples = trainer.order.samples_of_step(0)
    tokens = sum(len(s.input_ids) for s in samples)
    results = {}
    for parts in (1, 2, 4):
        trainer.micro_step_tokens = math.ceil(tokens / parts) + 40 * (parts > 1)
        for _, p in trainer.model.trainable_parameters():
            p.grad = None
        loss = trainer.accumulate(samples)
        results[parts] = (
            loss,
            torch.cat([p.grad.flatten() for _, p in trainer.model.trainable_parameters()]),
        )
    each = [
        trainer.model(torch.tensor(s.input_ids), labels=torch.tensor(s.labels)).loss
        for s in samples
    ]
    counts = [sum(label != -100 for label in s.labels[1:]) for s in samples]
    mean = sum(loss.item() * n for loss, n in zip(each, counts, strict=True)) / sum(counts)
    assert len(set(counts)) > 1  # else a mean of means would pass as well
    for loss, gradient in results.values():
        assert loss.item() == pytest.approx(mean, rel=1e-5)
        assert (gradient - results[1][1]).norm() <= 1e-5 * results[1][1].norm()


def test_evaluation_loss_is_the_mean_over_all_trained_on_tokens(tiny, tmp_path, monkeypatch):
    trainer = new_trainer(tiny, tmp_path, RECORDS[:7], micro_step_tokens=100)
    monkeypatch.setattr("minitune.training.metrics.EVAL_SAMPLES_PER_PACKING", 3)
    samples = trainer.data.evaluation.samples
    counts = [sum(label != -100 for label in s.labels[1:]) for s in samples]
    losses = [
        trainer.model(torch.tensor(s.input_ids), labels=torch.tensor(s.labels)).loss.item()
        for s in samples
    ]
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_order_of_samples_is_a_function_of_seed_and_epoch(tiny, tmp_path):
    assert epoch_order(1, 0, 50) == epoch_order(1, 0, 50)
    assert sorted(epoch_order(1, 3, 50)) == list(range(50))
    assert len({epoch_order(seed, epoch, 50) for seed in (1, 2) for epoch in (0, 1)}) == 4
    trainer = new_trainer(tiny, tmp_path, seed=7)
    epoch = [s for step in range(trainer.size.steps_per_epoch) for s in trainer.order.samples_of_step(step)]
    assert len(epoch) == len(RECORDS)
    assert {tuple(s.input_ids) for s in epoch} == {
        tuple(s.input_ids) for s in trainer.data.train.samples
    }


def test_steps_count_samples_and_with_packing_rows(tiny, tmp_path):
    plain = new_trainer(tiny, tmp_path, gradient_accumulation_steps=2, num_train_epochs=1.5)
    assert plain.size == RunSize(units_per_step=10, steps_per_epoch=3, total_steps=5)
    packed = new_trainer(
        tiny, tmp_path, packing=True, max_length=128, per_device_train_batch_size=2
    )
    longest = max(len(s.input_ids) for s in packed.data.train.samples)
    samples = packed.order.samples_of_step(0)
    assert len(samples) > 2
    assert 2 * longest < sum(len(s.input_ids) for s in samples) <= 2 * 128


def test_training_lowers_the_loss_and_fills_the_run_folder(tiny, tmp_path, capsys):
    output = tmp_path / "run"
    trainer = new_trainer(
        tiny, output, RECORDS[:4], max_steps=12, logging_steps=5, logging_first_step=True, save_strategy="steps",
        save_steps=5, save_total_limit=2, eval_strategy="steps", eval_steps=6,
    )  # fmt: skip
    first = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    assert sorted(p.name for p in output.iterdir()) == [
        "adapter", "checkpoint-10", "checkpoint-12", "config.toml", "metrics.jsonl", "outputs.json",
    ]  # fmt: skip
    records = records_of(output)
    losses = [r for r in records if "loss" in r]
    assert [r["step"] for r in losses] == [1, 5, 10, 12]
    assert set(losses[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds",
    }  # fmt: skip
    evaluations = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert len(evaluations) == 2 and evaluations[-1] < 0.5 * first
    assert evaluations[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    weighted = (
        losses[0]["loss"] + 4 * losses[1]["loss"] + 5 * losses[2]["loss"] + 2 * losses[3]["loss"]
    )
    assert result.global_step == 12 and result.training_loss == pytest.approx(weighted / 12)
    error = capsys.readouterr().err
    assert "24 samples" in error and "step 12/12  epoch 2.40  loss" in error
    settings = tomllib.loads((output / "config.toml").read_text())
    assert (
        settings["output_dir"] == str(output)
        and settings["max_length"] == 128
        and settings["r"] == 4
    )
    kept = load_file(output / "adapter" / "adapter_model.safetensors")
    for name, p in trainer.model.trainable_parameters():
        assert torch.equal(kept["base_model.model." + name], p)


def test_resumed_run_is_bit_identical_to_one_that_was_not_interrupted(tiny, tmp_path):
    settings = {
        "max_steps": 10,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "warmup_steps": 2,
    }
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    new_trainer(tiny, straight, **settings).train()
    shutil.copytree(straight, resumed)
    for name in ("checkpoint-8", "checkpoint-10", "adapter"):
        shutil.rmtree(resumed / name)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # what a crash leaves
    result = new_trainer(tiny, resumed, **settings).train(resume_from_checkpoint=True)
    assert without_times(records_of(resumed)) == without_times(records_of(straight))
    assert result.global_step == 10
    for file in ("adapter/adapter_model.safetensors", "checkpoint-10/optimizer.safetensors"):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes()


def train_with_ctrl_c(trainer, step, times=1):
    """Train, with Ctrl-C pressed while `step` steps are done."""
    accumulate = trainer.accumulate

    def interrupted(samples):
        for _ in range(times if trainer.progress.step == step else 0):
            signal.raise_signal(signal.SIGINT)
        return accumulate(samples)

    trainer.accumulate = interrupted
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_ctrl_c_saves_the_step_and_the_run_can_go_on(tiny, tmp_path, capsys):
    settings = {"max_steps": 6, "logging_steps": 2}
    straight, output = tmp_path / "straight", tmp_path / "run"
    new_trainer(tiny, straight, **settings).train()
    train_with_ctrl_c(new_trainer(tiny, output, **settings), step=2)
    assert (output / "checkpoint-3").is_dir() and not (output / "adapter").exists()
    said = f"interrupted after step 3 of 6, last checkpoint {output}/checkpoint-3; continue with SFTConfig(resume=True)"
    assert (
        capsys.readouterr().err.splitlines()[-1] == said
    )  # the records are in memory: no command can name them
    new_trainer(tiny, output, **settings, resume=True).train()
    assert without_times(records_of(output)) == without_times(records_of(straight))
    file = "adapter/adapter_model.safetensors"
    assert (output / file).read_bytes() == (straight / file).read_bytes()


@pytest.mark.parametrize(
    ("step", "strategy", "words"),
    [
        (
            0,
            "steps",
            "interrupted before the first step was done: nothing is trained yet; start again with ",
        ),
        (3, "no", "interrupted after step 3 of 6, no checkpoint was saved; start again with "),
        (
            3,
            "steps",
            "interrupted after step 3 of 6, last checkpoint {output}/checkpoint-2; continue with ",
        ),
    ],
)
def test_second_ctrl_c_stops_at_once_and_says_what_is_left(
    tiny, tmp_path, capsys, step, strategy, words
):
    output = tmp_path / "a run"
    train_with_ctrl_c(
        new_trainer(tiny, output, max_steps=6, save_strategy=strategy, save_steps=2), step, times=2
    )
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"{words.format(output=output)}SFTConfig(resume=True)"
    )
    assert [p.name for p in output.glob("checkpoint-*")] == (
        ["checkpoint-2"] if "checkpoint-2" in words else []
    )


def test_ctrl_c_before_the_first_step_says_that_nothing_is_trained(
    tiny, tmp_path, capsys, monkeypatch
):
    trainer, say = new_trainer(tiny, tmp_path, max_steps=2), TrainingLog.print_line

    def pressed(report, text):
        if text.startswith("model"):  # the banner
            signal.raise_signal(signal.SIGINT)
        say(report, text)

    monkeypatch.setattr(TrainingLog, "print_line", pressed)
    train_with_ctrl_c(trainer, step=-1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "nothing is trained yet; start again with" in last and "checkpoint" not in last


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tiny, tmp_path):
    trainer = new_trainer(
        tiny, tmp_path, max_steps=8, logging_steps=1, save_strategy="steps", save_steps=2
    )
    accumulate = trainer.accumulate

    def poisoned(samples):
        return accumulate(samples) * (math.nan if trainer.progress.step == 4 else 1)

    trainer.accumulate = poisoned
    with pytest.raises(ValueError, match=r"loss became nan at step 5 .*checkpoint-4"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "config.toml",
        "metrics.jsonl",
        "outputs.json",
    ]
    assert [r["step"] for r in records_of(tmp_path)] == [1, 2, 3, 4]


def test_run_folder_is_replaced_only_with_overwrite_and_other_files_stay(tiny, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps"}
    new_trainer(tiny, tmp_path, **settings).train()
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run .*--resume .*--overwrite"):
        new_trainer(tiny, tmp_path, **settings, seed=3).train()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    new_trainer(tiny, tmp_path, **settings, seed=3, overwrite=True).train()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != before
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("strategy", "kept"), [("steps", [2, 5, 6]), ("no", [2])])
def test_run_that_goes_back_to_an_earlier_checkpoint_drops_the_later_ones(
    tiny, tmp_path, strategy, kept
):
    settings = {"max_steps": 6, "save_strategy": "steps"}
    new_trainer(tiny, tmp_path, **settings, save_steps=2).train()
    trainer = new_trainer(tiny, tmp_path, **{**settings, "save_strategy": strategy}, save_steps=5)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == kept


def test_checkpoint_just_written_outlives_those_of_a_branch_that_was_left(tiny, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    new_trainer(tiny, tmp_path, **settings).train()
    trainer = new_trainer(tiny, tmp_path, **settings, save_total_limit=1)
    accumulate, kept = trainer.accumulate, {}

    def looked_at(samples):
        kept[trainer.progress.step] = [p.name for p in tmp_path.glob("checkpoint-*")]
        return accumulate(samples)

    trainer.accumulate = looked_at
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert kept[4] == ["checkpoint-4"] and len(kept[2]) == 3


@pytest.mark.parametrize("place", ["merged", "adapter", "checkpoint-2"])
def test_run_does_not_replace_the_model_or_the_data_that_it_needs(tiny, tmp_path, place):
    model = make_tiny_model(tmp_path / place / "model")
    data = tmp_path / place / "data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    if place.startswith("checkpoint"):
        (tmp_path / place / "state.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for settings in ({"folder": model}, {"folder": tiny, "records": data}):
        with pytest.raises(ValueError, match=f"is needed, but lies in .*{place}"):
            new_trainer(**settings, output=tmp_path, max_steps=1, overwrite=True).train()
    assert sorted(tmp_path.rglob("*")) == before


def test_output_folder_below_a_file_is_refused_by_name(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt is a file; choose another"):
        new_trainer(tiny, tmp_path / "notes.txt" / "run", max_steps=1).train()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_config_that_cannot_be_written_is_named_and_leaves_no_half_of_it(tiny, tmp_path):
    trainer = new_trainer(tiny, tmp_path / "run", max_steps=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (64, limits[1])
    )  # a write past it fails as on a full disk
    try:
        with pytest.raises(ValueError, match=r"config.toml: could not be written"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "run").iterdir()) == []


def test_metrics_that_cannot_be_written_end_the_run_after_a_checkpoint(tiny, tmp_path, monkeypatch):
    class Full(TrainingLog):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._file.close()
            self._file = open("/dev/full", "a")  # noqa: SIM115 (closed by Report)

    monkeypatch.setattr("minitune.training.trainer.TrainingLog", Full)
    with pytest.raises(
        ValueError, match=r"metrics.jsonl: could not be written \(No space left.*run/checkpoint-3"
    ):
        new_trainer(tiny, tmp_path / "run", max_steps=4, logging_steps=3).train()
    monkeypatch.undo()
    assert new_trainer(tiny, tmp_path / "run", max_steps=4, resume=True).train().global_step == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"progress": None}, "progress is None"),
        ({"progress": {}}, "step is None"),
        ({"identity": []}, "identity is "),
    ],
)
def test_checkpoint_whose_state_lacks_something_is_refused_by_file(tiny, tmp_path, change, message):
    settings = {"max_steps": 1, "save_strategy": "steps"}
    new_trainer(tiny, tmp_path, **settings).train()
    path = tmp_path / "checkpoint-1" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"state.json: {message}"):
        new_trainer(tiny, tmp_path, **settings, resume=True).train()


def test_gpu_out_of_memory_says_what_needs_less(tiny, tmp_path, monkeypatch):
    trainer = new_trainer(tiny, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    loss = trainer.model.rows_loss

    def full(*arguments, **options):
        if trainer.progress.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(*arguments, **options)

    monkeypatch.setattr(trainer.model, "rows_loss", full)
    words = r"step 3.*; lower micro_step_tokens .*max_length .*use_gradient_checkpointing to true .*load_in_4bit .*point-2"
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_dropout_that_an_adapter_was_trained_with_is_said_not_to_be_applied(tiny, tmp_path, capsys):
    new_trainer(tiny, tmp_path / "run", max_steps=1).train()
    assert "lora_dropout" not in capsys.readouterr().err
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.1}))
    trainer = new_trainer(tiny, tmp_path / "more", max_steps=1)
    trainer.model.load_adapter(path.parent)
    trainer.train()
    assert capsys.readouterr().err.count("lora_dropout 0.1, which is not applied here") == 1


def test_resume_with_nothing_saved_starts_from_the_beginning(tiny, tmp_path):
    assert new_trainer(tiny, tmp_path / "run", max_steps=1, resume=True).train().global_step == 1
    with pytest.raises(ValueError, match="an adapter but no checkpoint"):
        new_trainer(tiny, tmp_path / "run", max_steps=1, resume=True).train()


def test_without_output_dir_runs_are_numbered(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        new_trainer(tiny, None, max_steps=1).train()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["1", "2"]


def test_resume_refuses_what_changes_the_order_and_warns_of_what_changes_the_mathematics(
    tiny, tmp_path, capsys
):
    settings = {"max_steps": 2, "save_strategy": "steps"}
    new_trainer(tiny, tmp_path, **settings).train()
    for change in (
        {"seed": 1},
        {"per_device_train_batch_size": 4},
        {"records": RECORDS[:20]},
        {"max_length": 64},
    ):
        with pytest.raises(ValueError, match="cannot be continued"):
            new_trainer(tiny, tmp_path, **{**settings, **change}, resume=True).train()
    capsys.readouterr()
    new_trainer(
        tiny, tmp_path, **{**settings, "max_steps": 3, "learning_rate": 5e-3}, resume=True
    ).train()
    assert "learning_rate 0.01 -> 0.005, total_steps 2 -> 3" in capsys.readouterr().err
    model, tokenizer = FastLanguageModel.from_pretrained(
        tiny, max_seq_length=128, dtype=torch.bfloat16, load_in_4bit=False, device="cpu"
    )
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    args = SFTConfig(
        **settings, output_dir=tmp_path, learning_rate=5e-3, per_device_train_batch_size=5
    )
    SFTTrainer(model, args, RECORDS, None, tokenizer).train(
        resume_from_checkpoint=tmp_path / "checkpoint-2"
    )
    assert "load_in_4bit True -> False, dtype float32 -> bfloat16" in capsys.readouterr().err
    model, _ = FastLanguageModel.from_pretrained(tiny, max_seq_length=128, device="cpu")
    FastLanguageModel.get_peft_model(model, r=2)
    with pytest.raises(ValueError, match="r is 4, but the model's adapter has 2"):
        SFTTrainer(model, args, RECORDS, None, tokenizer).train(
            resume_from_checkpoint=tmp_path / "checkpoint-2"
        )
    assert "other settings" not in capsys.readouterr().err


def test_checkpoint_past_the_last_step_is_refused_and_one_at_it_has_nothing_left_to_train(
    tiny, tmp_path, capsys
):
    settings = {"save_strategy": "steps", "save_steps": 2}
    new_trainer(tiny, tmp_path, **settings, max_steps=4).train()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for less, words in (
        ({"max_steps": 3}, "checkpoint-4 is already past max_steps 3"),
        (
            {"num_train_epochs": 0.4},
            "checkpoint-4 is already past the 2 steps of num_train_epochs 0.4",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            new_trainer(tiny, tmp_path, **settings, **less, resume=True).train()
    assert capsys.readouterr().err == "" and sorted(tmp_path.rglob("*")) == before
    assert (
        new_trainer(tiny, tmp_path, **settings, max_steps=4, resume=True).train().global_step == 4
    )
    assert "checkpoint-4 is of the last step: nothing is left to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": "3"}, "max_steps is '3'; expected a whole number"),
        ({"max_steps": 0}, "max_steps is 0; expected at least 1, or -1"),
        ({"max_steps": True}, "max_steps is True; expected a whole number"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected at least 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected a finite number"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0; expected less than 1"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; expected more than 0"),
        (
            {"optim": "paged_adamw_8bit"},
            "expected one of adamw_torch, adamw_torch_fused, adamw_8bit",
        ),
        ({"lr_scheduler_type": "polynomial"}, "expected one of linear, cosine"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "constant_with_warmup"),
        ({"packing": 1}, "packing is 1; expected true or false"),
        ({"warmup_steps": 2.5}, "expected whole steps, or a share below 1"),
        ({"report_to": "wandb"}, "report_to is 'wandb'; expected one of none"),
        ({"overwrite": True, "resume": True}, "exclude each other"),
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
    ],
)
def test_settings_out_of_range_are_refused_with_value_and_expectation(settings, message):
    with pytest.raises(ValueError) as error:
        SFTConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": -5}, "lora_alpha is -5; expected more than 0"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan; expected a finite number"),
        ({"lora_alpha": "32"}, "lora_alpha is '32'; expected a number"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; expected true or false"),
        ({"r": True}, "r is True; expected a whole number"),
        ({"r": 0}, "r is 0; expected at least 1"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj'; expected a list of names"),
        ({"target_modules": ("w_proj",)}, "target module 'w_proj' does not exist"),
    ],
)
def test_adapter_settings_out_of_range_are_refused_with_value_and_expectation(settings, message):
    with pytest.raises(ValueError) as error:
        LoraConfig(**settings)
    assert message in str(error.value)


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="bf16"):
        SFTConfig(bf16=True)


def test_model_data_and_settings_that_do_not_go_together_are_refused(tiny, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(tiny, max_seq_length=64, device="cpu")
    with pytest.raises(ValueError, match="no adapter to train"):
        SFTTrainer(model, SFTConfig(), RECORDS, processing_class=tokenizer)
    FastLanguageModel.get_peft_model(model, r=2)
    for settings, data, message in [
        ({}, None, "train_dataset is missing"),
        ({"max_length": 100}, RECORDS, "max_length 100 is more than the max_seq_length 64"),
        ({"eval_strategy": "epoch"}, RECORDS, "there is no eval_dataset"),
        ({}, tmp_path / "absent.jsonl", "absent.jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            SFTTrainer(model, SFTConfig(**settings), data, processing_class=tokenizer)
    with pytest.raises(ValueError, match="resume needs output_dir"):
        SFTTrainer(model, SFTConfig(), RECORDS, processing_class=tokenizer).train(
            resume_from_checkpoint=True
        )


def test_a_step_out_of_memory_is_done_again_with_a_smaller_plan(
    tiny, tmp_path, recwarn, monkeypatch
):
    settings = {"max_steps": 3, "logging_steps": 1}
    new_trainer(tiny, tmp_path / "whole", **settings).train()
    trainer = new_trainer(tiny, tmp_path / "short", micro_step_tokens=64, **settings)
    call, failures = MicroStep.__call__, []

    def sometimes(micro_step, batch, denominator):
        loss = call(micro_step, batch, denominator)
        if (
            trainer.progress.step == 1 and len(failures) < 2
        ):  # its gradients have been added already
            failures.append(trainer.planner.memory_budget)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(MicroStep, "__call__", sometimes)
    trainer.train()
    assert failures[0] > failures[1] > trainer.planner.memory_budget > 0
    assert (
        len(said := [str(w.message) for w in recwarn if "trying the step again" in str(w.message)])
        == 2
    )
    assert "cpu is out of memory in step 2" in said[0]
    whole, short = (records_of(tmp_path / name) for name in ("whole", "short"))
    assert [r["tokens"] for r in whole] == [r["tokens"] for r in short]
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in short], rel=1e-5)


def test_an_evaluation_out_of_memory_is_done_again_with_what_training_kept(
    tiny, tmp_path, monkeypatch
):
    trainer = new_trainer(tiny, tmp_path / "run", eval_dataset=RECORDS[:4], max_steps=1)
    expected, closed, loss = trainer.evaluate()["eval_loss"], [], trainer.model.rows_loss

    def full(*arguments, **options):
        if not closed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*arguments, **options)

    monkeypatch.setattr(trainer.model, "rows_loss", full)
    monkeypatch.setattr(trainer.micro_step, "close", lambda: closed.append(True))
    assert trainer.evaluate()["eval_loss"] == expected and len(closed) == 1


def test_a_host_that_pins_no_memory_is_done_without(tiny, tmp_path, monkeypatch):
    trainer = new_trainer(tiny, tmp_path / "run", max_steps=2, logging_steps=1)
    call, asked = MicroStep.__call__, []

    def refused(micro_step, batch, denominator):
        asked.append(micro_step.planner.host_budget)
        if micro_step.planner.host_budget:
            raise MemoryError("the host refuses to pin 3.00 GiB of memory (CUDA error 2)")
        return call(micro_step, batch, denominator)

    monkeypatch.setattr(MicroStep, "__call__", refused)
    trainer.planner.host_budget = 4 << 30
    with pytest.warns(UserWarning, match="refuses to pin 3.00 GiB .*: activations stay on the GPU"):
        trainer.train()
    assert asked[0] == 4 << 30 and not any(asked[1:]) and len(records_of(tmp_path / "run")) >= 2


def test_a_memory_budget_that_decides_nothing_is_refused(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"memory_budget 8GiB decides what a GPU saves .* the model is on cpu"
    ):
        new_trainer(tiny, tmp_path, memory_budget="8GiB")


@pytest.mark.parametrize("size", ["8", "8 GB of it", "8KiB", "-1GiB", ""])
def test_a_memory_budget_that_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="is not a size; write it as 24GiB"):
        SFTConfig(memory_budget=size)

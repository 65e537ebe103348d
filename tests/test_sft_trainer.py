"""SFTTrainer as in TRL and Unsloth: its arguments, formatting functions, views and results."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    RECORDS,
    adapter_bytes,
    make_smallest_model,
    new_trainer,
    read_metrics,
    without_times,
)

from minitune import (
    FastLanguageModel,
    LoraConfig,
    SFTConfig,
    SFTTrainer,
    TrainerCallback,
    TrainingArguments,
)

QUESTIONS = [{"question": f"{i} lamps?", "answer": f"blue {i}", "row": i} for i in range(7)]


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    return make_smallest_model(tmp_path_factory.mktemp("smallest"))


@pytest.fixture(scope="module")
def base(smallest):
    model, tokenizer = FastLanguageModel.from_pretrained(smallest, 128, device="cpu")
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


def texts_of(trainer):
    """Return the text of each sample."""
    decode = trainer.tokenizer.decode
    return [decode(row["input_ids"], skip_special_tokens=False) for row in trainer.train_dataset]


def of_record(record):
    return f"Q: {record['question']} A: {record['answer']}"


def of_record_in_a_list(record):
    return [of_record(record)]


def of_columns(columns):
    pairs = zip(columns["question"], columns["answer"], strict=True)
    return [f"Q: {question} A: {answer}" for question, answer in pairs]


EXPECTED = [f"{of_record(record)}<|im_end|>" for record in QUESTIONS]


@pytest.mark.parametrize("function", [of_record, of_record_in_a_list, of_columns])
@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_formatting_function_takes_a_record_or_columns(base, function, as_iterator):
    data = iter(QUESTIONS) if as_iterator else QUESTIONS
    trainer = SFTTrainer(base[0], SFTConfig(), data, tokenizer=base[1], formatting_func=function)
    assert texts_of(trainer) == EXPECTED
    assert all(row["labels"] == row["input_ids"] for row in trainer.train_dataset)
    assert trainer.eval_dataset is None


def test_a_formatting_function_makes_the_evaluation_data_too(base):
    pandas, datasets = map(pytest.importorskip, ("pandas", "datasets"))
    trainer = SFTTrainer(
        base[0],
        train_dataset=pandas.DataFrame(QUESTIONS),
        eval_dataset=datasets.Dataset.from_list(QUESTIONS[:2]),
        tokenizer=base[1],
        formatting_func=of_columns,
    )
    assert texts_of(trainer) == EXPECTED and len(trainer.eval_dataset) == 2


def test_texts_of_trl_get_the_same_tokens(base, smallest, tmp_path):
    transformers, trl, datasets = map(pytest.importorskip, ("transformers", "trl", "datasets"))
    ours = SFTTrainer(base[0], None, QUESTIONS, tokenizer=base[1], formatting_func=of_record)
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    theirs = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(smallest),
        args,
        train_dataset=datasets.Dataset.from_list(QUESTIONS),
        processing_class=transformers.AutoTokenizer.from_pretrained(smallest),
        formatting_func=of_record,
    )
    assert ours.train_dataset["input_ids"] == [
        list(ids) for ids in theirs.train_dataset["input_ids"]
    ]


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
def test_a_text_gets_one_stop_token_and_keeps_the_one_that_it_has(base, end):
    trainer = SFTTrainer(base[0], None, [{"text": f"blue{end}"}], tokenizer=base[1])
    assert texts_of(trainer) == [f"blue{end or '<|im_end|>'}"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda columns: {"text": ["a", "b"]}, r"function for dataset.map\(..., batched=True\)"),
        (lambda record: 3, "takes a record and returns a text, or takes columns"),
        (lambda record: record["txt"], "KeyError.*takes a record and returns a text"),
        (lambda record: "a" if record["row"] < 5 else None, r"null of dataset\[5\]"),
        (lambda c: ["a"] * min(len(c["row"]), 2), r"a list of dataset\[0\]"),
    ],
)
def test_a_formatting_function_of_another_form_is_refused(base, function, message):
    with pytest.raises(ValueError, match=message):
        SFTTrainer(base[0], None, QUESTIONS, tokenizer=base[1], formatting_func=function)


def test_the_named_text_field_wins_over_every_other_column(base):
    records = [{**RECORDS[i], "text": f"blue {i}", "Complex_CoT": "long"} for i in range(3)]
    trainer = SFTTrainer(base[0], SFTConfig(dataset_text_field="text"), records, tokenizer=base[1])
    assert texts_of(trainer) == [f"blue {i}<|im_end|>" for i in range(3)]
    notes = trainer.data.train.report.notes
    assert {note.split()[0] for note in notes} == {'"messages"', '"Complex_CoT"'}
    assert all("is left out, because dataset_text_field" in note for note in notes)


def test_a_streamed_dataset_is_taken_and_a_dict_of_splits_refused(base):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    trainer = SFTTrainer(base[0], None, data.to_iterable_dataset(), tokenizer=base[1])
    assert len(trainer.train_dataset) == len(RECORDS)
    splits = datasets.DatasetDict({"train": data, "test": data})
    with pytest.raises(ValueError, match=r"splits 'train', 'test'; .* such as dataset\['train'\]"):
        SFTTrainer(base[0], None, splits, tokenizer=base[1])
    with pytest.raises(ValueError, match="mapping of the columns 'text'"):
        SFTTrainer(base[0], None, {"text": ["a", "b"]}, tokenizer=base[1])


# ---- arguments


def test_the_arguments_of_older_notebooks_stand_for_settings(base):
    trainer = SFTTrainer(
        model=base[0],
        tokenizer=base[1],
        train_dataset=[{"body": "blue lamp " * 20}],
        dataset_text_field="body",
        max_seq_length=16,
        packing=True,
        dataset_num_proc=2,
        data_collator=None,
        compute_metrics=None,
        optimizers=(None, None),
        args=TrainingArguments(output_dir="outputs", bf16=False, fp16=False),
    )
    assert trainer.args.packing and trainer.args.learning_rate == 5e-5
    assert len(trainer.train_dataset[0]["input_ids"]) == 16


def test_a_folder_is_loaded_and_gets_the_adapter_of_peft_config(smallest, capsys):
    lora = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules="all-linear",
    )
    trainer = SFTTrainer(str(smallest), SFTConfig(), RECORDS, peft_config=lora)
    assert (trainer.model.lora.r, trainer.model.lora.lora_alpha) == (2, 4)
    assert trainer.tokenizer.folder == trainer.model.folder and not capsys.readouterr().err
    default = SFTTrainer(smallest, SFTConfig(max_length=64), RECORDS)
    assert default.model.lora.r == LoraConfig.r and default.data.max_length == 64
    assert "peft_config=LoraConfig(...) chooses another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": {"max_steps": 1}}, r"pass args=SFTConfig\(\*\*args\)"),
        ({"args": SimpleNamespace()}, "import SFTConfig or TrainingArguments from minitune"),
        ({"peft_config": SimpleNamespace()}, "build it with minitune.LoraConfig"),
        ({"peft_config": LoraConfig()}, "an adapter with other settings already"),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear; load it with"),
        ({"data_collator": print}, "packed without padding; leave it out"),
        ({"compute_metrics": print}, "keeps no logits; score_answer=function scores"),
        ({"callbacks": [print]}, "no callback"),
        ({"train_dataset": None}, "train_dataset is missing"),
    ],
)
def test_other_arguments_are_refused_with_the_remedy(base, arguments, message):
    given = {"model": base[0], "train_dataset": RECORDS, "tokenizer": base[1]} | arguments
    with pytest.raises(ValueError, match=message):
        SFTTrainer(**given)


def test_the_default_of_every_argument_of_trl_and_transformers_is_accepted(base):
    trl, transformers = map(pytest.importorskip, ("trl", "transformers"))
    given = {"model": base[0], "train_dataset": RECORDS, "tokenizer": base[1]}
    for cls in (trl.SFTTrainer, transformers.Trainer):
        for name, parameter in inspect.signature(cls).parameters.items():
            if name not in (*given, "processing_class"):
                SFTTrainer(**given, **{name: parameter.default})


def test_what_transformers_has_beside_names_its_replacement(base):
    trainer = SFTTrainer(base[0], None, RECORDS, tokenizer=base[1])
    with pytest.raises(AttributeError, match=r"no 'predict'; use trainer.evaluate\(\)"):
        trainer.predict(RECORDS)
    with pytest.raises(AttributeError, match=r"SFTTrainer has no 'zzz'$"):
        _ = trainer.zzz


# ---- views and results


def test_the_views_are_rows_and_columns_of_the_samples(base):
    trainer = SFTTrainer(base[0], None, RECORDS, RECORDS[:3], tokenizer=base[1])
    view, samples = trainer.train_dataset, trainer.data.train.samples
    assert len(view) == len(RECORDS) and len(trainer.eval_dataset) == 3
    row = view[5]
    assert row["input_ids"] == samples[5].input_ids.tolist()
    assert row["labels"] == samples[5].labels.tolist() and -100 in row["labels"]
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert view[-1] == list(view)[-1]
    assert view["labels"] == [r["labels"] for r in view]
    assert view[:2]["labels"] == view["labels"][:2]
    with pytest.raises(KeyError, match="choose from input_ids"):
        view["text"]
    with pytest.raises(IndexError):
        view[len(view)]


def test_evaluate_returns_the_numbers_of_transformers_before_and_after_training(smallest, tmp_path):
    logs = []

    class Seen(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            logs.append((state.global_step, metrics["eval_loss"]))

    trainer = new_trainer(smallest, tmp_path / "run", RECORDS[:4], max_steps=2)
    trainer.add_callback(Seen)
    before = trainer.evaluate()
    assert before.keys() == {"eval_loss", "eval_runtime", "eval_samples_per_second", "epoch"}
    result = trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["epoch"] == trainer.state.epoch > 0
    assert logs == [(0, before["eval_loss"]), (2, after["eval_loss"])]
    other = trainer.evaluate(eval_dataset=RECORDS[:4], metric_key_prefix="test")
    assert other["test_loss"] == after["eval_loss"] and "eval_loss" not in other
    metrics = result.metrics
    assert result.training_loss == metrics["train_loss"]
    assert metrics["train_steps_per_second"] == pytest.approx(2 / metrics["train_runtime"])
    assert metrics["train_samples_per_second"] == pytest.approx(10 / metrics["train_runtime"])
    assert trainer.state.log_history[0]["loss"] == read_metrics(tmp_path / "run")[0]["loss"]


def test_save_model_writes_the_adapter_of_now(smallest, tmp_path):
    trainer = new_trainer(smallest, tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match="pass a folder to save_model"):
        trainer.save_model()
    trainer.save_model(tmp_path / "before")
    trainer.train()
    trainer.save_model(str(tmp_path / "after"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "after" / name).read_bytes() == adapter_bytes(tmp_path / "run")
    before = load_file(tmp_path / "before" / name)
    assert any(before[key].any() for key in before if "lora_A" in key)
    assert not any(before[key].any() for key in before if "lora_B" in key)
    trainer.save_model()


def test_a_second_call_of_train_is_refused_or_replaces_the_run(smallest, tmp_path, monkeypatch):
    trainer = new_trainer(smallest, tmp_path / "run", max_steps=2)
    trainer.train()
    with pytest.raises(ValueError, match="already holds a run"):
        trainer.train()
    replacing = new_trainer(smallest, tmp_path / "run", max_steps=2, overwrite=True)
    losses = [replacing.train().training_loss for _ in range(2)]
    assert losses[1] < losses[0]  # it goes on from the trained adapter, with a new optimizer
    monkeypatch.chdir(tmp_path)
    unnamed = new_trainer(smallest, None, max_steps=1, save_strategy="steps")
    assert [unnamed.train().global_step, unnamed.output.name] == [1, "1"]
    assert [unnamed.train().global_step, unnamed.output.name] == [1, "2"]
    assert without_times(read_metrics(unnamed.output))[0]["step"] == 1


def test_bf16_on_a_float32_model_is_a_note_and_the_run_goes_on(smallest, tmp_path, capsys):
    trainer = new_trainer(smallest, tmp_path / "run", max_steps=1, bf16=True)
    assert trainer.train().global_step == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "note: bf16=True asks for bfloat16, but the model was loaded in float32" in shown


@pytest.mark.parametrize("kind", ["spm", "llama3"])
def test_a_text_with_special_tokens_at_its_ends_gets_no_second_ones(tmp_path, kind):
    folder = make_smallest_model(tmp_path / kind, tokenizer=kind)
    model, tokenizer = FastLanguageModel.from_pretrained(folder, 64, device="cpu")
    model = FastLanguageModel.get_peft_model(model, r=2)
    texts = ["blue", f"{tokenizer.bos_token}blue{tokenizer.eos_token}"]
    records = [{"prompt": text} for text in texts]
    trainer = SFTTrainer(
        model, None, records, tokenizer=tokenizer, formatting_func=lambda record: record["prompt"]
    )
    first, second = trainer.train_dataset["input_ids"]
    assert first == second and first.count(first[0]) == 1

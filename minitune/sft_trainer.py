"""The trainer of the public door, under TRL's and Unsloth's names."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitune.api import FastLanguageModel, get_peft_model
from minitune.checkpoints.adapter import save_adapter
from minitune.checkpoints.find_model import ADAPTER
from minitune.config.foreign_arguments import ANYTHING, Foreign, Renamed, foreign_arguments
from minitune.config.sft_config import SFTConfig
from minitune.config.training_config import LoraConfig, RunConfig
from minitune.data.collator import DataCollatorForSeq2Seq
from minitune.data.records.plain_texts import TEXT_FIELD
from minitune.data.response_marks import check_marks
from minitune.data.sources.formatted_texts import formatted_records
from minitune.data.sources.sources import Dataset
from minitune.data.templates.adapter_template import save_template
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.progress import print_message
from minitune.training.callbacks import TrainerControl, TrainerState
from minitune.training.trainer import Trainer

CHECKED_SAMPLES = 100  # in which the marks of train_on_responses_only have to occur
COMPUTES_SCORES = Foreign(
    "evaluation keeps no logits; score_answer=function scores generated answers"
)
NOT_PREPARED = Foreign("the trainer tokenizes the records itself", neutral=(None, {}))
# Attributes of transformers' Trainer -> what to use here.
ABSENT = {
    "predict": "use trainer.evaluate() for the loss, or model.generate() for answers",
    "save_state": "each checkpoint holds the state, and metrics.jsonl the history",
    "log_metrics": "print the dict; metrics.jsonl in the run folder holds the numbers",
    "save_metrics": "metrics.jsonl in the run folder holds the numbers",
    "push_to_hub": "nothing is uploaded; upload the saved folder yourself",
    "hyperparameter_search": "make one trainer for each choice of settings",
    "lr_scheduler": "trainer.learning_rate(step) returns the learning rate of a step",
    "get_train_dataloader": "trainer.train_dataset holds the tokenized samples",
    "get_eval_dataloader": "trainer.eval_dataset holds the tokenized samples",
    "data_collator": "samples are packed without padding",
    "compute_loss": "model(input_ids=ids, labels=labels).loss returns a loss",
}


@foreign_arguments(
    tokenizer=Renamed("processing_class"),
    max_seq_length=Renamed("max_length"),
    data_collator=Foreign(
        "samples are packed without padding; leave it out", neutral=(None, DataCollatorForSeq2Seq)
    ),
    compute_metrics=COMPUTES_SCORES,
    preprocess_logits_for_metrics=COMPUTES_SCORES,
    compute_loss_func=Foreign("the loss is the mean over the trained-on tokens"),
    optimizers=Foreign("SFTConfig(optim=...) names the optimizer", neutral=(None, (None, None))),
    optimizer_cls_and_kwargs=Foreign("SFTConfig(optim=...) names the optimizer"),
    model_init=Foreign("load the model and pass it as model"),
    model_init_kwargs=Foreign("load the model with FastLanguageModel.from_pretrained", (None, {})),
    quantization_config=Foreign("FastLanguageModel.from_pretrained(load_in_4bit=True) quantises"),
    dataset_num_proc=Foreign("tokenizing uses the cores that are free", neutral=ANYTHING),
    dataset_batch_size=Foreign("tokenizing chooses its batches itself", neutral=ANYTHING),
    dataset_kwargs=NOT_PREPARED,
    eval_packing=Foreign("evaluation packs samples without padding", neutral=ANYTHING),
    neftune_noise_alpha=Foreign("no noise is added to the embeddings; use weight_decay"),
    infinite=Foreign("SFTConfig(max_steps=...) sets the length of a run", neutral=(None, False)),
    num_of_sequences=Foreign("the data is tokenized as a whole", neutral=ANYTHING),
    chars_per_token=Foreign("the data is tokenized as a whole", neutral=ANYTHING),
)
class SFTTrainer(Trainer):
    """A training run of a model's adapter. The arguments have TRL's names and meanings."""

    def __init__(
        self,
        model: CausalLM | str | Path,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Tokenizer | None = None,
        *,
        formatting_func: Callable[[Any], Any] | None = None,
        callbacks: Iterable[Any] | None = None,
        peft_config: LoraConfig | None = None,
        dataset_text_field: str | None = None,
        packing: bool | None = None,
        max_length: int | None = None,
        score_answer: str | Callable[..., Any] | None = None,
        run_config: RunConfig | None = None,
    ):
        """Check the arguments and tokenize the datasets. Only output_dir/tokenized is written.

        model: a model with an adapter, or a folder to load.
        args: the settings of the run; default: SFTConfig().
        train_dataset, eval_dataset: a path, several paths, or records in memory
            (data/sources/sources.py, data/records/record_formats.py).
        processing_class: the tokenizer; default: that of the model's folder.
        formatting_func: makes the text of a record, or the texts of columns
            (data/sources/formatted_texts.py). The whole text is trained on.
        callbacks: objects or classes of TrainerCallback.
        peft_config: the adapter of a model that has none.
        dataset_text_field, packing, max_length: as in SFTConfig, and before it.
        score_answer: a function of parameters named answer, reference and record, or some of them,
            which returns a number, a bool or a dict of them. At each evaluation the model answers
            `eval_answers` records, and the means are metrics (training/score_functions.py). Or a
            name, as in SFTConfig.
        run_config: settings to write to config.toml; default: the model's settings.

        Raises: ValueError if model, settings and data do not fit together.
        """
        args = _settings(
            args, dataset_text_field=dataset_text_field, packing=packing, max_length=max_length
        )
        if isinstance(model, str | Path):
            model, tokenizer = FastLanguageModel.from_pretrained(model, args.max_length)
            processing_class = processing_class or tokenizer
            peft_config = peft_config or _default_adapter(model)
        if not isinstance(model, CausalLM):
            raise ValueError(
                f"model is a {type(model).__name__}; load it with "
                "minitune.FastLanguageModel.from_pretrained, or pass its folder"
            )
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if formatting_func is not None:
            field = args.dataset_text_field or TEXT_FIELD
            train_dataset = formatted_records(train_dataset, formatting_func, field)
            eval_dataset = formatted_records(eval_dataset, formatting_func, field)
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            run_config=run_config,
            callbacks=callbacks or (),
            score_answer=score_answer,
        )

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError with the replacement of an attribute of transformers' Trainer."""
        reason = f"; {ABSENT[name]}" if name in ABSENT else ""
        raise AttributeError(f"SFTTrainer has no {name!r}{reason}")

    @property
    def state(self) -> TrainerState:
        """The position and the history of the run."""
        return self.run_control.state

    @property
    def control(self) -> TrainerControl:
        """The wishes of the callbacks."""
        return self.run_control.control

    def add_callback(self, callback: Any) -> None:
        """Add a callback, an object or a class.

        Raises: ValueError if it is none.
        """
        self.run_control.handler.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first one of a class."""
        self.run_control.handler.pop(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first one of a class, and return it; None if there is none."""
        return self.run_control.handler.pop(callback)

    def evaluate(
        self, eval_dataset: Dataset | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss of the evaluation data, a mean over its trained-on tokens, and its speed.

        The scores of answers follow, if the trainer has a scoring function.

        eval_dataset: data in place of that of the trainer.
        metric_key_prefix: first word of the names; the callbacks always get "eval".

        Raises: ValueError if there is no evaluation data, or the loss is not finite.
        """
        metrics = {**self._evaluation(eval_dataset), "epoch": self.state.epoch}
        self.run_control.log({"step": self.state.global_step, **metrics})
        self.run_control.event("on_evaluate", metrics=metrics)
        return {
            f"{metric_key_prefix}{name[4:]}" if name.startswith("eval_") else name: value
            for name, value in metrics.items()
        }

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the adapter, and the chat template if one was assigned.

        output_dir: default: adapter in the run folder.

        Raises: ValueError if there is no run folder, or the folder cannot be written.
        """
        if output_dir is None:
            if self._run is None:
                raise ValueError(
                    "there is no run folder before train(); pass a folder to save_model"
                )
            if self.output is None:
                raise ValueError(
                    "this run has no folder: output_dir is None and save_strategy 'no'; pass a "
                    "folder to save_model"
                )
            output_dir = self.output / ADAPTER
        save_adapter(self.model, output_dir)
        save_template(self.processing_class, Path(output_dir))


def _default_adapter(model: CausalLM) -> LoraConfig | None:
    """Return the settings of an adapter for a model that has none, and print a note on it."""
    if model.lora is not None:
        return None
    text = "only adapters are trained; peft_config=LoraConfig(...) chooses another one"
    print_message("note", text)
    return LoraConfig()


def _settings(args: SFTConfig | None, **given: Any) -> SFTConfig:
    """Return the settings of a trainer, with those given beside them; None is not given.

    Raises: ValueError if `args` is of another library.
    """
    args = SFTConfig() if args is None else args
    if isinstance(args, dict):
        raise ValueError("args is a dict; pass args=SFTConfig(**args)")
    if not isinstance(args, SFTConfig):
        raise ValueError(
            f"args is a {type(args).__module__.split('.')[0]} {type(args).__name__}; import "
            "SFTConfig or TrainingArguments from minitune"
        )
    return replace(args, **{name: value for name, value in given.items() if value is not None})


@foreign_arguments(
    force_match=Foreign("the marks are searched for in the text", neutral=ANYTHING),
    tokenizer=Foreign("the tokenizer is the trainer's", neutral=ANYTHING),
    num_proc=Foreign("tokenizing uses the cores that are free", neutral=ANYTHING),
    return_function=Foreign("the trainer's data is labelled; leave it out", neutral=(False,)),
    last_response_only=Foreign(
        "mark the messages to leave out in the records, by train or weight", neutral=(False,)
    ),
)
def train_on_responses_only(
    trainer: SFTTrainer, instruction_part: str, response_part: str
) -> SFTTrainer:
    """Train on answers only, and return the trainer, whose data is labelled anew.

    Conversations are labelled by their structure, so their labels stay; the marks are only checked.
    A plain text is trained on after each response_part, up to the next instruction_part
    (data/response_marks.py).

    Raises: ValueError if a mark does not occur in the data, or the data cannot be read again.
    """
    samples, tokenizer = trainer.data.train.samples, trainer.processing_class
    texts = (
        tokenizer.decode(samples[i].input_ids, skip_special_tokens=False)
        for i in range(min(CHECKED_SAMPLES, len(samples)))
    )
    check_marks(texts, instruction_part, response_part)
    trainer.relabel(instruction_part, response_part)
    return trainer

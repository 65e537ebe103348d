"""The settings of a training run, under TRL's names."""

from dataclasses import dataclass, fields

from minitune.config.fields import check_settings, setting
from minitune.config.foreign_arguments import foreign_arguments
from minitune.config.foreign_settings import FOREIGN_SETTINGS
from minitune.config.sft_checks import check_together, normal_value
from minitune.config.training_config import (
    DROPPED_TEXT,
    INTERVALS,
    MAX_SEQ_LENGTH,
    OPTIMIZERS,
    REPORTS,
    SAVE_STRATEGIES,
    SCHEDULES,
)

MAX_DATA_WEIGHT = 1000  # copies of a source's samples


@foreign_arguments(**FOREIGN_SETTINGS)
@dataclass(frozen=True)
class SFTConfig:
    """The settings of a training run, under TRL's names; an unknown name is a TypeError.

    Settings that TRL and transformers have beside these are accepted if they change nothing
    (foreign_settings.py).

    An optimizer step trains on per_device_train_batch_size * gradient_accumulation_steps samples
    (with packing: rows of max_length tokens). The samples are moved without padding, in as few
    forward/backward passes as `micro_step_tokens` allows. The loss is divided once, by the number
    of trained-on tokens of the whole step, so the split changes the speed and not the result.

    Without output_dir a run makes a new numbered folder under runs/. With save_strategy "no" it has
    no folder then, and writes nothing; a command makes the folder in any case.
    """

    output_dir: str | None = setting(None, "run folder; default: a new numbered folder under runs/")
    per_device_train_batch_size: int = setting(
        8, "samples (with packing: rows) of an optimizer step ...", minimum=1
    )
    gradient_accumulation_steps: int = setting(1, "... times this", minimum=1)
    num_train_epochs: float = setting(3.0, "passes through the data", greater_than=0)
    max_steps: int = setting(-1, "optimizer steps; a positive number replaces num_train_epochs")
    learning_rate: float = setting(
        2e-5, "peak learning rate; adapters usually need about 2e-4", minimum=0
    )
    lr_scheduler_type: str = setting(
        "linear", "shape of the learning rate after warm-up", choices=SCHEDULES
    )
    lr_scheduler_cycles: int = setting(
        1, "waves of the learning rate, with cosine_with_restarts", minimum=1
    )
    warmup_steps: float = setting(
        0, "steps of linear warm-up; below 1: a share of all steps", minimum=0
    )
    warmup_ratio: float = setting(
        0.0, "warm-up as a share of all steps, used if warmup_steps is 0", minimum=0, maximum=1
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", minimum=0)
    adam_beta1: float = setting(0.9, "decay of the first moment", minimum=0, less_than=1)
    adam_beta2: float = setting(0.999, "decay of the second moment", minimum=0, less_than=1)
    adam_epsilon: float = setting(1e-8, "added to the root of the second moment", minimum=0)
    optim: str = setting(
        "adamw_torch_fused",
        "AdamW on one flat buffer; moments in float32, with adamw_8bit in 8 bits",
        choices=OPTIMIZERS,
    )
    bf16: bool | None = setting(
        None, "True expects a model in bfloat16, and notes any other dtype", python_only=True
    )
    fp16: bool | None = setting(
        None, "True expects a model in float16, and notes any other dtype", python_only=True
    )
    max_grad_norm: float = setting(
        1.0, "largest global norm of the gradient; 0 turns clipping off", minimum=0
    )
    max_length: int | None = setting(
        None,
        "longer samples are cut to this many tokens; default max_seq_length",
        minimum=2,
        maximum=MAX_SEQ_LENGTH,
    )
    packing: bool = setting(
        False, "fill rows of max_length with whole samples, and count rows instead of samples"
    )
    assistant_only_loss: bool | None = setting(
        None, "train on assistant turns only; default: yes for conversations"
    )
    completion_only_loss: bool | None = setting(
        None, "train on completions only; default: yes for prompt/completion"
    )
    dataset_text_field: str | None = setting(
        None,
        "key of plain-text records; default text; a name that is given here wins over the other "
        "shapes in a record",
    )
    split_turns: bool | None = setting(
        None,
        "make one sample of each answer, as at inference; default: if the chat template leaves "
        "earlier reasoning out",
    )
    dropped_text: str = setting(
        "error",
        "if the chat template leaves a text of a record out, refuse the record or warn",
        choices=DROPPED_TEXT,
    )
    template_date: str | None = setting(
        None, "the day that a chat template writes, such as 2026-11-25; default: the run's first"
    )
    ignore_fields: tuple[str, ...] = setting(
        (), "keys of records to leave out on purpose, such as title or messages.mood"
    )
    skip_bad: bool = setting(False, "leave out records that cannot be read or used, and count them")
    data_weights: tuple[float, ...] = setting(
        (),
        "a number for each file of the training data: 2 takes its samples twice, 0.5 takes half",
        greater_than=0,
        maximum=MAX_DATA_WEIGHT,
    )
    instruction_part: str | None = setting(
        None, "text before each instruction of plain texts; needs response_part"
    )
    response_part: str | None = setting(
        None, "text before each answer of plain texts, which are then trained on their answers only"
    )
    logging_strategy: str = setting("steps", "when to write a metrics line", choices=INTERVALS)
    logging_steps: int = setting(10, "optimizer steps a metrics line", minimum=1)
    logging_first_step: bool = setting(False, "write a metrics line for the first step too")
    save_strategy: str = setting(
        "steps",
        "when to write checkpoint-N; best: after each evaluation that is the best so far",
        choices=SAVE_STRATEGIES,
    )
    save_steps: int = setting(
        500, "optimizer steps a checkpoint, with save_strategy steps", minimum=1
    )
    save_total_limit: int | None = setting(
        None, "number of newest checkpoints that stay; default: all", minimum=1
    )
    eval_strategy: str = setting(
        "no", "when to compute the loss of the evaluation data", choices=INTERVALS
    )
    eval_steps: int | None = setting(
        None, "steps between evaluations; default logging_steps", minimum=1
    )
    eval_on_start: bool = setting(False, "evaluate before the first step too")
    load_best_model_at_end: bool = setting(
        False, "end with the adapter of the best checkpoint, by metric_for_best_model"
    )
    metric_for_best_model: str | None = setting(
        None,
        "the metric of the best checkpoint, which save_total_limit keeps: loss, or a score of "
        "score_answer",
    )
    greater_is_better: bool | None = setting(
        None, "a greater metric is the better one; default: yes, unless its name ends in loss"
    )
    score_answer: str | None = setting(
        None,
        "at each evaluation, let the model answer, and score the answers with FILE.py:FUNCTION, "
        "exact_match or contains",
    )
    eval_answers: int = setting(
        64, "evaluation records that the model answers for score_answer: the first ones", minimum=1
    )
    eval_max_new_tokens: int = setting(
        256, "tokens of such an answer at most", minimum=1, maximum=MAX_SEQ_LENGTH
    )
    sample_prompts: tuple[str, ...] = setting(
        (),
        "texts of a user, without a system message, that the model answers before the first "
        "step, at each evaluation and after the last step",
    )
    seed: int = setting(
        42, "the order of the samples follows from this and the epoch", minimum=0, maximum=2**64 - 1
    )
    report_to: str = setting(
        "none",
        "further destination of the metrics, which metrics.jsonl holds in any case",
        choices=REPORTS,
    )
    logging_dir: str | None = setting(
        None, "folder of TensorBoard's files; default: tensorboard in the run folder"
    )
    run_name: str | None = setting(None, "a name of the run, for callbacks")
    disable_tqdm: bool | None = setting(None, "show no progress bar")
    micro_step_tokens: int | None = setting(
        None, "tokens of one forward/backward; default by device", minimum=1
    )
    memory_budget: str | None = setting(
        None,
        "GPU memory to plan with, such as 24GiB, with use_gradient_checkpointing 'unsloth'; "
        "default: all free memory",
    )
    host_memory: str | None = setting(
        None, "host memory for offloaded activations; default: half of the available memory"
    )
    cuda_graphs: bool = setting(True, "on a GPU, capture a micro-step of each size and replay it")
    overwrite: bool = setting(False, "replace the run in output_dir")
    resume: bool = setting(
        False, "continue from output_dir's newest checkpoint, or start if there is none"
    )

    def __post_init__(self):
        for item in fields(self):
            value = normal_value(item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        check_settings(self)
        check_together(self)


@foreign_arguments(**FOREIGN_SETTINGS)
@dataclass(frozen=True)
class TrainingArguments(SFTConfig):
    """SFTConfig with the defaults of transformers' TrainingArguments."""

    learning_rate: float = setting(5e-5, "peak learning rate", minimum=0)
    logging_steps: int = setting(500, "optimizer steps a metrics line", minimum=1)

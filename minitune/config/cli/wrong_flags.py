"""The flag that is meant by a wrong one.

MEANINGS lists the usual names that other programs have for a setting. Each name has remedies: a
flag, or a sentence that names flags. The first remedy counts whose flags the command has. difflib
finds misspellings of the command's own flags, and of nothing else.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

from minitune.config.cli.settings import known_settings

SIMILARITY = 0.78  # of a misspelling, as difflib measures it; --modle is as like --model as 0.80
FLAG = re.compile(r"--[a-z0-9][a-z0-9-]*")

IN_4BIT = ("--load-in-4bit, which is the default", "4 bit is the default; leave it out")
IN_16BIT = ("--no-load-in-4bit",)
ONE_GPU = ("one GPU does the work; --device cuda:1 chooses it", "one GPU does the work")
NOTHING_SENT = (
    "nothing is sent to a service; metrics.jsonl in the run folder holds every value, `minitune "
    "report` draws them, and in Python SFTTrainer takes callbacks",
)
OWN_KERNELS = ("the fastest attention is chosen by itself; leave it out",)
EVAL_FILE = ("no part of the data is split off; --eval-data FILE names the evaluation data",)
TEMPLATE = (
    "the chat template of the model folder is used; in Python, get_chat_template sets another",
)

# Names without their dashes -> the remedies.
MEANINGS: dict[str, tuple[str, ...]] = {
    # model and data
    "m base base-model model-name model-path model-name-or-path model-id pretrained-model hf-model "
    "gguf-file hf-file lora-base": ("--model",),
    "tokenizer tokenizer-path tokenizer-name": ("the tokenizer of the model folder is used",),
    "d f dataset datasets dataset-name dataset-path data-path data-file data-dir train train-data "
    "train-file train-files train-dataset training-data input-file": (
        "--data",
        "--imatrix-from",
    ),
    "val val-data val-file val-dataset valid-data valid-file validation-data validation-file "
    "eval-file eval-dataset test-data test-file eval": ("--eval-data",),
    "val-size val-split val-ratio eval-ratio test-size test-split validation-split split": (
        EVAL_FILE
    ),
    "text-field text-column text-key": ("--dataset-text-field",),
    "chat-template template prompt-template": TEMPLATE,
    "response-template": ("--response-part",),
    "instruction-template": ("--instruction-part",),
    "mask-prompt train-on-responses-only train-on-inputs": (
        "only answers are trained on by default; --no-assistant-only-loss or "
        "--no-completion-only-loss trains on the rest too",
    ),
    # optimisation
    "lr peak-lr max-lr": ("--learning-rate",),
    "epochs epoch num-epochs n-epochs train-epochs max-epochs e": ("--num-train-epochs",),
    "steps iters max-iters num-steps train-steps max-train-steps iterations": ("--max-steps",),
    "batch-size bs b batch micro-batch-size per-device-batch-size train-batch-size": (
        "--per-device-train-batch-size",
    ),
    "eval-batch-size val-batch-size": (
        "an evaluation packs its samples by itself; --micro-step-tokens limits a pass",
    ),
    "grad-accum grad-accum-steps grad-accumulation gradient-accumulation ga accum accumulate "
    "accumulation-steps": ("--gradient-accumulation-steps",),
    "scheduler lr-scheduler lr-schedule schedule": ("--lr-scheduler-type",),
    "warmup num-warmup-steps lr-warmup-steps": ("--warmup-steps",),
    "wd decay": ("--weight-decay",),
    "optimizer opt": ("--optim",),
    "clip grad-clip clip-grad max-grad clip-grad-norm gradient-clipping": ("--max-grad-norm",),
    "beta1": ("--adam-beta1",),
    "beta2": ("--adam-beta2",),
    "eps epsilon adam-eps": ("--adam-epsilon",),
    "random-seed": ("--seed",),
    # the adapter
    "rank lora-r lora-rank lora-dim": ("--r",),
    "alpha scale": ("--lora-alpha",),
    "dropout lora-dropout": (
        "LoRA dropout is not supported, because recomputation would need the same mask; leave it "
        "out",
    ),
    "lora-target lora-targets lora-target-modules lora-modules lora-layers targets modules": (
        "--target-modules",
    ),
    "rslora": ("--use-rslora",),
    "dora use-dora": ("DoRA is not supported; --use-rslora is another scaling of LoRA",),
    "lora lora-path adapter-path adapter-dir peft peft-path adapter-name-or-path": (
        "--adapter",
        "each run trains a LoRA adapter; --r sets its rank",
    ),
    "full full-finetuning full-finetune finetuning-type": (
        "only adapters are trained; leave it out",
    ),
    # lengths, memory and the device
    "context-length context ctx ctx-size n-ctx seq-len seq-length sequence-len sequence-length "
    "max-seq-len max-context cutoff-len block-size max-model-len model-max-length": (
        "--max-seq-length",
    ),
    "quant quantize quantization quant-type quants": (
        "--quantization-method",
        "the base is in 4 bit by default (--load-in-4bit), and --gguf q4_k_m writes a quantised "
        "file at the end",
        *IN_4BIT,
    ),
    "4bit load-4bit use-4bit in-4bit qlora nf4 bits bnb": IN_4BIT,
    "8bit load-in-8bit load-8bit use-8bit int8": (
        "there is no 8-bit base; --load-in-4bit is the default, --no-load-in-4bit holds 16 bit",
        "there is no 8-bit base; 4 bit is the default, --no-load-in-4bit holds 16 bit",
    ),
    "16bit no-4bit no-quant load-in-16bit": IN_16BIT,
    "fp16 float16 half": ("--dtype float16",),
    "bf16 bfloat16": ("--dtype bfloat16, which is the default on a GPU that has it",),
    "fp32 float32 no-half": ("--dtype float32, which is the default on a CPU",),
    "precision mixed-precision torch-dtype": ("--dtype",),
    "loss-scale initial-loss-scale init-scale grad-scaler": (
        "float16 finds its loss scale by itself; leave it out",
    ),
    "tf32": ("the precision of each matmul is fixed; leave it out",),
    "gradient-checkpointing grad-checkpoint checkpointing": ("--use-gradient-checkpointing",),
    "gpu cuda": ("--device cuda",),
    "cpu use-cpu no-cuda": ("--device cpu",),
    "gpus num-gpus n-gpu gpu-ids nproc-per-node world-size deepspeed fsdp ddp": ONE_GPU,
    "vram gpu-memory memory max-memory mem": ("--memory-budget",),
    "flash-attn flash-attention use-flash-attention attn-implementation attention": OWN_KERNELS,
    "compile torch-compile": ("nothing is compiled by torch; --no-cuda-graphs turns graphs off",),
    "num-workers workers dataset-num-proc num-proc dataloader-num-workers threads": (
        "tokenization and the number of threads need no setting; leave it out",
    ),
    # the run and its files
    "o out output outdir out-dir output-path output-file outfile save-dir save-path save": (
        "--output-dir",
        "--output",
        "--html",
    ),
    "resume-from resume-from-checkpoint continue checkpoint": ("--resume",),
    "force overwrite-output-dir": ("--overwrite",),
    "tensorboard use-tensorboard": ("--report-to tensorboard",),
    "tensorboard-dir tensorboard-log-dir log-dir": ("--logging-dir",),
    "wandb use-wandb wandb-project mlflow comet project logger log-to": NOTHING_SENT,
    "plot plots curves dashboard html-report": ("--report",),
    "wandb-name wandb-run-name experiment-name": ("--run-name",),
    "early-stopping early-stopping-patience patience": (
        "in Python, pass minitune.EarlyStoppingCallback to SFTTrainer; --load-best-model-at-end "
        "saves the best adapter",
    ),
    "load-best best-model save-best": ("--load-best-model-at-end",),
    "log-every log-interval log-steps logging-interval": ("--logging-steps",),
    "score scorer score-function scoring-function compute-metrics eval-metric metric "
    "predict-with-generate": ("--score-answer",),
    "eval-samples max-eval-samples num-eval-samples eval-limit": ("--eval-answers",),
    "generation-max-length generation-max-new-tokens": ("--eval-max-new-tokens",),
    "eval-every eval-interval val-every steps-per-eval": ("--eval-steps",),
    "save-every save-interval checkpoint-every": ("--save-steps",),
    "keep max-checkpoints save-total": ("--save-total-limit",),
    "push-to-hub hub-model-id upload": ("nothing is uploaded; copy the run folder",),
    "token hf-token trust-remote-code": (
        "nothing is downloaded and no code of a model is run; leave it out",
    ),
    "evaluate eval-mode do-eval evaluate-only": ("--eval-only",),
    "do-train": ("this command trains; leave it out",),
    "merge merge-adapter merge-and-unload merged-dir": ("--merge", "--merged"),
    "dry-run estimate": ("--plan",),
    "q silent no-progress no-progress-bar": ("--quiet",),
    "v verbose verbosity log-level": ("every line is printed; --quiet prints errors only",),
    # generation and export
    "p question input text ask user": ("--prompt",),
    "sys system-prompt system-message": ("--system",),
    "n-predict predict max-tokens max-length max-new new-tokens num-predict": ("--max-new-tokens",),
    "temp t": ("--temperature",),
    "topp nucleus": ("--top-p",),
    "topk": ("--top-k",),
    "do-sample sample": ("--temperature 0.7 draws the tokens",),
    "greedy": ("the likeliest token is the default; leave it out",),
    "chat interactive i": ("without --prompt it reads lines from the terminal",),
    "gguf outtype type types method": (
        "--quantization-method, and --output names the GGUF file or its folder",
        "--gguf",
    ),
    "output-dir": ("--output",),
    "lora-out save-lora": ("--gguf-adapter", "--output-dir"),
    "save-method": (
        "--merged for a 16-bit folder, --output for a GGUF file, --gguf-adapter for the adapter",
        "--merge for a 16-bit folder, --gguf for GGUF files",
    ),
    "ngl n-gpu-layers gpu-layers": ("the whole model is on one device, which --device names",),
    "modelfile": ("--ollama",),
    "calibration calib-data imatrix-data": ("--imatrix-from",),
    "no-check skip-verify": ("--no-verify",),
    "c config-file": ("--config",),
    "n num-samples samples limit": ("--n", "--show"),
}
REMEDIES = {name: remedies for names, remedies in MEANINGS.items() for name in names.split()}
# Flags that are no settings of a run -> the command that has them.
OTHER_COMMANDS = {
    "prompt": "generate",
    "temperature": "generate",
    "top-p": "generate",
    "top-k": "generate",
    "max-new-tokens": "generate",
    "system": "generate",
    "raw": "generate",
    "imatrix": "export",
    "imatrix-from": "export",
    "ollama": "export",
    "merged": "export",
    "save-4bit": "export",
    "quantization-method": "export",
    "html": "data show",
    "tokens": "data show",
    "list-shapes": "plan",
    "json": "doctor",
}


def wrong_flag_hint(wrong: str, flags: Iterable[str]) -> str:
    """Return the end of an error message on a flag that does not exist.

    wrong: the flag as given, such as --lr.
    flags: the flags of the command.
    """
    flags = list(flags)
    name = wrong.lstrip("-").lower().replace("_", "-")
    if f"--{name}" in flags:
        return f"write --{name}"
    remedies = REMEDIES.get(name, ())
    for remedy in remedies:
        if set(FLAG.findall(remedy)) <= set(flags):
            return f"use {remedy}" if remedy.startswith("--") else remedy
    if name.startswith("no-") and f"--{name[3:]}" in flags:
        return f"leave out --{name[3:]}, which is off unless it is given"
    close = _misspelt(name, flags)
    if close:
        return f"did you mean {' or '.join(close)}?"
    for remedy in (f"--{name}", *remedies):
        own = FLAG.findall(remedy)[:1]
        if own and (command := _command_of(own[0][2:])):
            return f"{own[0]} is a flag of `minitune {command}`"
    return "--help lists the flags"


def _command_of(name: str) -> str | None:
    """Return the command that has a flag, or None; `minitune train` has all settings."""
    is_setting = name.replace("-", "_") in known_settings()
    return OTHER_COMMANDS.get(name, "train" if is_setting else None)


def _misspelt(name: str, flags: Sequence[str]) -> list[str]:
    """Return the flags of which `name` is likely a misspelling, the most similar first."""
    names = [flag[2:] for flag in flags if flag.startswith("--")]
    if len(name) < 3:  # any two letters are like many flags
        return []
    close = difflib.get_close_matches(name, names, n=2, cutoff=SIMILARITY)
    return [f"--{flag}" for flag in close]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error message: the known names that are most like a wrong one."""
    known = list(known)
    remedies = REMEDIES.get(name.lower().replace("_", "-"), ())
    for remedy in remedies:
        if remedy.startswith("--") and (own := remedy[2:].replace("-", "_")) in known:
            return f"use {own}"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"

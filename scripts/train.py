"""Train a LoRA adapter on a JSONL file, from the command line.

    python scripts/train.py --model DIR --data FILE --output-dir DIR [--max-steps 100 --learning-rate 2e-4 ...]
    python scripts/train.py --config run.toml --r 32             a TOML file, and flags that win over it
    python scripts/train.py --output-dir DIR ... --resume        go on where an interrupted run was saved
    python scripts/train.py --demo                               fetch a small model and train it on a shipped task

The run folder holds adapter/, checkpoint-N/, metrics.jsonl and config.toml; --merge and --gguf add the merged model.
What can be expected to go wrong is one line on stderr and exit code 2; Ctrl-C saves, says how to go on, and gives 130.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import demo
import torch

from minitune import runs
from minitune.data import load_dataset
from minitune.flags import Settings, as_dict, parse
from minitune.model import FastLanguageModel, LlamaForCausalLM
from minitune.tokenizer import Tokenizer
from minitune.trainer import SFTTrainer


def check(settings: Settings) -> None:
    """Everything that can be found wrong before the model is loaded. Raises ValueError."""
    run, sft = settings.run, settings.sft
    for name in ("model", "data"):
        if getattr(run, name) is None:
            raise ValueError(f"--{name} is missing: train.py --model DIR --data FILE --output-dir DIR, or --demo")
    if sft.output_dir is not None:
        runs.check_output(sft.output_dir, sft.overwrite, sft.resume)
        for method in run.gguf:
            existing = [] if sft.overwrite or sft.resume else list(gguf_files(Path(sft.output_dir), method))
            if existing:
                raise ValueError(f"{existing[0]} exists; pass --overwrite to replace it, or another --output-dir")
    for path in filter(None, (run.data, run.eval_data)):
        load_dataset(path)


def gguf_files(output: Path, method: str) -> list[Path]:
    return sorted(output.glob(f"*-{method.upper()}.gguf"))


def load(settings: Settings) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The base model with a new adapter, and its tokenizer."""
    run, lora = settings.run, settings.lora
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=run.model,
        max_seq_length=run.max_seq_length,
        dtype=getattr(torch, run.dtype) if run.dtype else None,
        load_in_4bit=run.load_in_4bit,
        device=run.device,
        progress=sys.stderr.isatty(),
    )
    checkpointing = {"true": True, "false": False}.get(run.use_gradient_checkpointing, run.use_gradient_checkpointing)
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        target_modules=lora.target_modules,
        lora_alpha=lora.lora_alpha,
        use_gradient_checkpointing=checkpointing,
        random_state=settings.sft.seed,
        use_rslora=lora.use_rslora,
    )
    return model, tokenizer


def train(settings: Settings) -> None:
    check(settings)
    run = settings.run
    model, tokenizer = load(settings)
    trainer = SFTTrainer(model, settings.sft, run.data, run.eval_data, tokenizer)
    trainer.settings = as_dict(run, settings.lora)
    trainer.train()
    if run.merge:
        shutil.rmtree(trainer.output / "merged", ignore_errors=True)  # of the run that was resumed
        model.save_pretrained_merged(trainer.output / "merged", tokenizer, merge_base=run.merge_base)
        print(f"merged     {trainer.output / 'merged'}", file=sys.stderr)
    for method in run.gguf:
        for old in gguf_files(trainer.output, method):
            old.unlink()
        path = model.save_pretrained_gguf(trainer.output, tokenizer, method, run.merge_base)
        print(f"gguf       {path}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = parse(argv, demo.DEFAULTS)
        if settings.demo:
            demo.run(settings, load)
        else:
            train(settings)
    except KeyboardInterrupt:  # what was saved, and how to go on, has been said
        return 130
    except (ValueError, OSError) as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a LoRA adapter on a JSONL file, from the command line.

    python scripts/train.py --model DIR --data FILE --output-dir DIR [--max-steps 100 --learning-rate 2e-4 ...]
    python scripts/train.py --config run.toml --r 32             a TOML file, and flags that win over it
    python scripts/train.py --config DIR/config.toml --resume    go on where an interrupted run was saved
    python scripts/train.py --demo                               fetch a small model and train it on a shipped task
    python scripts/train.py --plan --model DIR --memory-budget 24GiB     what a step takes; needs no GPU, no weights

The run folder holds adapter/, checkpoint-N/, metrics.jsonl and config.toml; --merge and --gguf add the merged model.
What can be expected to go wrong is one line on stderr and exit code 2; Ctrl-C saves, says how to go on, and gives 130.
"""

import sys
from collections.abc import Sequence

import demo
import torch

from minitune.api import FastLanguageModel
from minitune.checkpoints.safetensors_folder import resolve_model
from minitune.config.cli import Settings, as_dict, parse
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import parse_bytes
from minitune.data.tokenize_dataset import load_dataset
from minitune.gguf.export import gguf_file_name
from minitune.memory.planner import parse_gradient_checkpointing, plan_memory, plan_table
from minitune.training import run_folder as runs
from minitune.training.out_of_memory import default_host_budget, halve_until_fits
from minitune.training.trainer import MICRO_STEP_TOKENS, SFTTrainer


def check(settings: Settings) -> None:
    """Everything that can be found wrong before the model is loaded. Raises ValueError."""
    run, sft = settings.run, settings.sft
    for name in ("model", "data"):
        if getattr(run, name) is None:
            raise ValueError(
                f"--{name} is missing: train.py --model DIR --data FILE --output-dir DIR, or --demo"
            )
    folder, data = (
        resolve_model(run.model),
        [path for path in (run.data, run.eval_data) if path is not None],
    )
    if sft.output_dir is not None:
        files = [gguf_file_name(run.model, folder, method) for method in run.gguf]
        runs.check_output(sft.output_dir, sft.overwrite, sft.resume, [folder, *data], files)
    for path in data:
        load_dataset(path)


def checkpointing(choice: str) -> bool | str:
    """The flag's words as get_peft_model takes them."""
    return {"true": True, "false": False}.get(choice, choice)


def prepare(settings: Settings) -> SFTTrainer:
    """Check the settings, load the base model with a new adapter, and prepare the data. Raises ValueError."""
    check(settings)
    run, lora, sft = settings.run, settings.lora, settings.sft
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=run.model,
        max_seq_length=run.max_seq_length,
        dtype=getattr(torch, run.dtype) if run.dtype else None,
        load_in_4bit=run.load_in_4bit,
        device=run.device,
        offload_embedding=run.offload_embedding,
        progress=sys.stderr.isatty(),
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        target_modules=lora.target_modules,
        lora_alpha=lora.lora_alpha,
        use_gradient_checkpointing=checkpointing(run.use_gradient_checkpointing),
        random_state=sft.seed if run.random_state is None else run.random_state,
        use_rslora=lora.use_rslora,
    )
    trainer = SFTTrainer(model, sft, run.data, run.eval_data, tokenizer)
    trainer.settings |= {
        name: value for name, value in as_dict(run, lora).items() if value is not None
    }
    return trainer


def train(settings: Settings) -> None:
    trainer, run = prepare(settings), settings.run
    trainer.train()
    for path in runs.write_models(
        trainer.model, trainer.processing_class, trainer.output, run.merge, run.gguf, run.merge_base
    ):
        print(f"{'saved':<11}{path}", file=sys.stderr)


def plan(settings: Settings) -> str:
    """The memory and time of a step, in words. Raises ValueError."""
    run, sft = settings.run, settings.sft
    if run.model is None:
        raise ValueError("--model is missing: train.py --plan --model DIR --memory-budget 24GiB")
    if sft.memory_budget is None and not torch.cuda.is_available():
        raise ValueError("--plan needs --memory-budget, as 24GiB, where there is no GPU")
    budget = parse_bytes(sft.memory_budget) if sft.memory_budget else torch.cuda.mem_get_info()[0]
    config = ModelConfig.from_folder(resolve_model(run.model))
    longest = sft.max_length or run.max_seq_length or min(2048, config.max_position_embeddings)
    options = {
        "longest": longest,
        "host_memory": parse_bytes(sft.host_memory) if sft.host_memory else default_host_budget(),
        "eight_bit": sft.optim == "adamw_8bit",
        "load_in_4bit": run.load_in_4bit,
        "offload_embedding": run.offload_embedding,
        "level": parse_gradient_checkpointing(checkpointing(run.use_gradient_checkpointing)),
    }
    tokens = sft.micro_step_tokens or max(MICRO_STEP_TOKENS["cuda"], longest)
    if sft.micro_step_tokens is None:
        tokens = halve_until_fits(
            tokens,
            longest,
            lambda n: plan_memory(config, settings.lora, budget, tokens=n, **options).peak > budget,
        )
    planned = plan_memory(config, settings.lora, budget, tokens=tokens, **options)
    head = f"{run.model}: {tokens:,} tokens a forward/backward, in samples of up to {longest:,}"
    return f"{head}, on {budget / 2**30:.2f} GiB\n{plan_table(planned, tokens, budget)}"


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = parse(
            argv, "train.py", switches=("demo", "plan"), demo_defaults=demo.DEFAULTS
        )
        if settings.plan:
            print(plan(settings))
        elif settings.demo:
            demo.run(settings, prepare)
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

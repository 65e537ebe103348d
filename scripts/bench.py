"""Time QLoRA training steps (forward, backward, optimizer) and their peak memory, with peers beside them if asked.

    python scripts/bench.py --make 8b DIR                   a checkpoint of random weights, to measure with
    python scripts/bench.py --model DIR --batch 2 --tokens 2048 --peer unsloth
    python scripts/bench.py --model DIR --profile           where a step's time goes (benchmark/step_profile.py)
    python scripts/bench.py --model DIR --short             short samples, through SFTTrainer
    python scripts/bench.py --all DIR [--rows 1,2,5]        the table, over DIR/8b, DIR/1b and DIR/135m

Every run prints a table and a line `RESULT {json}` a system, and adds the same JSON to the file of --json.

A step is `batch` samples of `tokens` random tokens, every token a label, on the path that SFTTrainer takes itself. Its
time is the wall clock between two waits for the device, the median of --steps. The --warmup steps before them are told
apart (warmup_s, and each in warmup_steps_s): the first compiles, is launched plainly, and captured. Memory is in GiB as
torch counts it, from after loading and before the first step, so captures are in it. A peer runs before us, in a
process of its own (tests/referees/peers.py), on the same checkpoint and as many tokens: only ratios within one sitting mean
something.

--short is the usual small fine-tune: 4,000 samples of 24 to 1024 letters, 119 on average, 8 an optimizer step. Its
seconds are the differences between the lines of metrics.jsonl, one a step. The median seldom sees what new lengths
cost to capture; samples_s_all does, the mean rate over all steps after the warm-up.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmark import table as bench_table
from benchmark.random_checkpoints import SHAPES, write_random_llama
from benchmark.records import (
    ACCUMULATION,
    FIRST_TOKEN,
    LEARNING_RATE,
    memory_and_place,
    short_figures,
    short_texts,
    start_counting,
    step_figures,
    wait,
)
from benchmark.step_profile import profile_step

from minitune import FastLanguageModel, LanguageModel, SFTConfig, SFTTrainer
from minitune.atomic_files import os_errors_as_value_error
from minitune.checkpoints.safetensors_folder import resolve_model
from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import parse_bytes
from minitune.data.batching import Batch
from minitune.memory.planner import Planner
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW

TARGETS = {"all": LORA_TARGETS, "qkvo": LORA_TARGETS[:4]}
CHECKPOINTING = {"true": True, "false": False, "auto": "auto"}
OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit")
TABLE_FLAGS = {"rows", "no_peers"}  # for --all alone
MODES = {  # what is run -> those of the flags that go with it
    "model": lambda flags: set(flags) - TABLE_FLAGS,
    "all": lambda flags: TABLE_FLAGS | {"attention", "peer", "steps", "warmup", "timeout", "json"},
    "make": lambda flags: set(),
}


# ---- one system, one configuration


def load(a: argparse.Namespace, lora_alpha: int) -> tuple[LanguageModel, Any, dict[str, Any]]:
    """Model with a new adapter, tokenizer, and what the record says of them; the peak of memory counts from here."""
    start = time.perf_counter()
    if a.memory_limit is not None:
        total = torch.cuda.get_device_properties("cuda").total_memory
        torch.cuda.set_per_process_memory_fraction(min(parse_bytes(a.memory_limit) / total, 1.0))
    model, tokenizer = FastLanguageModel.from_pretrained(
        a.model,
        max_seq_length=a.tokens,
        attention=a.attention,
        offload_embedding=a.offload_embedding,
    )
    FastLanguageModel.get_peft_model(
        model,
        r=a.r,
        lora_alpha=lora_alpha,
        target_modules=TARGETS[a.targets],
        use_gradient_checkpointing=CHECKPOINTING[a.checkpointing],
    )
    budget = parse_bytes(a.memory_budget) if a.memory_budget else None
    host = parse_bytes(a.host_memory) if a.host_memory else 0
    model.planner = Planner(model.planner.level, budget, host)
    facts = start_counting(start, sum(p.numel() for _, p in model.trainable_parameters()))
    return model, tokenizer, facts


def time_steps(a: argparse.Namespace) -> dict[str, Any]:
    """The figures of `batch` samples of `tokens` random tokens a step."""
    model, _, facts = load(a, 2 * a.r)
    optimizer = FlatAdamW(
        [p for _, p in model.trainable_parameters()], eight_bit=a.optim == "adamw_8bit"
    )
    micro = MicroStep(model, capture=not a.no_graphs)
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    for _ in range(a.warmup + a.steps):
        batch = random_batch(a.batch, a.tokens, model.config.vocab_size, generator)
        wait()
        start = time.perf_counter()
        loss = micro(batch, batch.targets)
        optimizer.step(LEARNING_RATE)
        optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    record = (
        about(a, facts)
        | step_figures(seconds, losses, a.warmup, a.batch * a.tokens)
        | planned(micro)
    )
    if a.profile:
        plain = MicroStep(model, capture=False)
        record["profile"] = profile_step(
            lambda: plain(batch, batch.targets),
            lambda: (optimizer.step(LEARNING_RATE), optimizer.zero_grad()),
            1e3 * statistics.median(seconds[a.warmup :]),
            model.config.vocab_size,
            a.r,
        )
    return record


def random_batch(batch: int, tokens: int, vocab: int, generator: torch.Generator) -> Batch:
    """`batch` packed samples of random tokens, each its own label."""
    ids = torch.randint(FIRST_TOKEN, vocab, (batch * tokens,), generator=generator)
    return Batch(ids, ids.clone(), torch.arange(tokens).repeat(batch), batch * (tokens - 1))


def time_short_samples(a: argparse.Namespace) -> dict[str, Any]:
    """The figures of a short-sample run through SFTTrainer: per_device_train_batch_size `batch`, accumulation 4."""
    model, tokenizer, facts = load(a, a.r)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=f"{folder}/run",
            per_device_train_batch_size=a.batch,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=a.steps,
            warmup_steps=2,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            optim=a.optim,
            cuda_graphs=not a.no_graphs,
            memory_budget=a.memory_budget,
            host_memory=a.host_memory or ("0GiB" if a.checkpointing == "auto" else None),
            seed=3407,
            logging_steps=1,
            save_strategy="no",
        )
        texts = [{"text": text} for text in short_texts(a.samples)]
        trainer = SFTTrainer(model, args, texts, processing_class=tokenizer)
        trainer.train()
        lines = (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()
    ends = [json.loads(line)["seconds"] for line in lines]
    losses = [json.loads(line)["loss"] for line in lines]
    mean_length = statistics.mean(len(sample.input_ids) for sample in trainer.train_data.samples)
    figures = short_figures(ends, losses, a.warmup, a.batch * ACCUMULATION, mean_length)
    return about(a, facts) | figures | planned(trainer.micro_step)


def planned(micro: MicroStep) -> dict[str, Any]:
    """What the plan expected, to be held against peak_gb and ms (which has the optimizer too)."""
    plan = micro.planner.largest
    facts = {
        "planned_gb": plan.peak / 2**30,
        "planned_ms": 1e3 * plan.seconds,
        "host_gb": plan.host_bytes / 2**30,
    }
    return {name: round(value, 2) for name, value in facts.items()} | {"plan": str(plan)}


def about(a: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """What was run, on what, and the memory that it took so far."""
    return {
        "peer": "minitune",
        "model": Path(a.model).name,
        "gc": a.checkpointing,
        "targets": a.targets,
        "bs": a.batch,
        "seq": a.tokens,
        "r": a.r,
        "attention": a.attention,
        "optim": a.optim,
        "graphs": torch.cuda.is_available() and not a.no_graphs,
        **facts,
        **memory_and_place(),
        "versions": {"torch": torch.__version__, "triton": version("triton")},
    }


# ---- the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises ValueError."""
    p = _Parser(
        prog="bench.py",
        description="Time training steps and their peak memory.",
        allow_abbrev=False,
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="measure on this checkpoint")
    what.add_argument(
        "--all", metavar="DIR", type=Path, help="the table; makes DIR/8b, 1b and 135m where missing"
    )
    what.add_argument(
        "--make", nargs=2, metavar=("SHAPE", "DIR"), help="write random weights: 8b, 1b or 135m"
    )
    p.add_argument(
        "--batch",
        type=int,
        default=2,
        help="samples a step; of --short, a quarter of them (default: 2)",
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=2048,
        help="tokens of a sample; of --short, at most (default: 2048)",
    )
    p.add_argument(
        "--targets",
        choices=TARGETS,
        default="all",
        help="linears with an adapter (default: all seven)",
    )
    p.add_argument("--r", type=int, default=16, help="rank (default: 16)")
    p.add_argument(
        "--checkpointing",
        choices=CHECKPOINTING,
        default="true",
        help="compute again? (default: true)",
    )
    p.add_argument("--attention", choices=("auto", "triton"), help="default: auto; of --all, both")
    p.add_argument(
        "--optim", choices=OPTIMIZERS, help="default: adamw_torch_fused; of --short, adamw_8bit"
    )
    p.add_argument(
        "--steps", type=int, help="steps that are timed (default: 8); of --short, all (default: 60)"
    )
    p.add_argument(
        "--warmup",
        type=int,
        help="steps before those (default: 3); of --short, the first (default: 5)",
    )
    p.add_argument("--short", action="store_true", help="short samples, through SFTTrainer")
    p.add_argument(
        "--samples",
        type=int,
        default=4000,
        help="of --short: samples of the data set (default: 4000)",
    )
    p.add_argument("--no-graphs", action="store_true", help="launch every kernel, capture nothing")
    p.add_argument("--profile", action="store_true", help="where a step's GPU time goes")
    p.add_argument(
        "--memory-budget", help="GPU memory to stay within, as 10GiB; of --checkpointing auto"
    )
    p.add_argument(
        "--host-memory", help="host memory that activations may wait in, likewise; default: none"
    )
    p.add_argument(
        "--offload-embedding", action="store_true", help="keep the embedding in host memory"
    )
    p.add_argument("--memory-limit", help="behave as if the GPU had so much memory, as 24GiB")
    p.add_argument(
        "--peer", choices=bench_table.PEER_NAMES, action="append", help="beside it; may be repeated"
    )
    p.add_argument("--rows", help="of --all: these rows only, as 1,2,5")
    p.add_argument("--no-peers", action="store_true", help="of --all: ours only")
    p.add_argument(
        "--timeout",
        type=float,
        default=900,
        help="seconds for each process that is started (default: 900)",
    )
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="add every record to this file, one a line"
    )
    a = p.parse_args(argv)
    mode = next(name for name in MODES if getattr(a, name))
    given = [
        name for name, value in vars(a).items() if value != p.get_default(name) and name != mode
    ]
    if wrong := [name for name in given if name not in MODES[mode](vars(a))]:
        raise ValueError(f"--{wrong[0].replace('_', '-')} does not go with --{mode}")
    _check(a)
    return a


def _check(a: argparse.Namespace) -> None:
    """Raises ValueError for what does not go together, and fills in the defaults that depend on the kind of run."""
    for name in ("batch", "tokens", "r", "steps", "warmup", "samples"):
        least = 2 if name == "tokens" else 1
        if (value := getattr(a, name)) is not None and value < least:
            raise ValueError(f"--{name} is {value}; expected at least {least}")
    if a.make and a.make[0] not in SHAPES:
        raise ValueError(f"--make {a.make[0]}: no such shape; choose from {', '.join(SHAPES)}")
    if a.short and a.profile:
        raise ValueError(
            "--profile looks at single steps, and --short runs SFTTrainer; leave one of them out"
        )
    if (a.profile or a.memory_limit is not None) and not torch.cuda.is_available():
        raise ValueError("--profile and --memory-limit need a GPU, and torch sees none")
    if a.memory_limit is not None:
        parse_bytes(a.memory_limit)
    for name in ("memory_budget", "host_memory"):
        if (size := getattr(a, name)) is not None:
            parse_bytes(size)
            if a.checkpointing != "auto":
                raise ValueError(
                    f"--{name.replace('_', '-')} needs --checkpointing auto; it is {a.checkpointing}"
                )
    if a.all:
        return
    a.attention = a.attention or "auto"
    a.optim = a.optim or ("adamw_8bit" if a.short else "adamw_torch_fused")
    a.steps = a.steps or (60 if a.short else 8)
    a.warmup = a.warmup or (5 if a.short else 3)
    if a.short and a.steps <= a.warmup:
        raise ValueError(
            f"--steps {a.steps} of --short leaves none after the {a.warmup} of --warmup"
        )
    if a.model:
        known = ModelConfig.from_folder(resolve_model(a.model)).max_position_embeddings
        if a.tokens > known:  # found here, because a peer would take a minute to find it
            raise ValueError(
                f"--tokens {a.tokens} is more than the {known} positions that {a.model} knows"
            )


def main(argv: Sequence[str] | None = None) -> int:
    try:
        a = parse(argv)
        if a.make:
            print(write_random_llama(a.make[1], SHAPES[a.make[0]]))
            return 0
        return 0 if (run_all(a) if a.all else run_one(a)) else 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"bench.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_all(a: argparse.Namespace) -> bool:
    """The table of --all; whether all of it went well."""
    try:
        rows = [int(number) for number in a.rows.split(",")] if a.rows else list(bench_table.ROWS)
    except ValueError:
        raise ValueError(f"--rows {a.rows}: expected numbers with commas between them") from None
    if wrong := [number for number in rows if number not in bench_table.ROWS]:
        raise ValueError(
            f"--rows: there is no row {wrong[0]}; the rows are 1 to {len(bench_table.ROWS)}"
        )
    attentions = [a.attention] if a.attention else ["triton", "auto"]
    peers = [] if a.no_peers else a.peer or ["unsloth"]
    counts = [
        part
        for name in ("steps", "warmup")
        if getattr(a, name)
        for part in (f"--{name}", str(getattr(a, name)))
    ]
    return bench_table.run_table(
        a.all, rows, attentions, peers, counts, a.timeout, lambda record: emit(record, a.json)
    )


def run_one(a: argparse.Namespace) -> bool:
    """One configuration and the peers that were named; whether all of it went well."""
    options = ["--steps", "--warmup", "--r", "--batch", "--tokens", "--targets", "--optim"]
    options = [part for name in options for part in (name, str(getattr(a, name[2:])))]
    options += ["--checkpointing", bench_table.PEER_CHECKPOINTING[a.checkpointing]]
    options += ["--short", "--samples", str(a.samples)] if a.short else []
    records = []
    for peer in a.peer or ():
        records.append(bench_table.peer_record(peer, resolve_model(a.model), options, a.timeout))
        emit(records[-1], a.json)
    records.append(time_short_samples(a) if a.short else time_steps(a))
    emit(records[-1], a.json)
    print("\n" + bench_table.comparison(records))
    if a.profile:
        print("\n" + bench_table.shares(records[-1]["profile"]))
    return not any("error" in record for record in records)


def emit(record: dict[str, Any], path: Path | None) -> None:
    """A RESULT line, and the same as a line of the JSON file."""
    line = json.dumps(record)
    print(bench_table.MARK + line, flush=True)
    if path is not None:
        with os_errors_as_value_error(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())

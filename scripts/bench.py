"""Time QLoRA training steps, their peak memory, and single kernels, with peers beside them.

    python scripts/bench.py --make 8b DIR            write a checkpoint of random weights
    python scripts/bench.py --model DIR --batch 2 --tokens 2048 --peer unsloth
    python scripts/bench.py --model DIR --profile    GPU time by group of kernels
    python scripts/bench.py --model DIR --short      short samples, through SFTTrainer
    python scripts/bench.py --model DIR --decode 1 64 [--peer hf --peer unsloth]
                                                     generation, for 1 and for 64 sequences
    python scripts/bench.py --all DIR [--rows 1,2]   the table, on DIR/8b, DIR/1b and DIR/135m
    python scripts/bench.py --kernels [WORD ...]     kernels whose name contains one of the words

Every run prints one line `RESULT {json}` per record, then a table. --json FILE also appends the
records to FILE.

A step is forward, backward and optimizer; its time is the median of --steps, after --warmup steps.
Memory is in GiB, as torch counts it from the end of loading. A peer (tests/referees/peers.py) runs
before minitune, in a process of its own, on the same checkpoint and the same number of tokens. Only
ratios of runs in one sitting on one machine are meaningful. The parts, and the log of measurements
performance.md, are in scripts/benchmark/.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmark import dequantize_cases, elementwise_cases, matmul_cases, table
from benchmark.cases import CASES
from benchmark.decode_timing import decode_table, kernel_table, time_decoding
from benchmark.kernel_timing import KernelSizes, time_kernels
from benchmark.model_shapes import SHAPES
from benchmark.random_checkpoints import write_random_checkpoint
from benchmark.step_timing import (
    CHECKPOINTING,
    OPTIMIZERS,
    TARGETS,
    time_short_samples,
    time_steps,
)

from minitune.checkpoints.resolve_model import resolve_model
from minitune.config.cli import CommandParser, run_command
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import parse_bytes
from minitune.gguf.base.model_files import model_files

PEER_CHECKPOINTING = {"true": "default", "auto": "default", "false": "none"}
# The flags of each mode; --model takes all but NOT_OF_MODEL.
MODES = {
    "all": {"rows", "no_peers", "attention", "peer", "steps", "warmup", "timeout", "json"},
    "kernels": {"no_peers", "no_compile", "json"},
    "make": set(),
    "model": None,
}
NOT_OF_MODEL = {"rows", "no_peers", "no_compile"}
OF_DECODE = {"prompt_tokens", "new_tokens", "calls", "cache_memory"}
NOT_OF_DECODE = {
    *("batch", "tokens", "optim", "short", "checkpointing", "memory_budget", "host_memory"),
    *("no_graphs", "steps", "warmup"),
}
KERNEL_GROUPS = (*dequantize_cases.GROUPS, *elementwise_cases.GROUPS, *matmul_cases.GROUPS)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = CommandParser(
        prog="bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    modes = p.add_mutually_exclusive_group(required=True)
    modes.add_argument("--model", metavar="DIR", help="measure on this checkpoint")
    modes.add_argument("--all", metavar="DIR", type=Path, help="the table; writes missing models")
    modes.add_argument("--make", nargs=2, metavar=("SHAPE", "DIR"), help=f"{', '.join(SHAPES)}")
    modes.add_argument("--kernels", nargs="*", metavar="WORD", help="kernels; default: all")

    step = p.add_argument_group("the step, with --model")
    step.add_argument("--batch", type=int, default=2, help="samples a micro-step (default: 2)")
    step.add_argument("--tokens", type=int, default=2048, help="of a sample (default: 2048)")
    step.add_argument("--targets", choices=TARGETS, default="all", help="linears with an adapter")
    step.add_argument("--r", type=int, default=16, help="rank (default: 16)")
    step.add_argument("--optim", choices=OPTIMIZERS, help="default: fused; with --short, 8-bit")
    step.add_argument("--short", action="store_true", help="short samples, through SFTTrainer")
    step.add_argument(
        "--checkpointing",
        choices=CHECKPOINTING,
        default="true",
        help="true: recompute, false: save, auto: plan",
    )
    step.add_argument("--memory-budget", help="such as 10GiB, with --checkpointing auto")
    step.add_argument("--host-memory", help="for offloaded activations, likewise; default: none")
    step.add_argument("--memory-limit", help="behave as if the GPU had this much, such as 24GiB")
    step.add_argument("--offload-embedding", action="store_true", help="to host memory")
    step.add_argument("--no-graphs", action="store_true", help="launch eagerly, capture nothing")
    step.add_argument("--profile", action="store_true", help="GPU time by group of kernels")

    decode = p.add_argument_group("generation, with --model")
    decode.add_argument("--decode", nargs="+", type=int, metavar="N", help="numbers of sequences")
    decode.add_argument("--prompt-tokens", type=int, default=128, help="of a prompt (128)")
    decode.add_argument("--new-tokens", type=int, default=256, help="of an answer (256)")
    decode.add_argument("--calls", type=int, default=3, help="timed calls after the first (3)")
    decode.add_argument("--cache-memory", help="of keys and values, such as 2GiB")

    p.add_argument("--attention", choices=("auto", "triton"), help="default: auto; --all: both")
    p.add_argument("--steps", type=int, help="timed steps (default: 8); with --short, all (60)")
    p.add_argument(
        "--warmup",
        type=int,
        help="untimed steps first (3); with --short, the first 5 of --steps",
    )
    p.add_argument("--peer", choices=table.PEER_NAMES, action="append", help="may be repeated")
    p.add_argument("--no-peers", action="store_true", help="with --all and --kernels: ours only")
    p.add_argument("--rows", help="with --all: these rows only, such as 1,2,5")
    p.add_argument("--no-compile", action="store_true", help="with --kernels: no torch.compile")
    p.add_argument("--timeout", type=float, default=900, help="seconds of a process (900)")
    p.add_argument("--json", type=Path, metavar="FILE", help="append the records, one a line")
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked flags, with the defaults that depend on the kind of run.

    Raises: ValueError that names the wrong flag.
    """
    p = parser()
    a = p.parse_args(argv)
    mode = next(name for name in MODES if getattr(a, name) is not None)
    given = {name for name, value in vars(a).items() if value != p.get_default(name)} - {mode}
    wrong = given & NOT_OF_MODEL if MODES[mode] is None else given - MODES[mode]
    if wrong:
        raise ValueError(f"--{min(wrong).replace('_', '-')} does not go with --{mode}")
    if wrong := given & (NOT_OF_DECODE if a.decode else OF_DECODE):
        relation = "does not go with" if a.decode else "goes with"
        raise ValueError(f"--{min(wrong).replace('_', '-')} {relation} --decode")
    _check_sizes(a)
    if a.make and a.make[0] not in SHAPES:
        raise ValueError(f"--make {a.make[0]}: no such shape; choose from {', '.join(SHAPES)}")
    if mode == "model":
        _complete_step(a)
    return a


def _check_sizes(a: argparse.Namespace) -> None:
    """Raise ValueError if a count is too small or a memory size is malformed."""
    counts = ("batch", "tokens", "r", "steps", "warmup", "prompt_tokens", "new_tokens", "calls")
    for name in counts:
        minimum = 2 if name in ("tokens", "new_tokens") else 1
        if (value := getattr(a, name)) is not None and value < minimum:
            raise ValueError(f"--{name} is {value}; expected at least {minimum}")
    if (least := min(a.decode or [1])) < 1:
        raise ValueError(f"--decode {least}; expected numbers of sequences, such as 1 64")
    for name in ("memory_budget", "host_memory", "memory_limit", "cache_memory"):
        if (size := getattr(a, name)) is not None:
            parse_bytes(size)


def _complete_step(a: argparse.Namespace) -> None:
    """Check the flags of --model together, and fill in the defaults of the kind of run."""
    if a.short and a.profile:
        raise ValueError("--profile measures single steps, --short runs SFTTrainer; leave out one")
    if (a.profile or a.memory_limit is not None) and not torch.cuda.is_available():
        raise ValueError("--profile and --memory-limit need a GPU, and torch finds none")
    for name in ("memory_budget", "host_memory"):
        if getattr(a, name) is not None and a.checkpointing != "auto":
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} needs --checkpointing auto; it is {a.checkpointing}")
    a.attention = a.attention or "auto"
    a.optim = a.optim or ("adamw_8bit" if a.short else "adamw_torch_fused")
    a.steps = a.steps or (60 if a.short else 8)
    a.warmup = a.warmup or (5 if a.short else 3)
    if a.short and a.steps <= a.warmup:
        raise ValueError(f"--steps {a.steps} of --short are all in the {a.warmup} of --warmup")
    # Checked here, because a peer would need a minute to find it.
    limit = ModelConfig.from_folder(model_files(resolve_model(a.model))).max_position_embeddings
    if a.decode:
        a.tokens = a.prompt_tokens + a.new_tokens
    if a.tokens > limit:
        raise ValueError(f"--tokens {a.tokens} is more than the {limit} positions of {a.model}")


def run_all(a: argparse.Namespace) -> bool:
    """Run the table of --all. Return True if every run gave a result."""
    try:
        rows = [int(number) for number in a.rows.split(",")] if a.rows else list(CASES)
    except ValueError:
        raise ValueError(f"--rows {a.rows}: expected numbers with commas between them") from None
    if wrong := [number for number in rows if number not in CASES]:
        raise ValueError(f"--rows: there is no row {wrong[0]}; the rows are 1 to {len(CASES)}")
    attentions = [a.attention] if a.attention else ["triton", "auto"]
    peers = [] if a.no_peers else a.peer or ["unsloth"]
    counts = []
    for name in ("steps", "warmup"):
        if getattr(a, name) is not None:
            counts += [f"--{name}", str(getattr(a, name))]
    return table.run_cases(a.all, rows, attentions, peers, counts, a.timeout, a.json)


def run_one(a: argparse.Namespace) -> bool:
    """Run one configuration and the named peers. Return True if every run gave a result."""
    options = []
    for name in ("steps", "warmup", "r", "batch", "tokens", "targets", "optim"):
        options += [f"--{name}", str(getattr(a, name))]
    options += ["--checkpointing", PEER_CHECKPOINTING[a.checkpointing]]
    options += ["--short"] if a.short else []
    records = []
    for peer in a.peer or ():
        records.append(table.peer_record(peer, resolve_model(a.model), options, a.timeout))
        table.emit(records[-1], a.json)
    records.append(time_short_samples(a) if a.short else time_steps(a))
    table.emit(records[-1], a.json)
    print("\n" + table.comparison(records))
    if a.profile:
        print("\n" + table.profile_table(records[-1]["profile"]))
    return not any("error" in record for record in records)


def run_decoding(a: argparse.Namespace) -> bool:
    """Time generation here and in the named peers. Return True if every run gave a result."""
    options = ["--decode", *map(str, a.decode), "--r", str(a.r), "--targets", a.targets]
    for name in ("prompt_tokens", "new_tokens"):
        options += [f"--{name.replace('_', '-')}", str(getattr(a, name))]
    records = []
    for peer in a.peer or ():
        records.append(table.peer_record(peer, resolve_model(a.model), options, a.timeout))
        table.emit(records[-1], a.json)
    records.append(time_decoding(a))
    table.emit(records[-1], a.json)
    print("\n" + decode_table(records))
    for sequences, figures in records[-1]["decode"].items():
        if a.profile:
            print(f"\na step of {sequences} sequences")
            print(table.profile_table(figures["profile"]) + "\n\n" + kernel_table(figures))
    return not any("error" in record for record in records)


def run_kernels(a: argparse.Namespace) -> bool:
    """Time the kernels of --kernels. Return True if all of them are right."""
    sizes = KernelSizes.of(ModelConfig.from_dict(SHAPES["8b"]))
    return time_kernels(KERNEL_GROUPS, sizes, a.kernels, not a.no_peers, not a.no_compile, a.json)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 if a run failed or a kernel is wrong."""
    a = parse(argv)
    if a.make:
        print(write_random_checkpoint(a.make[1], SHAPES[a.make[0]]))
        return 0
    if a.kernels is not None:
        return 0 if run_kernels(a) else 1
    if a.decode:
        return 0 if run_decoding(a) else 1
    return 0 if (run_all(a) if a.all else run_one(a)) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("bench.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())

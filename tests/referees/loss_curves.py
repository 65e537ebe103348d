"""The commands data, curve and curves of exactness.py: QLoRA on real text, from several seeds."""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune.data.tokenization.tokenizer import Tokenizer
from referees.reporting import (
    as_text,
    machine_and_versions,
    markdown_table,
    require_success,
    run_self,
    seeded,
)
from referees.systems import System, digest, load, random_adapter

CURVES = {"minitune-gpu": "minitune", "minitune-cpu": "minitune-cpu", "hf": "hf"}
BATCH = 2  # samples a step
TOKENS = 256  # tokens a sample
HELD_OUT = 32  # held-out samples
LEARNING_RATE = 2e-4
WARMUP = 10  # steps
WINDOW = 20  # steps that a column of the table averages

Runs = dict[str, dict[int, dict[str, Any]]]  # system -> seed -> record


def data(args: argparse.Namespace) -> None:
    """Cut Python's reference documentation into samples, shuffle them, and write those of a run."""
    tokenizer = Tokenizer.from_folder(args.model)
    ids: list[int] = []
    for _, text in sorted(topics.items()):
        ids += tokenizer.encode(text, add_special_tokens=False)
    needed = BATCH * args.steps + HELD_OUT
    pieces = torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS)
    if len(pieces) < needed:
        raise ValueError(
            f"the text has {len(pieces)} samples of {TOKENS} tokens; "
            f"{args.steps} steps need {needed}"
        )
    pieces = pieces[torch.randperm(len(pieces), generator=seeded(0))[:needed]].to(torch.uint16)
    parts = {"held_out": pieces[:HELD_OUT].contiguous(), "train": pieces[HELD_OUT:].contiguous()}
    args.data.parent.mkdir(parents=True, exist_ok=True)
    save_file(parts, args.data)
    size = args.data.stat().st_size
    print(f"{args.data}: {len(pieces)} samples of {TOKENS} tokens, {size} bytes")


def curve(args: argparse.Namespace) -> None:
    """Train one system from each seed, and write a record a seed."""
    if args.system not in CURVES:
        raise ValueError(f"--system is {args.system}; choose from {', '.join(CURVES)}")
    if args.system == "minitune-gpu" and not torch.cuda.is_available():
        raise ValueError("--system minitune-gpu needs a CUDA GPU; minitune-cpu needs none")
    samples = {name: t.long() for name, t in load_file(args.data).items()}
    if len(samples["train"]) < BATCH * args.steps:
        steps = len(samples["train"]) // BATCH
        raise ValueError(f"{args.data} has samples for {steps} steps, not for {args.steps}")
    nf4 = args.out.with_suffix(".nf4.safetensors")
    # One thread and one instruction set give the same order of sums on every CPU.
    pinned = {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = ["weights", "--model", args.model, "--out", nf4, "--device", "cpu"]
    require_success(run_self(*command, **pinned))
    system = load(CURVES[args.system], args.model, nf4, TOKENS)
    nf4.unlink()
    with system.many_steps(), args.out.open("w") as file:
        for seed in range(args.seeds):
            values = random_adapter(system.shapes(), seed, trained=False)
            system.set_adapter(values)
            record = {"system": args.system, "seed": seed, **train(system, samples, args.steps)}
            record |= {
                "nf4": digest(system.nf4),
                "adapter": digest(values),
                "data": digest(samples),
                "about": machine_and_versions(),
            }
            file.write(json.dumps(record) + "\n")
            file.flush()
            after, seconds = record["held_out"][1], record["seconds"]
            print(f"{args.system}, seed {seed}: held-out {after:.4f}, {seconds:.0f} s")


def train(system: System, samples: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Train, and return the loss of each step and the held-out loss before and after."""
    start, losses = time.perf_counter(), []
    optimizer, before = system.optimizer(), held_out_loss(system, samples["held_out"])
    optimizer.zero_grad()
    for step in range(steps):
        losses.append(system.backward(samples["train"][BATCH * step : BATCH * (step + 1)]))
        optimizer.step(LEARNING_RATE * min(1.0, (step + 1) / WARMUP))
        optimizer.zero_grad()
    after = held_out_loss(system, samples["held_out"])
    losses = torch.stack(losses).tolist()
    return {"losses": losses, "held_out": [before, after], "seconds": time.perf_counter() - start}


@torch.no_grad()
def held_out_loss(system: System, samples: Tensor) -> float:
    """Return the mean loss of the held-out samples."""
    return statistics.mean(system.loss(batch).item() for batch in samples.split(4))


def curves(args: argparse.Namespace) -> None:
    """Print the table of the records in the files of `curve`."""
    records = [json.loads(line) for path in args.files for line in path.read_text().splitlines()]
    runs: Runs = {}
    for record in records:
        runs.setdefault(record["system"], {})[record["seed"]] = record
    _check_comparable(records, runs)
    first = {system: seeds[0] for system, seeds in runs.items()}
    for system, record in first.items():
        print(f"{system}: {record['seconds']:.0f} s; {as_text(record['about'])}")
    for key, name in (("nf4", "NF4 weights"), ("adapter", "initial adapter")):
        digests = {system: record[key] for system, record in first.items()}
        equal = len(set(digests.values())) == 1
        listed = ", ".join(map(" ".join, digests.items()))
        print(f"{name}: " + ("the same bits" if equal else f"DIFFERENT, {listed}"))
    print_curves(runs)


def _check_comparable(records: list[dict[str, Any]], runs: Runs) -> None:
    """Raise ValueError if the runs differ in length or samples, or a system lacks seed 0."""
    lengths = {len(record["losses"]) for record in records}
    if len(lengths) != 1 or any(0 not in seeds for seeds in runs.values()):
        raise ValueError("the files must hold runs of one length, and seed 0 of each system")
    if len({record["data"] for record in records}) > 1:
        raise ValueError("the runs used different samples; give all of them the same --data file")


def print_curves(runs: Runs) -> None:
    """Print the mean losses of seed 0, their spread over seeds, and over systems."""
    means = {
        system: {seed: window_means(record) for seed, record in seeds.items()}
        for system, seeds in runs.items()
    }
    steps = len(next(iter(runs.values()))[0]["losses"])
    header = ["steps", *(f"{i + 1}-{min(i + WINDOW, steps)}" for i in range(0, steps, WINDOW))]
    rows = [[system, *_cells(seeds[0])] for system, seeds in means.items()]
    for system, seeds in means.items():
        if len(seeds) > 1:
            spread = [spread_of(column) for column in zip(*seeds.values(), strict=True)]
            rows.append([f"spread of {system} over {len(seeds)} seeds", *_cells(spread)])
    of_seed_0 = (seeds[0] for seeds in means.values())
    between = [spread_of(column) for column in zip(*of_seed_0, strict=True)]
    rows.append(["largest difference between systems, seed 0", *_cells(between)])
    print(f"\nmean loss of each {WINDOW} steps, and held-out loss after the last step\n")
    print(markdown_table([*header, "held-out"], rows))
    print("RESULT " + json.dumps({"means": means, "between": between}))


def window_means(record: dict[str, Any]) -> list[float]:
    """Return the mean loss of each WINDOW steps, and the held-out loss at the end."""
    losses = record["losses"]
    means = [statistics.mean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]
    return [*means, record["held_out"][1]]


def spread_of(values: Iterable[float]) -> float:
    """Return the difference between the largest and the smallest value."""
    values = list(values)
    return max(values) - min(values)


def _cells(values: Iterable[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]

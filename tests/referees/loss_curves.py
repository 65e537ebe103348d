"""The commands data, curve and curves of exactness.py: QLoRA on real text by several systems, from several seeds."""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune.data.tokenizer import Tokenizer
from referees.reporting import about, checked, run_self, seeded, table
from referees.systems import System, digest, drawn_adapter, load

CURVES = {"minitune-gpu": "minitune", "minitune-cpu": "minitune-cpu", "hf": "hf"}
BATCH, TOKENS, HELD_OUT = (
    2,
    256,
    32,
)  # of the curve: samples a step, tokens a sample, held-out samples
LEARNING_RATE, WARMUP = 2e-4, 10
WINDOW = 20  # steps that a column of the curves' table averages


def data(args: argparse.Namespace) -> None:
    """Cut Python's reference documentation into samples, shuffle them, and write those that a run takes."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer.from_folder(args.model)
    ids = [
        i
        for _, text in sorted(topics.items())
        for i in tokenizer.encode(text, add_special_tokens=False)
    ]
    needed = BATCH * args.steps + HELD_OUT
    pieces = torch.tensor(ids[: len(ids) // TOKENS * TOKENS]).view(-1, TOKENS)
    if len(pieces) < needed:
        raise ValueError(
            f"the text has {len(pieces)} samples of {TOKENS} tokens; {args.steps} steps need {needed}"
        )
    pieces = pieces[torch.randperm(len(pieces), generator=seeded(0))[:needed]].to(torch.uint16)
    args.data.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"held_out": pieces[:HELD_OUT].contiguous(), "train": pieces[HELD_OUT:].contiguous()},
        args.data,
    )
    print(
        f"{args.data}: {len(pieces)} samples of {TOKENS} tokens, {args.data.stat().st_size} bytes"
    )


def curve(args: argparse.Namespace) -> None:
    if args.system not in CURVES:
        raise ValueError(f"--system {args.system} is not one of {', '.join(CURVES)}")
    if args.system == "minitune-gpu" and not torch.cuda.is_available():
        raise ValueError(
            "--system minitune-gpu needs a CUDA GPU; without one there is minitune-cpu"
        )
    samples = {name: t.long() for name, t in load_file(args.data).items()}
    if len(samples["train"]) < BATCH * args.steps:
        raise ValueError(
            f"{args.data} has samples for {len(samples['train']) // BATCH} steps, not {args.steps}"
        )
    nf4 = args.out.with_suffix(".nf4.safetensors")
    # On the CPU, one thread, one instruction set: sums are then taken in the same order on every machine.
    pinned = {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checked(run_self("weights", "--model", args.model, "--out", nf4, "--device", "cpu", **pinned))
    system = load(CURVES[args.system], args.model, nf4, TOKENS)
    nf4.unlink()
    with system.working(), args.out.open("w") as file:
        for seed in range(args.seeds):
            values = drawn_adapter(system.shapes(), seed, trained=False)
            system.set_adapter(values)
            record = {"system": args.system, "seed": seed, **train(system, samples, args.steps)}
            record |= {
                "nf4": digest(system.nf4),
                "adapter": digest(values),
                "data": digest(samples),
                "about": about(),
            }
            file.write(json.dumps(record) + "\n")
            file.flush()
            after, seconds = record["held_out"][1], record["seconds"]
            print(
                f"{args.system}, seed {seed}: held-out {after:.4f} after {args.steps} steps, {seconds:.0f} s"
            )


def train(system: System, samples: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Losses of all steps, and the held-out loss before and after."""
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
    return statistics.mean(system.loss(batch).item() for batch in samples.split(4))


def curves(args: argparse.Namespace) -> None:
    records = [json.loads(line) for path in args.files for line in path.read_text().splitlines()]
    runs: dict[str, dict[int, dict]] = {}
    for record in records:
        runs.setdefault(record["system"], {})[record["seed"]] = record
    if (
        any(0 not in seeds for seeds in runs.values())
        or len({len(record["losses"]) for record in records}) != 1
    ):
        raise ValueError(
            "the files must hold runs of one length, of each system also that with seed 0"
        )
    first = {system: seeds[0] for system, seeds in runs.items()}
    if len({record["data"] for record in records}) > 1:
        raise ValueError(
            "the runs were trained on different samples; give all of them the same --data file"
        )
    means = {
        system: {seed: window_means(record) for seed, record in seeds.items()}
        for system, seeds in runs.items()
    }
    columns = range(len(next(iter(means.values()))[0]))
    rows = [[system, *(f"{x:.4f}" for x in seeds[0])] for system, seeds in means.items()]
    for system, seeds in means.items():
        if len(seeds) > 1:
            spread = [spread_of(seeds[seed][c] for seed in seeds) for c in columns]
            rows.append(
                [f"spread of {system} over {len(seeds)} seeds", *(f"{x:.4f}" for x in spread)]
            )
    between = [spread_of(seeds[0][c] for seeds in means.values()) for c in columns]
    rows.append(["largest difference between systems, seed 0", *(f"{x:.4f}" for x in between)])
    steps = len(records[0]["losses"])
    head = [f"{i + 1}-{min(i + WINDOW, steps)}" for i in range(0, steps, WINDOW)]
    for system, record in first.items():
        print(
            f"{system}: {record['seconds']:.0f} s; "
            + ", ".join(f"{k} {v}" for k, v in record["about"].items())
        )
    for key, what in (("nf4", "NF4 weights"), ("adapter", "adapter to begin with")):
        found = {system: record[key] for system, record in first.items()}
        same = len(set(found.values())) == 1
        print(
            f"{what}: "
            + ("the same bits" if same else f"DIFFERENT, {', '.join(map(' '.join, found.items()))}")
        )
    print(f"\nmean loss of each {WINDOW} steps, and of the held-out text after the last\n")
    print(table(["steps", *head, "held-out"], rows))
    print("RESULT " + json.dumps({"means": means, "between": between}))


def window_means(record: dict[str, Any]) -> list[float]:
    """The mean loss of each WINDOW steps, and the held-out loss at the end."""
    losses = record["losses"]
    means = [statistics.mean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]
    return [*means, record["held_out"][1]]


def spread_of(values: Iterable[float]) -> float:
    values = list(values)
    return max(values) - min(values)

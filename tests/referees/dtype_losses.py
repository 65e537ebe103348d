"""Train the same adapter on the same data in float32, bfloat16 and float16, and compare the losses.

    python tests/referees/dtype_losses.py --model models/SmolLM2-135M-Instruct \\
        --data scripts/demonstration/train.jsonl --steps 200 --seeds 3 --out losses.json

Nothing else is written. Three tables and a record of a forced overflow are printed:

    losses      mean |loss - loss of float32| by quarter of the run, with the same adapter at the
                begin and the same samples; the held-out loss; overflows and scales of float16. Two
                more rows show how far rounding alone moves a run: bfloat16 and float16 with each
                step split into several passes.
    gradients   relative distance of a step's gradients to those of float32, for each dtype and for
                fixed loss scales
    overflow    the passes of a run whose scale begins at 2^30, and a run that begins with the
                scale of its first update: the same bits
"""

import argparse
import contextlib
import gc
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from minitune import FastLanguageModel, SFTConfig, SFTTrainer  # noqa: E402
from referees.reporting import as_text, machine_and_versions, markdown_table  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
HELD_OUT = ROOT / "scripts" / "demonstration" / "heldout.jsonl"
SPLIT = "in several passes a step"
QUARTERS = 4
FIXED_SCALES = tuple(2.0**k for k in range(-8, 25, 2))
FORCED_SCALE, FORCED_STEPS = 2.0**30, 5


@dataclass
class Run:
    """The results of one training.

    losses: of each step. scales: after each step, in float16.
    passes: (step from 0, scale, samples as text) of each pass, repeated ones too.
    """

    losses: list[float]
    held_out: float
    scales: list[float]
    passes: list[tuple[int, float | None, str]]
    tokens: int
    seconds: float
    adapter: Tensor

    @property
    def overflows(self) -> int:
        """The number of repeated passes."""
        return len(self.passes) - len(self.losses)


@dataclass
class Session:
    """The arguments and the runs by name and seed."""

    args: argparse.Namespace
    runs: dict[tuple[str, int], Run] = field(default_factory=dict)

    def new_trainer(self, dtype: str, seed: int, steps: int, split: bool = False) -> SFTTrainer:
        """Return a trainer of a new adapter, which writes no file.

        split: take so few tokens a pass that each step has several passes.
        """
        args = self.args
        with contextlib.redirect_stderr(io.StringIO()):
            model, tokenizer = FastLanguageModel.from_pretrained(
                args.model,
                dtype=dtype,
                device=args.device,
                max_seq_length=args.max_seq_length,
                load_in_4bit=args.load_in_4bit,
            )
            model = FastLanguageModel.get_peft_model(
                model, r=args.rank, lora_alpha=2 * args.rank, random_state=seed
            )
            settings = SFTConfig(
                output_dir=None,
                save_strategy="no",
                max_steps=steps,
                logging_steps=1,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_ratio=0.05,
                micro_step_tokens=args.max_seq_length if split else None,
                seed=seed,
                disable_tqdm=True,
            )
            return SFTTrainer(model, settings, str(args.data), str(args.heldout), tokenizer)

    def train(
        self,
        dtype: str,
        seed: int,
        steps: int,
        split: bool = False,
        scale: float | None = None,
        then: Callable[[SFTTrainer, Run], None] | None = None,
    ) -> Run:
        """Train, and return the results.

        scale: the loss scale to begin with; None leaves the default.
        then: called after the run with its trainer.
        """
        gc.collect()  # the last trainer and its model
        trainer = self.new_trainer(dtype, seed, steps, split)
        passes, accumulate = [], trainer.accumulate

        def recorded(samples: list) -> Tensor:
            progress = trainer.progress
            if scale is not None and not passes:
                progress.loss_scale.scale = scale
            present = None if progress.loss_scale is None else progress.loss_scale.scale
            ids = [int(token) for sample in samples for token in sample.input_ids]
            passes.append((progress.step, present, f"{hash(tuple(ids)) & 0xFFFFFFFF:08x}"))
            return accumulate(samples)

        trainer.accumulate = recorded
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.train()
            seconds = time.perf_counter() - start
            held_out = trainer.evaluate()["eval_loss"]
        trainer.accumulate = accumulate
        records = [record for record in trainer.state.log_history if "loss" in record]
        run = Run(
            [record["loss"] for record in records],
            held_out,
            [record["loss_scale"] for record in records if "loss_scale" in record],
            passes,
            trainer.progress.tokens,
            seconds,
            adapter_values(trainer),
        )
        if then is not None:
            then(trainer, run)
        return run


def adapter_values(trainer: SFTTrainer) -> Tensor:
    """Return all values of the adapter, on the host: (P,)."""
    return torch.cat([p.detach().flatten().cpu() for _, p in trainer.model.trainable_parameters()])


@torch.no_grad()
def set_adapter_(trainer: SFTTrainer, values: Tensor) -> None:
    """Fill the adapter with values (P,)."""
    parameters = [p for _, p in trainer.model.trainable_parameters()]
    parts = values.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.copy_(part.view(p.shape))


def step_gradients(trainer: SFTTrainer, values: Tensor, scale: float | None = None) -> Tensor:
    """Return the gradients of the run's first step at these values of the adapter, on the host."""
    set_adapter_(trainer, values)
    if scale is not None:
        trainer.progress.loss_scale.scale = scale
    trainer.optimizer.zero_grad()
    trainer.accumulate(trainer.order.samples_of_step(0))
    return trainer.optimizer.grads.cpu()


# ---- losses


def train_all(session: Session) -> list[list[str]]:
    """Train in each dtype from each seed, and return the rows of the table of gradients."""
    in_float32: list[Tensor] = []  # the adapter after the run of seed 0, and gradients there
    rows: list[list[str]] = []

    def compare(trainer: SFTTrainer, run: Run) -> None:
        if in_float32:
            rows.extend(gradient_rows(trainer, *in_float32))
        else:
            in_float32.extend([run.adapter, step_gradients(trainer, run.adapter)])

    for seed in range(session.args.seeds):
        for dtype in DTYPES:
            then = compare if seed == 0 else None
            run = session.runs[dtype, seed] = session.train(
                dtype, seed, session.args.steps, then=then
            )
            print(
                f"seed {seed}, {dtype}: {run.seconds:.1f} s, held-out {run.held_out:.4f}, "
                f"{run.overflows} overflows",
                flush=True,
            )
        for dtype in DTYPES[1:]:
            session.runs[f"{dtype} {SPLIT}", seed] = session.train(
                dtype, seed, session.args.steps, split=True
            )
    return rows


def loss_rows(session: Session) -> list[list[str]]:
    """Return the rows of the table of losses."""
    names = list(dict.fromkeys(name for name, _ in session.runs))
    rows = []
    for name in names:
        runs = [session.runs[name, seed] for seed in range(session.args.seeds)]
        # A split run is compared with the run of its own dtype, all others with float32.
        base = name.partition(" ")[0] if SPLIT in name else "float32"
        expected = [session.runs[base, seed] for seed in range(session.args.seeds)]
        cells = [f"{name}, to {base}"]
        for quarter in range(QUARTERS):
            found = [
                quarter_difference(run, other, quarter)
                for run, other in zip(runs, expected, strict=True)
            ]
            cells.append(spread(found, "{:.1e}"))
        cells.append(spread([run.held_out for run in runs], "{:.4f}"))
        scales = [scale for run in runs for scale in run.scales]
        cells.append(str(sum(run.overflows for run in runs)))
        cells.append(f"{power_text(min(scales))} - {power_text(max(scales))}" if scales else "none")
        cells.append(spread([run.seconds for run in runs], "{:.1f}"))
        rows.append(cells)
    return rows


def quarter_difference(run: Run, other: Run, quarter: int) -> float:
    """Return the mean absolute difference of the losses of a quarter of the run."""
    pairs = list(zip(run.losses, other.losses, strict=True))
    first, last = (len(pairs) * (quarter + i) // QUARTERS for i in (0, 1))
    return statistics.mean(abs(a - b) for a, b in pairs[first:last])


def spread(values: list[float], form: str) -> str:
    """Return the mean of the seeds, and their range if there are several."""
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))} - {form.format(max(values))})"


def power_text(scale: float) -> str:
    """Return a power of two as a text."""
    return f"2^{math.log2(scale):.0f}"


# ---- gradients


def gradient_rows(trainer: SFTTrainer, values: Tensor, expected: Tensor) -> list[list[str]]:
    """Return the distances of gradients to those of float32, for float16 by loss scale."""
    rows, dtype = [], str(trainer.model.dtype).removeprefix("torch.")
    for scale in FIXED_SCALES if dtype == "float16" else (None,):
        found = step_gradients(trainer, values, scale)
        is_finite = bool(found.isfinite().all())
        distance = f"{float((found - expected).norm() / expected.norm()):.5f}"
        zeros = f"{float(((found == 0) & (expected != 0)).float().mean()):.2%}"
        cells = [distance, zeros] if is_finite else ["overflow", ""]
        rows.append([dtype, "" if scale is None else power_text(scale), *cells])
    return rows


# ---- a forced overflow


def forced_overflow(session: Session) -> dict[str, Any]:
    """Train from a scale that overflows, and from that of its first update; compare the runs."""
    forced = session.train("float16", 0, FORCED_STEPS, scale=FORCED_SCALE)
    direct = session.train("float16", 0, FORCED_STEPS, scale=forced.scales[0])
    print(f"\nA run of {FORCED_STEPS} steps whose scale begins at {power_text(FORCED_SCALE)}\n")
    table = [[str(step + 1), power_text(scale), samples] for step, scale, samples in forced.passes]
    print(markdown_table(["step", "scale", "hash of the samples"], table))
    expected = {step: samples for step, _, samples in direct.passes}
    facts = {
        "steps": len(forced.losses),
        "repeated passes": forced.overflows,
        "each pass has the samples of its step": all(
            expected[step] == samples for step, _, samples in forced.passes
        ),
        "tokens are those of the run without these overflows": forced.tokens == direct.tokens,
        "losses are those of that run": forced.losses == direct.losses,
        "the adapter has the bits of that run": torch.equal(forced.adapter, direct.adapter),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    return facts


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or GGUF file of the base")
    parser.add_argument("--data", type=Path, required=True, help="file to train on")
    parser.add_argument("--heldout", type=Path, default=HELD_OUT, help="file to evaluate on")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, 4 or more")
    parser.add_argument("--seeds", type=int, default=1, help="adapters and orders of the data")
    parser.add_argument("--batch-size", type=int, default=4, help="samples a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--load-in-4bit", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--device", default=None, help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all numbers")
    return parser.parse_args()


def main() -> None:
    """Train, and print the tables."""
    args = arguments()
    session = Session(args)
    print(as_text(machine_and_versions()), flush=True)
    gradients = train_all(session)
    header = ["dtype", *(f"quarter {i + 1}" for i in range(QUARTERS)), "held-out loss"]
    header += ["overflows", "scales", "seconds"]
    losses = loss_rows(session)
    print(f"\nMean |difference of losses|; mean of {args.seeds} seeds (lowest - highest)\n")
    print(markdown_table(header, losses))
    print("\nGradients of a step after the run in float32, distance to those of float32\n")
    print(markdown_table(["dtype", "scale", "distance", "became 0"], gradients))
    record = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "about": machine_and_versions(),
        "runs": [
            {"dtype": name, "seed": seed, **vars(run), "adapter": None}
            for (name, seed), run in session.runs.items()
        ],
        "gradients": gradients,
        "overflow": forced_overflow(session),
    }
    args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

"""Compare plans with measurements on a GPU.

python scripts/benchmark/check_planner.py shapes [--count 20] [--json FILE]
    Draw random models of each family in turn, micro-steps, ranks and budgets, and print the planned
    and the measured peak and time of each. Exit code 1 if a peak is more than 5% off or above its
    budget, or a time is more than 15% off.
python scripts/benchmark/check_planner.py gradients --model DIR --memory-budget 8GiB
    Compare loss and gradients of a micro-step within a budget with those of a micro-step that may
    use all memory.
"""

import argparse
import gc
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench

from benchmark.model_shapes import llama_config
from benchmark.random_checkpoints import write_random_checkpoint
from benchmark.step_timing import GIB, TARGETS, random_batch, time_steps
from benchmark.table import emit, text_table
from minitune import FastLanguageModel, LanguageModel
from minitune.config.architectures import LORA_TARGETS
from minitune.config.cli import CommandParser, run_command
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig, parse_bytes
from minitune.data.batching import Batch
from minitune.memory.plan import Workload
from minitune.memory.planner import Planner, plan_memory
from minitune.memory.search import MARGIN, MemoryBudget
from minitune.model.activations import SaveLevel
from minitune.training.micro_step import MicroStep

MAX_PEAK_ERROR, MAX_TIME_ERROR = 0.05, 0.15
# Values of config.json that make a Llama a model of another family.
FAMILIES = (
    {},
    {"model_type": "mistral", "sliding_window": 1024},
    {"model_type": "qwen2"},
    {"model_type": "qwen3"},
    {"model_type": "smollm3"},
    {"model_type": "granite", "residual_multiplier": 0.22},
    {"model_type": "phi3"},
    {"model_type": "olmo3", "sliding_window": 1024},
    {"model_type": "gemma2", "sliding_window": 1024},
    {"model_type": "gemma3_text", "sliding_window": 1024},
)
HEADER = (
    "seed",
    "family, layers x D, F",
    "step",
    "budget",
    "planned GiB",
    "peak GiB",
    "error",
    "planned ms",
    "ms",
    "error",
    "plan",
)


def random_case(seed: int) -> tuple[dict[str, Any], list[str]]:
    """Return a random config.json, and the flags of bench.py for a run of it.

    The families take turns: seed 0 is a Llama, and so on.

    The budget lies between the least memory and that of saving everything, or up to 10% of this
    distance above.
    """
    draw = random.Random(seed)
    heads, head_dim = draw.choice([8, 16, 24, 32]), draw.choice([64, 128])
    kv_heads = draw.choice([n for n in (2, 4, 8) if heads % n == 0])
    hidden = heads * head_dim
    vocab, batch = draw.choice([32000, 128256]), draw.choice([1, 2, 4])
    config = llama_config(
        hidden=hidden,
        ffn=int(hidden * draw.uniform(2.5, 4)) // 64 * 64,
        layers=draw.randint(4, 16),
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        theta=500000.0,
        positions=16384,
        tie=draw.random() < 0.5,
    )
    config |= FAMILIES[seed % len(FAMILIES)]
    tokens = draw.choice([512, 1024, 2048, 4096, 8192]) // batch * draw.choice([1, 2])
    targets, r = draw.choice(["all", "qkvo"]), draw.choice([8, 16, 64])
    host = draw.choice([0, 0, 32])

    shape, lora = ModelConfig.from_dict(config), LoraConfig(r=r, target_modules=TARGETS[targets])
    workload, no_gpu = Workload.of_samples(batch * tokens, tokens), MemoryBudget(0, host * GIB)
    least_memory = plan_memory(shape, lora, workload, no_gpu).peak
    most_memory = plan_memory(shape, lora, workload, no_gpu, level=SaveLevel.ALL).peak
    span = max(most_memory - least_memory, 0)
    budget = (least_memory + draw.uniform(0, 1.1) * span) / (1 - MARGIN) / GIB
    flags = {
        "batch": batch,
        "tokens": tokens,
        "targets": targets,
        "r": r,
        "memory-budget": f"{budget:.3f}GiB",
        "checkpointing": "auto",
        "host-memory": f"{host}GiB",
        "steps": 5,
        "warmup": 2,
    }
    return config, [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def shapes(a: argparse.Namespace) -> int:
    """Measure random cases and print their table. Return the exit code."""
    lines, peak_errors, time_errors, over_budget = [], [], [], 0
    for seed in range(a.count):
        config, flags = random_case(seed)
        with tempfile.TemporaryDirectory() as folder:
            model = write_random_checkpoint(Path(folder) / "m", config)
            run = bench.parse(["--model", str(model), *flags])
            record = time_steps(run)
        gc.collect()
        torch.cuda.empty_cache()
        emit({"seed": seed, "budget": run.memory_budget} | record, a.json)
        peak_errors.append(record["peak_gb"] / record["planned_gb"] - 1)
        time_errors.append(record["ms"] / record["planned_ms"] - 1)
        over_budget += record["peak_gb"] > parse_bytes(run.memory_budget) / GIB
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        lines.append(
            [
                seed,
                f"{config['model_type']}, {layers} x {hidden}, {config['intermediate_size']}",
                f"{run.batch} x {run.tokens}, r {run.r}, {run.targets}",
                run.memory_budget,
                record["planned_gb"],
                record["peak_gb"],
                f"{peak_errors[-1]:+.1%}",
                record["planned_ms"],
                record["ms"],
                f"{time_errors[-1]:+.0%}",
                record["plan"],
            ]
        )
    peak_error, time_error = max(map(abs, peak_errors)), max(map(abs, time_errors))
    print("\n" + text_table(HEADER, lines))
    print(f"\npeaks within {peak_error:.1%}, {over_budget} above their budget")
    print(f"times within {time_error:.0%}")
    return int(peak_error > MAX_PEAK_ERROR or time_error > MAX_TIME_ERROR or over_budget > 0)


def gradients(a: argparse.Namespace) -> int:
    """Print how far loss and gradients within the budget are from those with all memory."""
    model, _ = FastLanguageModel.from_pretrained(a.model, max_seq_length=a.tokens)
    FastLanguageModel.get_peft_model(
        model, r=a.r, target_modules=LORA_TARGETS, use_gradient_checkpointing="auto"
    )
    generator = torch.Generator().manual_seed(1)
    for name, p in model.trainable_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    batch = random_batch(1, a.tokens, model.config.vocab_size, generator)
    level = model.planner.level
    budget, host_budget = parse_bytes(a.memory_budget), parse_bytes(a.host_memory)
    loss, exact = _loss_and_gradients(model, batch, Planner(level))
    other_loss, found = _loss_and_gradients(model, batch, Planner(level, budget, host_budget))
    error = float((found - exact).norm() / exact.norm())
    distance = "the same bits" if torch.equal(found, exact) else f"{error:.2e} of their norm apart"
    print(f"losses {abs(other_loss - loss):.2e} apart, gradients {distance}")
    return 0


def _loss_and_gradients(
    model: LanguageModel, batch: Batch, planner: Planner
) -> tuple[float, Tensor]:
    """Return loss and gradients (P,) of a micro-step under a planner, and print its plan."""
    model.planner = planner
    micro = MicroStep(model)
    loss = float(micro(batch, batch.targets))
    plan = micro.planner.largest
    print(f"loss {loss:.6f}; {plan.peak / GIB:.2f} GiB planned: {plan}")
    micro.close()
    gradients = []
    for _, p in model.trainable_parameters():
        gradients.append(p.grad.flatten().cpu())
        p.grad = None
    return loss, torch.cat(gradients)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    of_shapes, of_gradients = commands.add_parser("shapes"), commands.add_parser("gradients")
    of_shapes.set_defaults(run=shapes)
    of_shapes.add_argument("--count", type=int, default=20)
    of_shapes.add_argument("--json", type=Path, metavar="FILE")
    of_gradients.set_defaults(run=gradients)
    of_gradients.add_argument("--model", required=True)
    of_gradients.add_argument("--tokens", type=int, default=8192)
    of_gradients.add_argument("--r", type=int, default=32)
    of_gradients.add_argument("--memory-budget", required=True)
    of_gradients.add_argument("--host-memory", default="64GiB")
    a = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("plans are compared with a GPU, and torch finds none")
    return a.run(a)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("check_planner.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())

"""Are plans kept? On a GPU, what was planned beside what was measured.

python scripts/benchmark/check_planner.py shapes [--count 20] [--json FILE]
    Random Llamas, micro-steps, ranks and budgets: peak and time of each, planned and measured. Exit code 1 where a
    peak is more than 5% off or above its budget, or a time more than 15% off.
python scripts/benchmark/check_planner.py gradients --model DIR --tokens 8192 --memory-budget 8GiB --host-memory 64GiB
    Loss and gradients of a micro-step within a budget, against those with all the memory there is.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench

from benchmark.random_checkpoints import llama, write_random_llama
from benchmark.table import text_table
from minitune import FastLanguageModel
from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig, parse_bytes
from minitune.memory.planner import MARGIN, Planner, plan_memory
from minitune.model.activations import SaveLevel
from minitune.training.micro_step import MicroStep

GIB = 2**30
PEAK_WITHIN, TIME_WITHIN = 0.05, 0.15


def drawn(seed: int) -> tuple[dict[str, Any], list[str]]:
    """A config.json and the arguments of bench.py for a run of it."""
    draw = random.Random(seed)
    heads, head_dim = draw.choice([8, 16, 24, 32]), draw.choice([64, 128])
    kv_heads = draw.choice([n for n in (2, 4, 8) if heads % n == 0])
    hidden, vocab, batch = heads * head_dim, draw.choice([32000, 128256]), draw.choice([1, 2, 4])
    ffn = int(hidden * draw.uniform(2.5, 4)) // 64 * 64
    config = llama(
        hidden,
        ffn,
        draw.randint(4, 16),
        heads,
        kv_heads,
        vocab,
        500000.0,
        16384,
        tie=draw.random() < 0.5,
    )
    tokens = draw.choice([512, 1024, 2048, 4096, 8192]) // batch * draw.choice([1, 2])
    targets, r, host = (
        draw.choice(["all", "qkvo"]),
        draw.choice([8, 16, 64]),
        draw.choice([0, 0, 32]),
    )
    lora = LoraConfig(r=r, target_modules=bench.TARGETS[targets])
    sizes = {"tokens": batch * tokens, "longest": tokens}
    least = plan_memory(
        ModelConfig.from_dict(config), lora, 0, host_memory=host * GIB, **sizes
    ).peak
    most = plan_memory(ModelConfig.from_dict(config), lora, 0, level=SaveLevel.ALL, **sizes).peak
    budget = (least + draw.uniform(0, 1.1) * max(most - least, 0)) / (1 - MARGIN) / GIB
    arguments = {
        "batch": batch,
        "tokens": tokens,
        "targets": targets,
        "r": r,
        "memory-budget": f"{budget:.3f}GiB",
    }
    arguments |= {"checkpointing": "auto", "host-memory": f"{host}GiB", "steps": 5, "warmup": 2}
    return config, [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]


def shapes(a: argparse.Namespace) -> int:
    rows, worst = [], [0.0, 0.0, 0]
    for seed in range(a.count):
        config, arguments = drawn(seed)
        with tempfile.TemporaryDirectory() as folder:
            model = write_random_llama(Path(folder) / "m", config)
            run = bench.parse(["--model", str(model), *arguments])
            record = bench.time_steps(run)
        gc.collect()
        torch.cuda.empty_cache()
        bench.emit({"seed": seed, "budget": run.memory_budget} | record, a.json)
        peak, took = record["peak_gb"], record["ms"]
        of_peak, of_time = peak / record["planned_gb"] - 1, took / record["planned_ms"] - 1
        over = peak > parse_bytes(run.memory_budget) / GIB
        worst = [max(worst[0], abs(of_peak)), max(worst[1], abs(of_time)), worst[2] + over]
        shape = f"{config['num_hidden_layers']} x {config['hidden_size']}, {config['intermediate_size']}"
        step = f"{run.batch} x {run.tokens}, r {run.r}, {run.targets}"
        figures = (
            record["planned_gb"],
            peak,
            f"{of_peak:+.1%}",
            record["planned_ms"],
            took,
            f"{of_time:+.0%}",
        )
        rows.append([seed, shape, step, run.memory_budget, *figures, record["plan"]])
    header = [
        "seed",
        "layers x D, F",
        "step",
        "budget",
        "planned",
        "peak",
        "",
        "planned ms",
        "took",
        "",
        "plan",
    ]
    print("\n" + text_table(header, rows))
    print(
        f"\npeaks within {worst[0]:.1%}, {worst[2]} above their budget; times within {worst[1]:.0%}"
    )
    return int(worst[0] > PEAK_WITHIN or worst[1] > TIME_WITHIN or worst[2] > 0)


def gradients(a: argparse.Namespace) -> int:
    model, _ = FastLanguageModel.from_pretrained(a.model, max_seq_length=a.tokens)
    FastLanguageModel.get_peft_model(
        model, r=a.r, target_modules=LORA_TARGETS, use_gradient_checkpointing="auto"
    )
    generator = torch.Generator().manual_seed(1)
    for name, p in model.trainable_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    batch = bench.random_batch(1, a.tokens, model.config.vocab_size, generator)
    found = []
    for budget, host in ((None, 0), (parse_bytes(a.memory_budget), parse_bytes(a.host_memory))):
        model.planner = Planner(model.planner.level, budget or None, host)
        micro = MicroStep(model)
        loss = float(micro(batch, batch.targets))
        found.append(
            (loss, torch.cat([p.grad.flatten().cpu() for _, p in model.trainable_parameters()]))
        )
        print(
            f"loss {loss:.6f}; {micro.planner.largest.peak / GIB:.2f} GiB planned: {micro.planner.largest}"
        )
        micro.close()
        del micro
        for _, p in model.trainable_parameters():
            p.grad = None
    (loss, exact), (same, mine) = found
    error = float((mine - exact).norm() / exact.norm())
    equal = "the same bits" if torch.equal(mine, exact) else f"{error:.2e} of their norm apart"
    print(f"losses {abs(same - loss):.2e} apart, gradients {equal}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
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
    try:
        if not torch.cuda.is_available():
            raise ValueError("plans are kept on a GPU, and torch sees none")
        return a.run(a)
    except (ValueError, OSError) as error:
        print(f"check_planner.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

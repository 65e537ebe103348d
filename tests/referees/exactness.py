"""Is it the same training? Gradients, loss curves and repeated runs, ours beside those of others (systems.py).

    python tests/referees/exactness.py gradients --model DIR --out DIR2
        A whole step's LoRA gradients of every system on 2 x 1024 random tokens, against float32.

    python tests/referees/exactness.py data --model models/SmolLM2-135M-Instruct --data FILE.safetensors
    python tests/referees/exactness.py curve --model models/SmolLM2-135M-Instruct --data FILE.safetensors \\
        --system minitune-gpu --seeds 3 --steps 200 --out FILE.jsonl        or minitune-cpu, or hf
    python tests/referees/exactness.py curves FILE.jsonl...
        QLoRA on real text, the same samples in the same order; a seed draws the A's. The table sets the differences
        between systems beside the spread over seeds.

    python tests/referees/exactness.py repeat --model DIR --out DIR2
        20 steps, twice, in processes of their own: are losses and adapter the same to the bit? "Deterministic" is
        torch.use_deterministic_algorithms, under which cuDNN's attention backward is not taken.

Each system runs in a process of its own, and tensors pass between them as safetensors. What is compared computes with
the same NF4 weights and begins with the same adapter, which digests of both show. The text is Python's own reference
documentation, which differs between Python versions: its tokens are made once and carried along.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune import FastLanguageModel
from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.data.batching import collate
from minitune.data.tokenize_dataset import Sample
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW
from referees.loss_curves import CURVES, curve, curves, data
from referees.reporting import about, checked, run_self, seeded, table
from referees.systems import ALPHA, R, digest, drawn_adapter, load, quantise, stay_offline

GRADIENTS = ("reference", "plain-float64", "plain-bf16", "hf", "unsloth", "minitune")

# ---- gradients


def gradients(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    out, model = args.out.resolve(), args.model.resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checked(
        run_self("weights", "--model", model, "--out", out / "nf4.safetensors", "--device", device)
    )
    for system in args.systems:
        (out / f"{system}.json").unlink(missing_ok=True)
        process = run_self(
            "gradient",
            "--model",
            model,
            "--out",
            out,
            "--system",
            system,
            "--tokens",
            args.tokens,
            cwd=out,
        )
        if process.returncode:
            (out / f"{system}.stderr").write_text(process.stderr)
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{system} failed ({out / system}.stderr): {last[:200]}", file=sys.stderr)
    found = {
        s: json.loads((out / f"{s}.json").read_text())
        for s in args.systems
        if (out / f"{s}.json").exists()
    }
    if "reference" not in found:
        raise ValueError("the reference could not be computed, so nothing can be held against it")
    for system, key in [
        (s, k) for s in found for k in ("nf4", "adapter") if found[s][k] != found["reference"][k]
    ]:
        print(f"{system} has another {key} than the reference and is left out", file=sys.stderr)
        found.pop(system, None)
    exact = load_file(out / "reference.safetensors")
    for system, record in found.items():
        record |= gradient_errors(load_file(out / f"{system}.safetensors"), exact)
    print_gradients(found, args)


def gradient(args: argparse.Namespace) -> None:
    """One system's part: its gradients into DIR/SYSTEM.safetensors, what goes with them into DIR/SYSTEM.json."""
    system = load(args.system, args.model, args.out / "nf4.safetensors", args.tokens)
    values = drawn_adapter(system.shapes(), seed=0, trained=True)
    system.set_adapter(values)
    ids = torch.randint(3, vocabulary(args.model), (2, args.tokens), generator=seeded(9))
    start = time.perf_counter()
    loss = system.backward(ids).item()
    found = {name: p.grad.double().cpu().contiguous() for name, p in system.parameters.items()}
    save_file(found, args.out / f"{args.system}.safetensors")
    record = {"loss": loss, "seconds": time.perf_counter() - start, "about": about()}
    record |= {"nf4": digest(system.nf4), "adapter": digest(values)}
    (args.out / f"{args.system}.json").write_text(json.dumps(record))


def weights(args: argparse.Namespace) -> None:
    """The NF4 tensors that all systems get."""
    quantise(args.model, args.out, args.device)


def vocabulary(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


def gradient_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """||g - exact|| / ||exact||: of all tensors together, and the median and the worst of them one by one."""
    if found.keys() != exact.keys():
        raise ValueError(
            f"gradients are there of {len(found)} tensors, the reference has {len(exact)}"
        )
    squares = {name: (found[name] - exact[name]).square().sum().item() for name in exact}
    norms = {name: exact[name].square().sum().item() for name in exact}
    each = {name: (squares[name] / norms[name]) ** 0.5 for name in exact}
    return {
        "all": (sum(squares.values()) / sum(norms.values())) ** 0.5,
        "median": statistics.median(each.values()),
        "worst": max(each.values()),
        "by_module": {
            m: statistics.median(e for name, e in each.items() if f".{m}." in name)
            for m in LORA_TARGETS
        },
    }


def print_gradients(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    where = ", ".join(f"{k} {v}" for k, v in found["reference"]["about"].items())
    print(f"LoRA gradients of {args.model.name}, 2 x {args.tokens} random tokens; {where}")
    print(
        "relative error against transformers + PEFT in float32; by module the median over its tensors\n"
    )
    rows = []
    for system, record in found.items():
        errors = [record["all"], record["median"], record["worst"], *record["by_module"].values()]
        rows.append(
            [
                system,
                f"{record['loss']:.5f}",
                *(f"{e:.4f}" if e >= 1e-4 else f"{e:.0e}" for e in errors),
            ]
        )
    print(
        table(
            [
                "system",
                "loss",
                "all",
                "median",
                "worst",
                *(m.removesuffix("_proj") for m in LORA_TARGETS),
            ],
            rows,
        )
    )
    for other in ("plain-bf16", "hf", "unsloth"):
        for ours in ("minitune", "minitune-triton"):
            if ours in found and other in found:
                print(
                    f"{ours} errs {found[ours]['all'] / found[other]['all']:.2f} times as much as {other}"
                )
    print("RESULT " + json.dumps(found))


# ---- repeated runs


def repeat(args: argparse.Namespace) -> int:
    """Exit code 1 where a run that must repeat does not: all but plain "auto", which may take cuDNN's attention."""
    args.out.mkdir(parents=True, exist_ok=True)
    files = [args.out / f"repeat-{i}.safetensors" for i in range(2)]
    for path in files:
        checked(
            run_self("repeat_once", "--model", args.model, "--out", path, "--steps", args.steps)
        )
    one, two = map(load_file, files)
    rows, failed = [], False
    for name in dict.fromkeys(name.rsplit("/", 1)[0] for name in sorted(one)):
        equal = [
            torch.equal(one[f"{name}/{what}"], two[f"{name}/{what}"])
            for what in ("losses", "adapter")
        ]
        failed |= not all(equal) and not name.startswith("auto/")
        last = one[f"{name}/losses"][-1].item()
        rows.append(
            [*name.split("/"), *("same bits" if e else "DIFFERENT" for e in equal), f"{last:.6f}"]
        )
    where = ", ".join(f"{k} {v}" for k, v in about().items())
    print(f"{args.steps} steps of {args.model.name}, twice; {where}\n")
    print(table(["attention", "CUDA graphs", "losses", "adapter", "last loss"], rows))
    print("RESULT " + json.dumps({"rows": rows, "about": about()}))
    return int(failed)


def repeat_once(args: argparse.Namespace) -> None:
    """Losses and adapter of every combination, as run in this process."""
    results = {}
    for mode in ("auto", "auto, deterministic", "triton"):
        torch.use_deterministic_algorithms("deterministic" in mode, warn_only=True)
        for graphs in (False, True) if torch.cuda.is_available() else (False,):
            losses, adapter = steps_of(args.model, mode.split(",")[0], graphs, args.steps)
            name = f"{mode}/{'with' if graphs else 'without'}"
            results |= {f"{name}/losses": losses, f"{name}/adapter": adapter}
    save_file(results, args.out)


def steps_of(folder: Path, attention: str, graphs: bool, steps: int) -> tuple[Tensor, Tensor]:
    """The losses (steps,) and the adapter (P,) after training on random tokens in samples of all lengths.

    The longest are so long that attention="auto" takes cuDNN's, where the model knows as many positions.
    """
    longest = min(CUDNN_MIN_LENGTH, ModelConfig.from_folder(folder).max_position_embeddings)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=longest, attention=attention
    )
    FastLanguageModel.get_peft_model(model, r=R, lora_alpha=ALPHA, use_gradient_checkpointing=True)
    optimizer = FlatAdamW([p for _, p in model.trainable_parameters()], max_grad_norm=1.0)
    micro, generator, losses = MicroStep(model, capture=graphs), seeded(1), []
    optimizer.zero_grad()
    for step in range(steps):
        lengths = ((3, 250, 1, 90, 200, 240, 240), (256,) * 4, (longest,))[step % 3]
        ids = [
            torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist()
            for n in lengths
        ]
        batch = collate([Sample(row, row) for row in ids])
        losses.append(micro(batch, batch.targets))
        optimizer.step(2e-4)
        optimizer.zero_grad()
    return torch.stack(losses).cpu(), optimizer.values.cpu()


# ---- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    options = {
        "--model": {"type": Path, "required": True, "help": "a model folder in 16 bit"},
        "--out": {"type": Path, "required": True, "help": "where the results go"},
        "--data": {
            "type": Path,
            "required": True,
            "help": "the samples that the command `data` wrote",
        },
        "--tokens": {"type": int, "default": 1024, "help": "tokens of each of the two samples"},
        "--systems": {
            "nargs": "+",
            "choices": (*GRADIENTS, "minitune-triton"),
            "default": GRADIENTS,
        },
        "--system": {"required": True, "help": f"of `curve`: {', '.join(CURVES)}"},
        "--seeds": {"type": int, "default": 3, "help": "runs, with seeds 0, 1, ..."},
        "--steps": {"type": int, "default": 200},
        "--device": {"default": "cpu"},
        "files": {"nargs": "+", "type": Path, "help": "what `curve` wrote"},
    }
    for run, names in (
        (gradients, "--model --out --tokens --systems"),
        (data, "--model --data --steps"),
        (curve, "--model --data --system --seeds --steps --out"),
        (curves, "files"),
        (repeat, "--model --out --steps"),
        # what the others start
        (weights, "--model --out --device"),
        (gradient, "--model --out --tokens --system"),
        (repeat_once, "--model --out --steps"),
    ):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        for name in names.split():
            command.add_argument(name, **options[name])
    commands.choices["repeat"].set_defaults(steps=20)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    stay_offline()
    args = parse(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"exactness.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

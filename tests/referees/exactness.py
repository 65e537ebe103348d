"""Compare gradients, loss curves and repeated runs of minitune with other systems (systems.py).

    python tests/referees/exactness.py gradients --model DIR --out DIR2
        The LoRA gradients of a step of every system on 2 x 1024 random tokens, against float32.

    python tests/referees/exactness.py data --model DIR --data FILE.safetensors
    python tests/referees/exactness.py curve --model DIR --data FILE.safetensors \\
        --system minitune-gpu --seeds 3 --steps 200 --out FILE.jsonl   or minitune-cpu, or hf
    python tests/referees/exactness.py curves FILE.jsonl...
        QLoRA on real text, the same samples in the same order; the seed draws the A matrices. The
        table has the differences between systems beside the spread over seeds.

    python tests/referees/exactness.py repeat --model DIR --out DIR2
        20 steps in each of two processes: losses and adapter must be equal to the bit.
        "deterministic" is torch.use_deterministic_algorithms, which excludes cuDNN's attention
        backward.

Each system runs in a process of its own; tensors pass between them as safetensors. All compute with
the same NF4 weights and start from the same adapter, as digests of both show. The text is Python's
own reference documentation. It differs between Python versions, so its tokens are written once and
carried along.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minitune import FastLanguageModel
from minitune.config.architectures import LORA_TARGETS
from minitune.config.cli import CommandParser, run_command
from minitune.config.model_config import ModelConfig
from minitune.data.batching import collate
from minitune.data.samples import Sample
from minitune.kernels.attention_cudnn import CUDNN_MIN_LENGTH
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW
from referees.loss_curves import CURVES, curve, curves, data
from referees.reporting import (
    as_text,
    last_line,
    machine_and_versions,
    markdown_table,
    require_success,
    run_self,
    seeded,
)
from referees.systems import ALPHA, R, digest, load, random_adapter, stay_offline, write_nf4

GRADIENT_SYSTEMS = ("reference", "plain-float64", "plain-bf16", "hf", "unsloth", "minitune")
FIRST_TOKEN = 3  # the ids below are special tokens

# ---- gradients


def gradients(args: argparse.Namespace) -> None:
    """Run every system's `gradient` and print the errors against the reference."""
    args.out.mkdir(parents=True, exist_ok=True)
    out, model = args.out.resolve(), args.model.resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nf4 = out / "nf4.safetensors"
    require_success(run_self("weights", "--model", model, "--out", nf4, "--device", device))
    found = {}
    for system in args.systems:
        if record := _run_gradient(system, model, out, args.tokens):
            found[system] = record
    if "reference" not in found:
        raise ValueError("the reference failed, so the others have nothing to be compared with")
    reference = found["reference"]
    for system, key in [(s, k) for s in found for k in ("nf4", "adapter")]:
        if found.get(system, reference)[key] != reference[key]:
            print(f"{system} has another {key} than the reference: left out", file=sys.stderr)
            del found[system]
    exact = load_file(out / "reference.safetensors")
    for system, record in found.items():
        record |= gradient_errors(load_file(out / f"{system}.safetensors"), exact)
    print_gradients(found, args)


def _run_gradient(system: str, model: Path, out: Path, tokens: int) -> dict[str, Any] | None:
    """Run `gradient` in a process of its own. Return its record, or None if it failed."""
    record = out / f"{system}.json"
    record.unlink(missing_ok=True)
    command = ["gradient", "--model", model, "--out", out, "--system", system, "--tokens", tokens]
    process = run_self(*command, cwd=out)
    if process.returncode:
        log = out / f"{system}.stderr"
        log.write_text(process.stderr)
        print(f"{system} failed ({log}): {last_line(process)[:200]}", file=sys.stderr)
    return json.loads(record.read_text()) if record.exists() else None


def gradient(args: argparse.Namespace) -> None:
    """Write one system's gradients to OUT/SYSTEM.safetensors and its record to OUT/SYSTEM.json."""
    system = load(args.system, args.model, args.out / "nf4.safetensors", args.tokens)
    values = random_adapter(system.shapes(), seed=0, trained=True)
    system.set_adapter(values)
    vocab = ModelConfig.from_folder(args.model).vocab_size
    ids = torch.randint(FIRST_TOKEN, vocab, (2, args.tokens), generator=seeded(9))
    start = time.perf_counter()
    loss = system.backward(ids).item()
    found = {name: p.grad.double().cpu().contiguous() for name, p in system.parameters.items()}
    save_file(found, args.out / f"{args.system}.safetensors")
    record = {"loss": loss, "seconds": time.perf_counter() - start, "about": machine_and_versions()}
    record |= {"nf4": digest(system.nf4), "adapter": digest(values)}
    (args.out / f"{args.system}.json").write_text(json.dumps(record))


def weights(args: argparse.Namespace) -> None:
    """Write the NF4 tensors that all systems get."""
    write_nf4(args.model, args.out, args.device)


def gradient_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """Return ||g - exact|| / ||exact|| of all tensors together, and its median and worst.

    by_module: the median of each kind of linear.

    Raises: ValueError if the tensors differ in name.
    """
    if found.keys() != exact.keys():
        raise ValueError(f"{len(found)} tensors have gradients, {len(exact)} in the reference")
    squares = {name: (found[name] - exact[name]).square().sum().item() for name in exact}
    norms = {name: exact[name].square().sum().item() for name in exact}
    each = {name: (squares[name] / norms[name]) ** 0.5 for name in exact}
    by_module = {}
    for module in LORA_TARGETS:
        errors = [error for name, error in each.items() if f".{module}." in name]
        by_module[module] = statistics.median(errors)
    return {
        "all": (sum(squares.values()) / sum(norms.values())) ** 0.5,
        "median": statistics.median(each.values()),
        "worst": max(each.values()),
        "by_module": by_module,
    }


def print_gradients(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table of errors, their ratios, and a RESULT line."""
    machine = as_text(found["reference"]["about"])
    print(f"LoRA gradients of {args.model.name}, 2 x {args.tokens} random tokens; {machine}")
    print("relative errors against transformers + PEFT in float32; by module the median\n")
    header = ["system", "loss", "all", "median", "worst"]
    header += [module.removesuffix("_proj") for module in LORA_TARGETS]
    rows = []
    for system, record in found.items():
        errors = [record["all"], record["median"], record["worst"], *record["by_module"].values()]
        cells = [f"{error:.4f}" if error >= 1e-4 else f"{error:.0e}" for error in errors]
        rows.append([system, f"{record['loss']:.5f}", *cells])
    print(markdown_table(header, rows))
    for other in ("plain-bf16", "hf", "unsloth"):
        for ours in ("minitune", "minitune-triton"):
            if ours in found and other in found:
                ratio = found[ours]["all"] / found[other]["all"]
                print(f"the error of {ours} is {ratio:.2f} times that of {other}")
    print("RESULT " + json.dumps(found))


# ---- repeated runs


def repeat(args: argparse.Namespace) -> int:
    """Compare the results of two processes.

    Return 1 if a run differs that must repeat. Only plain "auto" need not: it may choose cuDNN.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for i in range(2):
        path = args.out / f"repeat-{i}.safetensors"
        command = ["repeat_once", "--model", args.model, "--out", path, "--steps", args.steps]
        require_success(run_self(*command))
        results.append(load_file(path))
    one, two = results
    rows, failed = [], False
    for name in dict.fromkeys(name.rpartition("/")[0] for name in sorted(one)):
        equal = [torch.equal(one[key], two[key]) for key in (f"{name}/losses", f"{name}/adapter")]
        failed |= not all(equal) and not name.startswith("auto/")
        last_loss = one[f"{name}/losses"][-1].item()
        cells = ["same bits" if e else "DIFFERENT" for e in equal]
        rows.append([*name.split("/"), *cells, f"{last_loss:.6f}"])
    print(f"{args.steps} steps of {args.model.name}, twice; {as_text(machine_and_versions())}\n")
    header = ["attention", "CUDA graphs", "losses", "adapter", "last loss"]
    print(markdown_table(header, rows))
    print("RESULT " + json.dumps({"rows": rows, "about": machine_and_versions()}))
    return int(failed)


def repeat_once(args: argparse.Namespace) -> None:
    """Write losses and adapter of every combination, as they come out of this process."""
    results = {}
    for mode in ("auto", "auto, deterministic", "triton"):
        torch.use_deterministic_algorithms("deterministic" in mode, warn_only=True)
        for graphs in (False, True) if torch.cuda.is_available() else (False,):
            losses, adapter = train_steps(args.model, mode.split(",")[0], graphs, args.steps)
            name = f"{mode}/{'with' if graphs else 'without'}"
            results |= {f"{name}/losses": losses, f"{name}/adapter": adapter}
    save_file(results, args.out)


def train_steps(folder: Path, attention: str, graphs: bool, steps: int) -> tuple[Tensor, Tensor]:
    """Train on random tokens in samples of many lengths. Return losses (steps,) and adapter (P,).

    The longest samples are long enough for cuDNN's attention, if the model has the positions.
    """
    longest = min(CUDNN_MIN_LENGTH, ModelConfig.from_folder(folder).max_position_embeddings)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=longest, attention=attention
    )
    FastLanguageModel.get_peft_model(model, r=R, lora_alpha=ALPHA, use_gradient_checkpointing=True)
    optimizer = FlatAdamW([p for _, p in model.trainable_parameters()], max_grad_norm=1.0)
    micro, generator, losses = MicroStep(model, capture=graphs), seeded(1), []
    vocab = model.config.vocab_size
    optimizer.zero_grad()
    for step in range(steps):
        samples = []
        for n in ((3, 250, 1, 90, 200, 240, 240), (256,) * 4, (longest,))[step % 3]:
            ids = torch.randint(FIRST_TOKEN, vocab, (n,), generator=generator).tolist()
            samples.append(Sample(ids, ids))
        batch = collate(samples)
        losses.append(micro(batch, batch.targets))
        optimizer.step(2e-4)
        optimizer.zero_grad()
    return torch.stack(losses).cpu(), optimizer.values.cpu()


# ---- the command


OPTIONS = {
    "--model": {"type": Path, "required": True, "help": "a model folder in 16 bit"},
    "--out": {"type": Path, "required": True, "help": "file or folder of the results"},
    "--data": {"type": Path, "required": True, "help": "the samples that `data` writes"},
    "--tokens": {"type": int, "default": 1024, "help": "tokens of each of the two samples"},
    "--systems": {
        "nargs": "+",
        "choices": (*GRADIENT_SYSTEMS, "minitune-triton"),
        "default": GRADIENT_SYSTEMS,
    },
    "--system": {"required": True, "help": f"of `curve`: {', '.join(CURVES)}"},
    "--seeds": {"type": int, "default": 3, "help": "number of runs, with seeds 0, 1, ..."},
    "--steps": {"type": int, "default": 200},
    "--device": {"default": "cpu"},
    "files": {"nargs": "+", "type": Path, "help": "the files that `curve` writes"},
}
COMMANDS = {
    gradients: "--model --out --tokens --systems",
    data: "--model --data --steps",
    curve: "--model --data --system --seeds --steps --out",
    curves: "files",
    repeat: "--model --out --steps",
    # Those above start these in processes of their own.
    weights: "--model --out --device",
    gradient: "--model --out --tokens --system",
    repeat_once: "--model --out --steps",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; `run` is the function of the command."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for run, names in COMMANDS.items():
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        for name in names.split():
            command.add_argument(name, **OPTIONS[name])
    commands.choices["repeat"].set_defaults(steps=20)
    return parser.parse_args(argv)


def run(argv: Sequence[str] | None = None) -> int | None:
    """Run the command line and return its exit code."""
    stay_offline()
    args = parse(argv)
    return args.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("exactness.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())

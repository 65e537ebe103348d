"""Compare log-probabilities of generation with the training forward and float64, and with batches.

    python tests/referees/decode_exactness.py --model DIR_OR_GGUF [--sequences 64] [--answers 8]

Exactness: the greedy answers to the first --answers prompts have log-probabilities from generation,
from the training forward in the compute dtype, whose logits are rounded to it, and from the same
forward with its logits in float32. All three are compared with the plain model in float64
(plain_llama.py), on the same stored weights: once rounded to the compute dtype, as training
computes with them, and once not.

Invariance: prompts of several lengths are generated alone, in 7 and in all. Tokens and
log-probabilities have to be equal bit for bit on a GPU, greedy and drawn. On a CPU only the tokens
have to be equal.

The adapter has a random B. Prompts are pieces of Python's own reference documentation.

Exit code 1: a row depends on its batch, or generation's mean error is more than 5% above that of
the training forward.
"""

import argparse
import json
import math
import pydoc_data.topics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from plain_llama import PlainLlama  # noqa: E402
from torch import Tensor  # noqa: E402

from minitune import FastLanguageModel, LanguageModel  # noqa: E402
from minitune.config.cli import CommandParser, run_command  # noqa: E402
from minitune.model.decoding.decode_step import float_logits  # noqa: E402
from referees.reporting import as_text, machine_and_versions, markdown_table  # noqa: E402
from referees.systems import ALPHA, R, random_adapter  # noqa: E402

FEW = 7  # rows of the small batch
ALONE = (0, 3, 6)  # of these, the rows that are generated alone
LENGTHS = (128, 5, 77, 129, 64, 1, 100)  # tokens of the prompts, in turn
SAMPLING = {"greedy": {"do_sample": False}, "drawn": {"temperature": 1.0, "top_p": 0.9}}
GENERATION, TRAINING = "generation", "training forward"
SLACK = 1.05  # of the mean errors' ratio
SAME, SAME_TOKENS = "same bits", "same tokens"
Answer = tuple[list[int], list[float]]  # tokens, log-probabilities


class LazyWeights(Mapping):
    """The frozen weights of a model in float64, by name, each converted when it is read.

    dtype: the weights are dequantised to this dtype before.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype):
        self._plain = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
        self._linears = {f"{name}.weight": linear for name, linear in model.linears()}
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight in float64.

        Raises: KeyError if the model has no weight of this name.
        """
        if name in self._linears:
            return self._linears[name].weight_as(self._dtype).double()
        return self._plain[name].detach().double()

    def __iter__(self) -> Iterator[str]:
        return iter({**self._plain, **self._linears})

    def __len__(self) -> int:
        return len({**self._plain, **self._linears})


class Float64Model(PlainLlama):
    """The plain model in float64, whose weights are converted at each use, so that 8B fits."""

    def __init__(self, model: LanguageModel, weight_dtype: torch.dtype):
        self.c, self.dtype = model.config, torch.float64
        self.ropes = model.layer_context.ropes
        self.weights = LazyWeights(model, weight_dtype)
        self.scaling = {name: linear.scaling for name, linear in model.linears()}
        self.adapter = {n: p.detach().double() for n, p in model.adapter_parameters()}


def make_prompts(tokenizer: Any, vocab: int, count: int) -> list[list[int]]:
    """Return prompts of LENGTHS tokens from Python's documentation."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = [token for token in tokenizer(text[:200_000])["input_ids"] if token < vocab]
    starts = range(0, len(ids), len(ids) // count)
    return [ids[starts[i] :][: LENGTHS[i % len(LENGTHS)]] for i in range(count)]


def generate(
    model: LanguageModel, prompts: list[list[int]], seeds: list[int], new_tokens: int, name: str
) -> list[Answer]:
    """Return the answers of a kind of SAMPLING with their log-probabilities."""
    found = model.generate(
        prompts,
        max_new_tokens=new_tokens,
        eos_token_ids=[],
        seed=seeds if name == "drawn" else None,
        return_logprobs=True,
        **SAMPLING[name],
    )
    return list(zip(found.sequences, found.logprobs, strict=True))


# ---- invariance


def compare_batches(
    model: LanguageModel, prompts: list[list[int]], new_tokens: int, name: str
) -> dict[str, str]:
    """Return batch -> SAME, SAME_TOKENS, or the rows that have other tokens in the whole batch."""
    seeds = [1000 + i for i in range(len(prompts))]

    def of_rows(rows: list[int]) -> dict[int, Answer]:
        answers = generate(
            model, [prompts[i] for i in rows], [seeds[i] for i in rows], new_tokens, name
        )
        return dict(zip(rows, answers, strict=True))

    whole = of_rows(list(range(len(prompts))))
    few = of_rows(list(reversed(range(min(FEW, len(prompts))))))
    alone = {i: answer for i in ALONE if i in few for answer in of_rows([i]).values()}
    again = of_rows(list(range(len(prompts))))
    parts = {f"in {len(few)}": few, "alone": alone, "again": again}
    results = {}
    for part, found in parts.items():
        wrong = [i for i, (tokens, _) in found.items() if tokens != whole[i][0]]
        same_bits = all(answer == whole[i] for i, answer in found.items())
        results[part] = SAME if same_bits else f"DIFFERENT: {wrong}" if wrong else SAME_TOKENS
    return results


# ---- exactness


@torch.no_grad()
def log_probabilities(
    model: LanguageModel, prompts: list[list[int]], answers: list[Answer]
) -> dict[str, Tensor]:
    """Return system -> the log-probabilities of all answers' tokens in one tensor, in float64."""
    exact = {
        "float64": Float64Model(model, torch.float32),
        "float64, rounded weights": Float64Model(model, model.dtype),
    }
    values: dict[str, list[Tensor]] = {GENERATION: [torch.tensor(a[1]).double() for a in answers]}
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        ids = torch.tensor([*prompt, *tokens])
        stream = model.residual_stream(ids, torch.arange(len(ids)))
        logits = {
            TRAINING: model(input_ids=ids[None]).logits[0],
            f"{TRAINING}, float32 logits": float_logits(model.head(), stream),
        }
        logits |= {name: plain.logits(ids.to(model.device)) for name, plain in exact.items()}
        for name, of_ids in logits.items():
            before = of_ids[len(prompt) - 1 : -1].double().log_softmax(-1).cpu()
            chosen = before.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            values.setdefault(name, []).append(chosen)
    return {name: torch.cat(parts) for name, parts in values.items()}


def error_rows(values: dict[str, Tensor]) -> list[list[str]]:
    """Return rows (system, compared with, mean error, largest error)."""
    exact = [name for name in values if name.startswith("float64")]
    pairs = [(name, other) for other in exact for name in values if name not in exact]
    pairs += [(GENERATION, name) for name in values if name.startswith(TRAINING)]
    rows = []
    for name, other in pairs:
        error = (values[name] - values[other]).abs()
        rows.append([name, other, f"{error.mean():.3e}", f"{error.max():.3e}"])
    return rows


def run(argv: list[str] | None = None) -> int:
    """Print both tables and a RESULT line, and return the exit code."""
    p = CommandParser(prog="decode_exactness.py", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, help="a folder, or a GGUF file")
    p.add_argument("--sequences", type=int, default=64)
    p.add_argument("--answers", type=int, default=8, help="compared with float64")
    p.add_argument("--new-tokens", type=int, default=64)
    args = p.parse_args(argv)
    model, tokenizer = load(args)
    prompts = make_prompts(tokenizer, model.config.vocab_size, args.sequences)
    print(f"{args.model}, {model.dtype}; {as_text(machine_and_versions())}\n")
    rows = [
        [name, part, result]
        for name in SAMPLING
        for part, result in compare_batches(model, prompts, args.new_tokens, name).items()
    ]
    print(markdown_table(["tokens", f"beside {len(prompts)} rows", "result"], rows) + "\n")
    few = prompts[: args.answers]
    answers = generate(model, few, [0] * len(few), args.new_tokens, "greedy")
    model.free_generation_memory()
    values = log_probabilities(model, few, answers)
    errors = error_rows(values)
    print(markdown_table(["log-probabilities of", "against", "mean", "largest"], errors))
    print("RESULT " + json.dumps({"invariance": rows, "errors": errors}))
    means = {(name, other): float(mean) for name, other, mean, _ in errors}
    is_farther = means[GENERATION, "float64"] > SLACK * means[TRAINING, "float64"]
    allowed = (SAME,) if model.device.type == "cuda" else (SAME, SAME_TOKENS)
    assert all(map(math.isfinite, means.values())), f"an error is not finite: {means}"
    return int(is_farther or any(row[2] not in allowed for row in rows))


def load(args: argparse.Namespace) -> tuple[LanguageModel, Any]:
    """Return the model with a random adapter, and its tokenizer."""
    longest = max(LENGTHS) + args.new_tokens
    model, tokenizer = FastLanguageModel.from_pretrained(args.model, max_seq_length=longest)
    FastLanguageModel.get_peft_model(model, r=R, lora_alpha=ALPHA)
    parameters = dict(model.adapter_parameters())
    values = random_adapter({n: p.shape for n, p in parameters.items()}, seed=0, trained=True)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return model, tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("decode_exactness.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())

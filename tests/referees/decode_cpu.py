"""Time decoding in float32 on a CPU beside transformers, in turns in one process.

    python tests/referees/decode_cpu.py --model DIR --threads 2

Prompts of random tokens, greedy answers of one length, 1 and 8 sequences. Both sides answer each
prompt in turn, several rounds. A round's time is that of the whole call, prefill included. The
medians of the time between two tokens and the fastest round are printed, with a check that both
sides chose the same tokens. Other programs on the machine disturb both sides; the fastest round is
the least disturbed one. With OMP_WAIT_POLICY=PASSIVE threads do not spin while they wait, so the
CPU time of a step is its work.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from minitune import FastLanguageModel

PROMPT_TOKENS = 64


class Clock(transformers.StoppingCriteria):
    """The times at which a call had chosen its tokens; it stops nothing."""

    def __init__(self):
        self.times: list[float] = []
        self.cpu_times: list[float] = []  # of all threads together

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options) -> torch.Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def tick(self) -> None:
        """Note the time of one more token of each sequence."""
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())


def ours(model, prompts: torch.Tensor, tokens: int, clock: Clock) -> list[list[int]]:
    """Return minitune's answers."""

    def on_token(i: int, token: int) -> None:
        if i == 0:
            clock.tick()

    return model.generate(
        prompts.tolist(), max_new_tokens=tokens, do_sample=False, eos_token_id=-1, on_token=on_token
    )


def theirs(model, prompts: torch.Tensor, tokens: int, clock: Clock) -> list[list[int]]:
    """Return transformers' answers."""
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    return out[:, prompts.shape[1] :].tolist()


def timed(side: Callable, model, prompts: torch.Tensor, tokens: int) -> tuple:
    """Return the answers, the seconds of the call, and the wall and CPU time of each step."""
    clock, begin = Clock(), time.perf_counter()
    answers = side(model, prompts, tokens, clock)
    seconds = time.perf_counter() - begin
    return answers, seconds, differences(clock.times), differences(clock.cpu_times)


def differences(times: list[float]) -> list[float]:
    """Return the time from each entry to the next."""
    return [b - a for a, b in itertools.pairwise(times)]


def compare(models: dict, rows: int, tokens: int, rounds: int) -> None:
    """Print the speed of both sides for a number of sequences."""
    generator = torch.Generator().manual_seed(rows)
    vocab = models["minitune"][1].config.vocab_size
    prompts = torch.randint(10, vocab, (rows, PROMPT_TOKENS), generator=generator)
    seconds, steps, work, answers = {}, {}, {}, {}
    for name, (side, model) in models.items():
        timed(side, model, prompts, 4)  # builds what stays between calls
        seconds[name], steps[name], work[name] = [], [], []
    for _ in range(rounds):
        for name, (side, model) in models.items():
            answers[name], took, between, of_cpu = timed(side, model, prompts, tokens)
            seconds[name].append(took)
            steps[name] += between
            work[name] += of_cpu
    for name in models:
        fastest, median = min(seconds[name]), statistics.median(steps[name])
        print(
            f"{rows} x {tokens} tokens, {name:12s} {rows * tokens / fastest:7.1f} tokens/s "
            f"(fastest call), {1e3 * median:6.1f} ms a step (median), "
            f"{1e3 * min(steps[name]):6.1f} ms (least), "
            f"{1e3 * min(work[name]):6.1f} ms of CPU time (least)",
            flush=True,
        )
    a, b = (seconds[name] for name in ("transformers", "minitune"))
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    same = answers["minitune"] == answers["transformers"]
    print(
        f"{rows} x {tokens} tokens: {min(a) / min(b):.2f}x transformers (fastest calls), "
        f"{statistics.median(pairs):.2f}x (median of the rounds), "
        f"{statistics.median(steps['transformers']) / statistics.median(steps['minitune']):.2f}x "
        f"(median steps); equal tokens: {same}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder of a model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="sequences")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    hf = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    model, _ = FastLanguageModel.from_pretrained(
        a.model, dtype=torch.float32, device="cpu", load_in_4bit=False
    )
    models = {"transformers": (theirs, hf), "minitune": (ours, model)}
    for rows in a.rows:
        compare(models, rows, a.tokens, a.rounds)


if __name__ == "__main__":
    main()

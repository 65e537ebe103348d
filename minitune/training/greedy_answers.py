"""Greedy answers of a model, also of one that trains.

They change no number of the training. Decoding is greedy, so it draws no random number, and it
computes no gradient. On a GPU the memory of a model that trains comes from the CUDA graphs' pool,
which has room for a micro-step, and nothing of it stays: the weights are not made resident, and no
graph of a decode step is captured.
"""

from collections.abc import Sequence

import torch

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.model.decoding.engine import decode
from minitune.model.decoding.requests import Answer, Request
from minitune.model.sampling import SamplingConfig
from minitune.progress import ProgressBar
from minitune.training.micro_step import MicroStep
from minitune.training.out_of_memory import run_in_graph_pool


def greedy_answers(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end_tokens: Sequence[int],
    micro_step: MicroStep | None = None,
    show_bar: bool = True,
) -> list[list[int]]:
    """Return the new tokens of each prompt, with the end token if the answer has one.

    prompts: token ids of each prompt.
    limits: the largest number of new tokens of each prompt, at least 1.
    micro_step: of a model that trains; its memory is used.
    show_bar: show a progress bar, on a terminal.

    Raises: torch.OutOfMemoryError, MemoryError or NoCacheRoom if memory runs out; LogitsNotFinite
        if the logits are not finite.
    """
    requests = [Request(*item) for item in zip(prompts, limits, strict=True)]
    total = sum(limits)
    with ProgressBar("answering", total, "token", show_bar) as bar:

        def decode_all() -> list[Answer]:
            left = list(limits)
            bar.move_to(0, total)

            def count(i: int, token: int) -> None:
                left[i] = 0 if token in end_tokens else left[i] - 1
                bar.move_to(total - sum(left), total)

            return decode(
                model,
                requests,
                SamplingConfig(),  # greedy
                end_tokens=end_tokens,
                on_token=count,
                cache_memory=None if micro_step is None else _cache_memory(micro_step),
                keep=micro_step is None,
            )

        if micro_step is None:
            found = decode_all()
        else:
            found = run_in_graph_pool(micro_step, decode_all)
        return [answer.tokens for answer in found]


def _cache_memory(micro_step: MicroStep) -> int | None:
    """Return the bytes of keys and values while a model trains: half of what its plans may use.

    None on a CPU. The other half is for the layer that runs.
    """
    device = micro_step.model.device
    if device.type != "cuda":
        return None
    return (micro_step.planner.memory_limit(device) - torch.cuda.memory_allocated(device)) // 2


def answer_texts(
    answers: Sequence[Sequence[int]], end_tokens: Sequence[int], tokenizer: Tokenizer
) -> list[str]:
    """Return answers as texts up to their end tokens, without special tokens and outer spaces."""
    texts = tokenizer.batch_decode(
        [_before_end(answer, end_tokens) for answer in answers], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def _before_end(answer: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """Return the tokens in front of the first end token."""
    ends = (i for i, token in enumerate(answer) if token in end_tokens)
    return list(answer[: next(ends, len(answer))])

"""A program that asks llama.cpp for next-token distributions, through either of its two packages.

    python -P llama_cpp_probe.py FILE.gguf QUESTION.json ANSWER.json

QUESTION.json holds `prompts`, lists of token ids, and `whole`, the id of a token of whole
characters. ANSWER.json receives for each prompt the likeliest next tokens, as pairs of an id and
the logarithm of its probability. The program runs in a process of its own, because llama.cpp ends
its process at some faults of a file. It imports nothing of minitune.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 512  # tokens
LIKELIEST = 200  # next tokens
Answer = list[list[tuple[int, float]]]


def with_llama_cpp_python(path: str, question: dict[str, Any], threads: int) -> Answer:
    """Return the next tokens through the package llama_cpp."""
    llama_cpp = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(
        path,
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        logits_all=True,
        verbose=True,
    )
    answer = []
    for prompt in question["prompts"]:
        model.reset()
        model.eval(prompt)
        logits = np.array(model.scores[len(prompt) - 1], dtype=np.float64)
        logits -= logits.max()
        logs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logs)[:LIKELIEST]
        answer.append([(int(id), float(logs[id])) for id in best])
    return answer


def with_xllamacpp(path: str, question: dict[str, Any], threads: int) -> Answer:
    """Return the next tokens through the package xllamacpp."""
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = CONTEXT
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = threads
    params.check_tensors = True
    params.warmup = False
    params.verbosity = 1  # errors
    server = xllamacpp.Server(params)
    # A server that is deleted before its loop has begun waits for the loop for ever. A request ends
    # after the loop has begun.
    server.handle_completions({"prompt": [question["whole"]], "max_tokens": 1})
    answer = []
    for prompt in question["prompts"]:
        # The reply has no entry for a token that ends inside a character, so a bias forces a whole
        # one to come next. The reported probabilities are those without the bias.
        request = {
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "n_probs": LIKELIEST,
            "logit_bias": [[question["whole"], 1000]],
        }
        reply = server.handle_completions(request)
        entries = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        answer.append([(entry["id"], entry["logprob"]) for entry in entries])
    return answer


PACKAGES = {"llama_cpp": with_llama_cpp_python, "xllamacpp": with_xllamacpp}


def installed_package() -> str | None:
    """Return the name of the package through which llama.cpp can be asked, or None."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name)), None)


if __name__ == "__main__":
    model, asked, answered = sys.argv[1:]
    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    # Threads of llama.cpp spin while they wait, which is slow on a core that others use too.
    answer = PACKAGES[installed_package()](model, question, max(1, (os.cpu_count() or 1) // 2))
    Path(answered).write_text(json.dumps(answer), encoding="utf-8")

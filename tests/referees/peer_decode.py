"""Timed generation of a peer, as a record with the keys of scripts/benchmark/decode_records.py.

`load` is the function of a peer's file; `a` are the flags of peers.py. Unsloth is prepared by
`for_inference`, as its notebooks say. An error with one number of sequences leaves the figures of
the others.
"""

import argparse
import gc
import time
from typing import Any

import torch
from benchmark.decode_records import randomize_b_, time_generation
from benchmark.records import loading_figures, memory_figures

from referees.peer_steps import LoadPeer, configuration

WARM_UP_TOKENS = 8  # of the first call


def time_decoding(a: argparse.Namespace, load: LoadPeer) -> dict[str, Any]:
    """Return the record of generation with each of the numbers of sequences `a.decode`."""
    start = time.perf_counter()
    a.checkpointing = "none"
    model, _ = load(a)
    if a.peer == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.config.use_cache = True
    model.eval()
    randomize_b_([p for name, p in model.named_parameters() if "lora_B" in name])
    device = next(model.parameters()).device
    trainable = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    loading = loading_figures(start, trainable)

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts, device=device)
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        assert found.shape[1] == ids.shape[1] + new_tokens

    record = configuration(a) | loading | {"prompt": a.prompt_tokens, "new": a.new_tokens}
    record["decode"] = {}
    for sequences in a.decode:
        try:
            figures = time_generation(
                generate, a, sequences, model.config.vocab_size, min(WARM_UP_TOKENS, a.new_tokens)
            )
        except (RuntimeError, ValueError, TypeError) as error:
            figures = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        record["decode"][str(sequences)] = figures
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    memory = memory_figures()
    return record | {key: memory[key] for key in ("gpu", "date")}

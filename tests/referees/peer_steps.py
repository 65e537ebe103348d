"""Timed single steps of a peer, as a record with the keys of scripts/benchmark/records.py.

`load` is the function of a peer's file; `a` are the flags of peers.py.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark.records import (
    FIRST_TOKEN,
    LEARNING_RATE,
    loading_figures,
    memory_figures,
    step_figures,
    synchronize,
)
from bitsandbytes.optim import AdamW8bit

from referees.versions import installed_versions

LoadPeer = Callable[[argparse.Namespace], tuple[Any, Any]]  # -> (model, tokenizer)

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "unsloth",
    "liger-kernel",
)


def time_steps(a: argparse.Namespace, load: LoadPeer) -> dict[str, Any]:
    """Return the record of single steps."""
    model, _, loading = load_timed(a, load)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if a.optim == "adamw_8bit":
        optimizer = AdamW8bit(parameters, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    shape, vocab = (a.batch, a.tokens), model.config.vocab_size
    seconds, losses = [], []
    for _ in range(a.warmup + a.steps):
        ids = torch.randint(FIRST_TOKEN, vocab, shape, generator=generator, device=device)
        synchronize()
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    figures = step_figures(seconds, losses, a.warmup, a.batch * a.tokens)
    return configuration(a) | loading | memory_figures() | figures


def load_timed(a: argparse.Namespace, load: LoadPeer) -> tuple[Any, Any, dict[str, Any]]:
    """Return the peer's model ready to train, its tokenizer, and the figures of loading."""
    start = time.perf_counter()
    model, tokenizer = load(a)
    model.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, tokenizer, loading_figures(start, trainable)


def configuration(a: argparse.Namespace) -> dict[str, Any]:
    """Return the part of a record that names the configuration and the versions."""
    return {
        "peer": a.peer,
        "gc": a.checkpointing,
        "targets": a.targets,
        "bs": a.batch,
        "seq": a.tokens,
        "r": a.r,
        "attention": "its own" if a.peer == "unsloth" else "sdpa",
        "optim": a.optim,
        "graphs": False,
        "versions": installed_versions(PACKAGES) | {"torch": torch.__version__},
    }

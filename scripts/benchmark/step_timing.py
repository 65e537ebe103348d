"""Timed runs of minitune: single steps, and a fine-tune on short samples through SFTTrainer.

A step is forward, backward and optimizer on `batch` samples of `tokens` random tokens, every token
a label, on the path that SFTTrainer takes itself. Its time is the wall clock between two waits for
the device. The warm-up steps are recorded apart: the first compiles and runs eagerly, a later one
captures the CUDA graphs.

A run on short samples takes 8 of them an optimizer step. The seconds of its steps are the
differences between the lines of metrics.jsonl. Their median hardly shows the capture of a new
length; samples_s_all, the mean rate of all steps after the warm-up, does.

The settings `a` of these functions are the flags of bench.py.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmark.records import (
    ACCUMULATION,
    FIRST_TOKEN,
    LEARNING_RATE,
    loading_figures,
    memory_figures,
    short_figures,
    short_settings,
    short_texts,
    step_figures,
    synchronize,
)
from benchmark.step_profile import profile_step
from minitune import FastLanguageModel, LanguageModel, SFTConfig, SFTTrainer
from minitune.config.architectures import LORA_TARGETS
from minitune.config.training_config import GRADIENT_CHECKPOINTING, parse_bytes
from minitune.data.batching import Batch
from minitune.device import most_pinned
from minitune.kernels.optional_triton import triton
from minitune.memory.planner import Planner
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW

TARGETS = {"all": LORA_TARGETS, "qkvo": LORA_TARGETS[:4]}
CHECKPOINTING = ("true", "false", "auto")
OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit")
GIB = 2**30


def load(a: argparse.Namespace, lora_alpha: int) -> tuple[LanguageModel, Any, dict[str, Any]]:
    """Return a model with a new adapter, its tokenizer, and the figures of loading."""
    start = time.perf_counter()
    if a.memory_limit is not None:
        total = torch.cuda.get_device_properties("cuda").total_memory
        torch.cuda.set_per_process_memory_fraction(min(parse_bytes(a.memory_limit) / total, 1.0))
    model, tokenizer = FastLanguageModel.from_pretrained(
        a.model,
        max_seq_length=a.tokens,
        attention=a.attention,
        offload_embedding=a.offload_embedding,
    )
    FastLanguageModel.get_peft_model(
        model,
        r=a.r,
        lora_alpha=lora_alpha,
        target_modules=TARGETS[a.targets],
        use_gradient_checkpointing=GRADIENT_CHECKPOINTING[a.checkpointing],
    )
    budget = parse_bytes(a.memory_budget) if a.memory_budget else None
    host_budget = parse_bytes(a.host_memory) if a.host_memory else 0
    model.planner = Planner(model.planner.level, budget, host_budget)
    trainable = sum(p.numel() for _, p in model.trainable_parameters())
    return model, tokenizer, loading_figures(start, trainable)


def time_steps(a: argparse.Namespace) -> dict[str, Any]:
    """Return the record of single steps."""
    model, _, loading = load(a, 2 * a.r)
    parameters = [p for _, p in model.trainable_parameters()]
    optimizer = FlatAdamW(parameters, eight_bit=a.optim == "adamw_8bit")
    micro = MicroStep(model, capture=not a.no_graphs)
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    for _ in range(a.warmup + a.steps):
        batch = random_batch(a.batch, a.tokens, model.config.vocab_size, generator)
        synchronize()
        start = time.perf_counter()
        loss = micro(batch, batch.targets)
        optimizer.step(LEARNING_RATE)
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    record = configuration(a) | loading | memory_figures(most_pinned())
    record |= step_figures(seconds, losses, a.warmup, a.batch * a.tokens) | plan_figures(micro)
    if a.profile:
        eager = MicroStep(model, capture=False)
        record["profile"] = profile_step(
            lambda: eager(batch, batch.targets),
            lambda: (optimizer.step(LEARNING_RATE), optimizer.zero_grad()),
            1e3 * statistics.median(seconds[a.warmup :]),
            model.config.vocab_size,
            a.r,
        )
    return record


def random_batch(batch: int, tokens: int, vocab: int, generator: torch.Generator) -> Batch:
    """Return `batch` packed samples of `tokens` random tokens, each token a label."""
    ids = torch.randint(FIRST_TOKEN, vocab, (batch * tokens,), generator=generator)
    return Batch(ids, ids.clone(), torch.arange(tokens).repeat(batch), batch * (tokens - 1))


def time_short_samples(a: argparse.Namespace) -> dict[str, Any]:
    """Return the record of a run on short samples; a.batch is per_device_train_batch_size."""
    model, tokenizer, loading = load(a, a.r)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=f"{folder}/run",
            **short_settings(a),
            cuda_graphs=not a.no_graphs,
            memory_budget=a.memory_budget,
            host_memory=a.host_memory or ("0GiB" if a.checkpointing == "auto" else None),
            logging_steps=1,
        )
        texts = [{"text": text} for text in short_texts()]
        trainer = SFTTrainer(model, args, texts, processing_class=tokenizer)
        trainer.train()
        metrics = (Path(args.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    figures = short_figures(
        ends=[line["seconds"] for line in lines],
        losses=[line["loss"] for line in lines],
        warmup=a.warmup,
        samples=a.batch * ACCUMULATION,
        mean_length=statistics.mean(len(s.input_ids) for s in trainer.data.train.samples),
    )
    record = configuration(a) | loading | memory_figures(most_pinned())
    return record | figures | plan_figures(trainer.micro_step)


def plan_figures(micro: MicroStep) -> dict[str, Any]:
    """Return the plan's expectations: planned_gb of peak_gb, planned_ms of ms without optimizer."""
    plan = micro.planner.largest
    return {
        "planned_gb": round(plan.peak / GIB, 2),
        "planned_ms": round(1e3 * plan.seconds, 2),
        "host_gb": round(plan.host_bytes / GIB, 2),
        "plan": str(plan),
    }


def configuration(a: argparse.Namespace) -> dict[str, Any]:
    """Return the part of a record that names the configuration."""
    return {
        "peer": "minitune",
        "model": Path(a.model).name,
        "gc": a.checkpointing,
        "targets": a.targets,
        "bs": a.batch,
        "seq": a.tokens,
        "r": a.r,
        "attention": a.attention,
        "optim": a.optim,
        "graphs": torch.cuda.is_available() and not a.no_graphs,
        "versions": {"torch": torch.__version__, "triton": getattr(triton, "__version__", None)},
    }

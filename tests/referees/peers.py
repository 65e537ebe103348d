"""The peers of the benchmark: one peer, one configuration, one process. scripts/bench.py starts it; so can you.

    python tests/referees/peers.py unsloth DIR --batch 2 --tokens 2048 --targets all --checkpointing none
    python tests/referees/peers.py unsloth DIR --short

unsloth is Unsloth, hf transformers + PEFT + bitsandbytes, liger the same with Liger's kernels. Each is set up as its
own documentation says: NF4 with double quantisation, bf16, rank-r LoRA without dropout, fused AdamW, and the
checkpointing that it comes with or none. A step is forward, backward and optimizer on random tokens, every token a
label. --short is a small fine-tune through TRL's SFTTrainer as Unsloth's notebooks write it, 8 short samples an
optimizer step.

The record that it prints has the keys of bench.py's own. Nothing of a peer is imported before one is chosen.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from benchmark.records import (
    ACCUMULATION,
    FIRST_TOKEN,
    LEARNING_RATE,
    memory_and_place,
    short_figures,
    short_texts,
    start_counting,
    step_figures,
    wait,
)

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
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
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"qkvo": ATTENTION, "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}


def load_unsloth(a):
    from unsloth import FastLanguageModel  # isort: skip  (before torch and transformers, which it patches)
    import torch

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=a.model, max_seq_length=a.tokens, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=a.r,
        lora_alpha=a.r if a.short else 2 * a.r,
        lora_dropout=0,
        bias="none",
        target_modules=list(TARGETS[a.targets]),
        use_gradient_checkpointing="unsloth" if a.checkpointing == "default" else False,
        random_state=3407,
    )
    return model, tokenizer


def load_peft(a):
    """transformers, PEFT and bitsandbytes; with Liger's kernels if that is the peer."""
    if a.peer == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = load_nf4(a.model)
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=a.checkpointing == "default",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = LoraConfig(
        r=a.r,
        lora_alpha=2 * a.r,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(TARGETS[a.targets]),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora), None


def load_nf4(folder: str | Path):
    """transformers' model of a 16-bit folder, its linears bitsandbytes': NF4 with double quantisation, bf16 at work."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": device()},
    )


def load(a):
    """The peer's model ready to train, its tokenizer, and what the record says of them; memory counts from here."""
    start = time.perf_counter()
    model, tokenizer = load_unsloth(a) if a.peer == "unsloth" else load_peft(a)
    model.train()
    return (
        model,
        tokenizer,
        start_counting(start, sum(p.numel() for p in model.parameters() if p.requires_grad)),
    )


def time_steps(a) -> dict:
    model, _, facts = load(a)
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    if a.optim == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    generator = torch.Generator(device()).manual_seed(1)
    shape = (a.batch, a.tokens)
    seconds, losses = [], []
    for _ in range(a.warmup + a.steps):
        ids = torch.randint(
            FIRST_TOKEN, model.config.vocab_size, shape, generator=generator, device=device()
        )
        wait()
        start = time.perf_counter()
        with torch.autocast(device(), dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return about(a, facts) | step_figures(seconds, losses, a.warmup, a.batch * a.tokens)


def time_short_samples(a) -> dict:
    model, tokenizer, facts = load(a)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """When each optimizer step was done on the device."""

        def __init__(self):
            self.ends = []

        def on_step_end(self, *_, **__):
            wait()
            self.ends.append(time.perf_counter())

    texts = short_texts(a.samples)
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            dataset_text_field="text",
            dataset_num_proc=1,
            max_length=a.tokens,
            packing=False,
            per_device_train_batch_size=a.batch,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=a.steps,
            warmup_steps=2,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            optim=a.optim,
            seed=3407,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
    )
    start = time.perf_counter()
    trainer.train()
    ends = [end - start for end in clock.ends]
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    mean_length = statistics.mean(
        len(text) + 1 for text in texts
    )  # a letter is a token, and then the end
    return about(a, facts) | short_figures(
        ends, losses, a.warmup, a.batch * ACCUMULATION, mean_length
    )


def about(a, facts: dict) -> dict:
    """What was run, on what, and the memory that it took so far."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
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
        **facts,
        **memory_and_place(),
        "versions": versions | {"torch": torch.__version__},
    }


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    p = argparse.ArgumentParser(description="Time training steps of one peer.")
    p.add_argument("peer", choices=("unsloth", "hf", "liger"))
    p.add_argument("model", help="checkpoint folder")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--targets", choices=TARGETS, default="all")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--checkpointing", choices=("default", "none"), default="default")
    p.add_argument("--optim", choices=("adamw_torch_fused", "adamw_8bit"))
    p.add_argument("--steps", type=int)
    p.add_argument("--warmup", type=int)
    p.add_argument("--short", action="store_true", help="short samples, through TRL's SFTTrainer")
    p.add_argument("--samples", type=int, default=4000)
    a = p.parse_args()
    if a.short and a.peer != "unsloth":
        p.error(f"--short is Unsloth's recipe; {a.peer} has none here")
    a.steps, a.warmup = a.steps or (30 if a.short else 8), a.warmup or (5 if a.short else 3)
    a.optim = a.optim or ("adamw_8bit" if a.short else "adamw_torch_fused")
    os.environ.update(OFFLINE)
    print("RESULT " + json.dumps(time_short_samples(a) if a.short else time_steps(a)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

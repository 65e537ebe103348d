"""Time training steps of one peer on one configuration. scripts/bench.py starts it as a process.

    python tests/referees/peers.py unsloth DIR --batch 2 --tokens 2048 --targets all
    python tests/referees/peers.py unsloth DIR --short
    python tests/referees/peers.py unsloth DIR --decode 1 64

unsloth is Unsloth, hf is transformers + PEFT + bitsandbytes, liger is hf with Liger's kernels. Each
is set up as its documentation says: NF4 with double quantisation, bf16, rank-r LoRA without
dropout, fused AdamW, and its own checkpointing or none. A step is forward, backward and optimizer
on random tokens, every token a label. --short is a small fine-tune through TRL's SFTTrainer, as in
Unsloth's notebooks: 8 short samples an optimizer step. --decode generates instead (peer_decode.py).

The record has the keys of bench.py's own (scripts/benchmark/records.py). Each peer's file imports
its libraries. Only the chosen file is imported, and first, because Unsloth patches torch.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests")]

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "WANDB_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"qkvo": ATTENTION, "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}


def parse() -> argparse.Namespace:
    """Return the flags of the command line, with the defaults of the kind of run."""
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
    p.add_argument("--decode", nargs="+", type=int, help="generate, with these numbers of prompts")
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--new-tokens", type=int, default=256)
    p.add_argument("--calls", type=int, default=1)
    a = p.parse_args()
    if a.short and a.peer != "unsloth":
        p.error(f"--short is Unsloth's recipe; {a.peer} has none here")
    a.steps = a.steps or (30 if a.short else 8)
    a.warmup = a.warmup or (5 if a.short else 3)
    a.optim = a.optim or ("adamw_8bit" if a.short else "adamw_torch_fused")
    return a


def main() -> int:
    """Run the peer and print its record."""
    a = parse()
    os.environ.update(OFFLINE)
    peer = importlib.import_module(f"referees.peer_{a.peer}")
    if a.decode:
        load = getattr(peer, "load_for_generation", peer.load)
        record = importlib.import_module("referees.peer_decode").time_decoding(a, load)
    elif a.short:
        record = importlib.import_module("referees.peer_short").time_short_samples(a, peer.load)
    else:
        record = importlib.import_module("referees.peer_steps").time_steps(a, peer.load)
    print("RESULT " + json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The benchmark's peer liger: transformers + PEFT + bitsandbytes with Liger's kernels."""

import argparse
from typing import Any

from liger_kernel.transformers import apply_liger_kernel_to_llama

from referees import peer_hf


def load(a: argparse.Namespace) -> tuple[Any, None]:
    """Patch transformers' Llama, and return the model of the peer hf."""
    apply_liger_kernel_to_llama()
    return peer_hf.load(a)

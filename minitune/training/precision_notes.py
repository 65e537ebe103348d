"""The notes on a run whose bf16 or fp16 asks for another dtype than that of the model."""

import torch

from minitune.config.sft_config import SFTConfig
from minitune.device import is_bfloat16_supported

WANTED = {"bf16": "bfloat16", "fp16": "float16"}


def precision_notes(args: SFTConfig, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return a text for each of bf16 and fp16 that asks for another dtype than the model's.

    dtype, device: those that the model computes in and on.
    """
    own = str(dtype).removeprefix("torch.")
    notes = []
    for name, word in WANTED.items():
        if getattr(args, name) and own != word:
            remedy = f'from_pretrained(..., dtype="{word}") loads it in {word}'
            if word == "bfloat16" and not is_bfloat16_supported(device):
                remedy = "this GPU has no bfloat16"
            notes.append(
                f"{name}=True asks for {word}, but the model was loaded in {own} and trains in it; "
                f"{remedy}"
            )
    return notes

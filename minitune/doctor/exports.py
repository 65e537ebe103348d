"""Merge and export, read back: the files must compute what the model with its adapter computes.

The distance of the logits is a part of the difference that the adapter makes to them: a merge that
lost the adapter has a distance of 1. A merge rounds the weights to 16 bit and Q8_0 to 8 bits.
"""

from pathlib import Path

import torch
from torch import Tensor

from minitune.api import FastLanguageModel
from minitune.checkpoints.merge import merge_to_folder
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.doctor.report import Finding, failed, judged, skipped, within
from minitune.doctor.subject import Subject
from minitune.gguf.export import plan_export
from minitune.gguf.tokenizer.tokenizer_texts import FIXED_TEXTS
from minitune.model.causal_lm import CausalLM

MAX_DISTANCE = 0.25  # of the adapter's difference; one lost linear of seven has about 0.38
MIN_DIFFERENCE = 0.02  # of the logits that the adapter makes, so that the distance says something
GGUF_TYPE = "q8_0"


def check_tokenizer_files(s: Subject) -> Finding:
    """Compare the tokens of texts with those of the saved tokenizer, and of the decoded texts."""
    folder = s.folder / "tokenizer"
    folder.mkdir()
    s.tokenizer.save_pretrained(folder)
    saved = Tokenizer.from_folder(folder)
    ids = s.tokenizer.encode_batch(list(FIXED_TEXTS))
    different = sum(a != b for a, b in zip(ids, saved.encode_batch(list(FIXED_TEXTS)), strict=True))
    text = f"saved and read: {different} of {len(ids)} texts have other tokens"
    return judged(different == 0 and any(ids), text, different=different)


def check_merge(s: Subject) -> Finding:
    """Compare the logits of the merged folder with those of base and adapter."""
    folder = s.folder / "merged"
    merge_to_folder(s.model, folder, s.tokenizer, _merge_base(s), progress=False)
    return _distance(s, folder)


def check_gguf(s: Subject) -> Finding:
    """Export and load a GGUF file, and compare its logits with those of base and adapter."""
    folder = s.folder / "gguf"
    try:
        plan = plan_export(s.model, folder, s.tokenizer, GGUF_TYPE, _merge_base(s))
    except ValueError as error:  # llama.cpp has no such model: refused by name, and not broken
        return skipped(f"the model cannot become a GGUF file: {error}")
    (file,) = plan.write(progress=False)
    finding = _distance(s, file)
    size = file.stat().st_size / 2**20
    text = f"{GGUF_TYPE}, {size:.0f} MiB, verified; {finding.text}"
    return Finding(finding.status, text, finding.values)


def _merge_base(s: Subject) -> str:
    """Return the weights that the adapter was trained on, as in a merge."""
    return "nf4" if s.model.is_nf4 else "auto"


def _distance(s: Subject, exported: Path) -> Finding:
    """Load an exported model and judge the distance of its logits."""
    with_adapter = _logits(s, s.model)
    with s.model.disable_adapter():
        difference = with_adapter - _logits(s, s.model)
    share = float(difference.norm() / with_adapter.norm())
    if not share >= MIN_DIFFERENCE:
        return failed(f"the adapter changes the logits by {share:.1e} of their norm, too little")
    model, _ = FastLanguageModel.from_pretrained(
        exported,
        max_seq_length=s.model.max_seq_length,
        dtype=s.model.dtype,
        load_in_4bit=False,
        device=s.model.device,
        progress=False,
    )
    distance = float((_logits(s, model) - with_adapter).norm() / difference.norm())
    return within(distance, MAX_DISTANCE, "of the adapter's difference")


@torch.no_grad()
def _logits(s: Subject, model: CausalLM) -> Tensor:
    sample = s.samples[0]
    return model(input_ids=torch.tensor([sample.input_ids])).logits.float()

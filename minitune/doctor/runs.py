"""A short run on random samples: a resumed run must end in the bits of an uninterrupted one."""

from pathlib import Path

import torch
from torch import Tensor

from minitune.config.sft_config import SFTConfig
from minitune.doctor.report import Finding, judged
from minitune.doctor.subject import Subject
from minitune.sft_trainer import SFTTrainer

STEPS, SAVED_STEP, SAMPLES_PER_STEP = 4, 2, 2
LENGTHS = {"cpu": (12, 20, 9, 16, 11, 14, 8, 10), "cuda": (60, 90, 33, 64, 128, 70, 20, 100)}


def check_resume(s: Subject) -> Finding:
    """Compare the adapter of a run with that of a run that continues from its checkpoint."""
    straight = s.folder / "straight"
    s.draw_adapter_()
    before = _adapter(s)
    _train(s, straight)
    expected = _adapter(s)
    with torch.no_grad():
        for _, p in s.model.trainable_parameters():
            p.fill_(1.0)  # everything has to come from the checkpoint
    _train(s, s.folder / "resumed", straight / f"checkpoint-{SAVED_STEP}")
    found = _adapter(s)
    s.draw_adapter_()
    different, moved = int((found != expected).sum()), int((expected != before).sum())
    text = (
        f"continued after {SAVED_STEP} of {STEPS} steps: {different:,} of {len(expected):,} values "
        "of the adapter differ in bits"
    )
    if not moved:
        text = f"{STEPS} steps did not change the adapter"
    return judged(different == 0 and moved > 0, text, different=different)


def _adapter(s: Subject) -> Tensor:
    return torch.cat([p.detach().flatten() for _, p in s.model.trainable_parameters()])


def _train(s: Subject, output: Path, checkpoint: Path | None = None) -> None:
    """Train in the folder `output`, from a checkpoint if one is given."""
    samples = s.random_samples(LENGTHS[s.model.device.type], seed=2)
    records = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
    args = SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=SAMPLES_PER_STEP,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVED_STEP,
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(s.model, args, records, processing_class=s.tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)

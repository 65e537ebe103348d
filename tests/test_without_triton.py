"""Training, generation and export on a CPU need no Triton, and give the same bits without it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ADAPTER_FILE, new_trainer

from minitune.device import choose_device
from minitune.kernels import optional_triton

ROOT = Path(__file__).parents[1]
# A program in which every import of Triton fails as if Triton were not installed.
WITHOUT_TRITON = """
import json, sys
from pathlib import Path

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")

sys.meta_path.insert(0, NoTriton())
import test_without_triton as test
assert test.optional_triton.triton is None
print(json.dumps(test.results(*map(Path, sys.argv[1:]))))
"""


def results(folder: Path, output: Path) -> dict[str, str | list[int]]:
    """Train, generate and export; return the answer and the hashes of the files."""
    trainer = new_trainer(folder, output / "run", max_steps=3, logging_steps=1)
    trainer.train()
    model, tokenizer = trainer.model, trainer.processing_class
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 lamps to Oslo"}], add_generation_prompt=True
    )
    answer = model.generate([prompt], max_new_tokens=8)[0]
    model.save_pretrained_gguf(output / "gguf", tokenizer, quantization_method="q8_0")
    files = [output / "run" / ADAPTER_FILE, *(output / "gguf").glob("*.gguf")]
    assert len(files) == 2
    hashes = {path.suffix: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"answer": answer, **hashes}


@pytest.mark.skipif(optional_triton.triton is None, reason="Triton is not installed")
def test_training_generation_and_export_give_the_same_bits_without_triton(smallest, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TRITON, str(smallest), str(tmp_path / "without")]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == results(smallest, tmp_path / "with")


def test_a_gpu_without_triton_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(optional_triton, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for asked in (None, "cuda", "cuda:0"):
        with pytest.raises(ValueError, match=r"needs Triton, which is not installed; install"):
            choose_device(asked)
    assert choose_device("cpu") == torch.device("cpu")

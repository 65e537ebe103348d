"""Collect an importance matrix with llama-imatrix, and write the golden data of the tests.

    python tests/referees/llama_imatrix.py LLAMA_IMATRIX

LLAMA_IMATRIX is the path of that program. tests/llama_imatrix.npz receives the token ids of the
chunks and the files that llama-imatrix wrote in both of its forms. The model is tiny, and its
weights are the same on every machine: PCG64's raw integers, scaled.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import CORPUS, make_tiny_model

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import convert_folder

GOLDEN = Path(__file__).resolve().parents[1] / "llama_imatrix.npz"
CONTEXT, CHUNKS = 64, 4  # tokens of a chunk, chunks


def make_seeded_model(folder: Path) -> Path:
    """Write a tiny Llama whose weights do not depend on the version of a library."""
    make_tiny_model(folder, tie=False, dtype=torch.float32)
    path, generator = folder / "model.safetensors", np.random.PCG64(7)
    tensors = load_file(path)
    for name, tensor in sorted(tensors.items()):
        uniform = generator.random_raw(tensor.numel()).astype(np.float64) / 2**64
        values = torch.from_numpy(uniform).float().view(tensor.shape)
        if tensor.dim() == 1:
            tensors[name] = 0.5 + values  # norms
        else:
            tensors[name] = (values - 0.5) * (12 / tensor.shape[1]) ** 0.5  # variance 1 / width
    save_file(tensors, path)
    return folder


def main(program: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_seeded_model(Path(temporary) / "model")
        model = convert_folder(folder, folder / "model.gguf", "f32")
        text = folder / "calibration.txt"
        text.write_text("\n".join(CORPUS * 8), encoding="utf-8")
        ids = Tokenizer.from_folder(folder).encode(text.read_text(encoding="utf-8"))
        golden = {"ids": np.array(ids[: CONTEXT * CHUNKS], dtype=np.int32)}
        for form in ("gguf", "dat"):
            output = folder / f"imatrix.{form}"
            options = f"-m {model} -f {text.name} -o {output} --output-format {form} --no-ppl -t 1"
            sizes = f"-c {CONTEXT} -b {CONTEXT} --chunks {CHUNKS}"
            command = [program, *options.split(), *sizes.split()]
            subprocess.run(command, cwd=folder, check=True)
            golden[form] = np.frombuffer(output.read_bytes(), dtype=np.uint8)
        np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
    main(sys.argv[1])

"""GGUF files for the tests: readers through gguf-py, a small file to change, and a tiny base."""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFReader
from tiny import make_tiny_model

from minitune.gguf.export import convert_folder
from minitune.gguf.reader import GgufReader
from minitune.gguf.writer import Content, MetadataValue, TensorInfo, write_gguf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tensors_of(path: Path) -> dict:
    """Return the file's tensors by name."""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict:
    """Return the file's keys and their values."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def copy_with_keys(source: Path, target: Path, metadata: dict[str, MetadataValue]) -> Path:
    """Write a copy of a file without quantised tensors that has other keys, and return its path."""
    tensors = GGUFReader(source).tensors
    infos = [TensorInfo(x.name, tuple(x.shape[::-1].tolist()), x.tensor_type) for x in tensors]
    values = [torch.from_numpy(x.data.copy()) for x in tensors]
    keys = {key: value for key, value in metadata.items() if not key.startswith("GGUF.")}
    write_gguf({target: Content(keys, infos)}, values)
    return target


def dequantised(source: Path, target: Path) -> Path:
    """Write the tensors of a GGUF file in float32, and return the new file."""
    reader = GgufReader(source)
    infos = [TensorInfo(x.name, x.shape, GGMLType.F32) for x in reader.tensors.values()]
    content = Content(reader.metadata | {"general.file_type": 0}, infos)
    write_gguf({target: content}, map(reader.load, reader.tensors), progress=False)
    return target


def make_tiny_gguf(folder: Path, method: str, **options) -> Path:
    """Write a tiny random model as a GGUF file, and return the path of the file.

    Rows are 256 values wide, so that every type of llama.cpp fits. The folder `plain` beside the
    file holds the model before it was quantised.

    method: type of the file, such as "q4_k_m".
    options: arguments of make_tiny_model.
    """
    plain = make_tiny_model(folder / "plain", **({"hidden": 256, "ffn": 256} | options))
    return convert_folder(plain, folder / f"tiny-{method}.gguf", method, verify=False)


HIDDEN, FFN, ROWS = 256, 256, 4
SMALL_KEYS = {
    "general.architecture": "llama",
    "general.type": "model",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
SMALL_TENSORS = {
    "token_embd.weight": ((ROWS, HIDDEN), GGMLType.Q4_K),
    "blk.0.attn_norm.weight": ((HIDDEN,), GGMLType.F32),
    "blk.0.attn_q.weight": ((256, HIDDEN), GGMLType.Q4_0),
    "blk.0.attn_k.weight": ((128, HIDDEN), GGMLType.F16),
    "blk.0.attn_v.weight": ((128, HIDDEN), GGMLType.Q8_0),
    "blk.0.attn_output.weight": ((HIDDEN, 256), GGMLType.IQ4_XS),
    "blk.0.ffn_norm.weight": ((HIDDEN,), GGMLType.F32),
    "blk.0.ffn_gate.weight": ((FFN, HIDDEN), GGMLType.Q5_1),
    "blk.0.ffn_up.weight": ((FFN, HIDDEN), GGMLType.Q3_K),
    "blk.0.ffn_down.weight": ((HIDDEN, FFN), GGMLType.Q6_K),
    "output_norm.weight": ((HIDDEN,), GGMLType.F32),
}


def write_small_llama(path: Path, keys: dict | None = None, tensors: dict | None = None) -> Path:
    """Write a file of a Llama with one layer whose data are zeros, and return its path.

    keys: keys that differ from SMALL_KEYS; None leaves a key out.
    tensors: name -> (shape, type) that differ from SMALL_TENSORS; None leaves a tensor out.
    """
    all_keys = {k: v for k, v in (SMALL_KEYS | (keys or {})).items() if v is not None}
    all_tensors = {k: v for k, v in (SMALL_TENSORS | (tensors or {})).items() if v is not None}
    content = Content(all_keys, [TensorInfo(name, *info) for name, info in all_tensors.items()])
    path.write_bytes(content.head + bytes(content.nbytes - len(content.head)))
    return path

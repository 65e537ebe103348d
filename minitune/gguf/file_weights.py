"""The tensors of a GGUF file under Hugging Face's names, in Hugging Face's layout."""

import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from minitune.config.model_config import ModelConfig
from minitune.device import read_files_ahead
from minitune.gguf.model_metadata import gguf_name
from minitune.gguf.quantization.quantize import dequantize
from minitune.gguf.reader import GgufReader
from minitune.gguf.tensor_layout import interleaved_heads, separate_rope_rows


class FileWeights:
    """The weights of a model in a GGUF file.

    `load` and `blocks` undo what a GGUF file does to a tensor: the order of q's and k's rows in
    llama.cpp's own layout, and the offset of Gemma's norms. A row of blocks is moved as a whole.
    """

    def __init__(self, reader: GgufReader, config: ModelConfig):
        self.reader, self.config = reader, config
        self.heads = interleaved_heads(config)

    def read_ahead(self) -> None:
        """Ask the system to read the file from disk, as `read_files_ahead`."""
        read_files_ahead([self.reader.path])

    def type_of(self, name: str) -> GGMLType:
        """Return the type in which a tensor is stored."""
        return self.reader.tensors[self._stored_name(name)].type

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in the file."""
        return self.reader.tensors[self._stored_name(name)].nbytes

    def is_reordered(self, name: str) -> bool:
        """Return True if a tensor's rows have another order in the file."""
        return name.split(".")[-2] in self.heads

    def load(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return a tensor, float32 on the device, by Hugging Face's name."""
        values = self.reader.load(self._stored_name(name), device)
        if name.endswith("norm.weight"):
            values = values - self.config.architecture.norm_offset
        return self._in_order(name, values)

    def blocks(self, name: str) -> Tensor:
        """Return a matrix in its own type, uint8 (rows, bytes of a row) on the CPU."""
        return self._in_order(name, self.reader.data(self._stored_name(name)))

    def load_rows(self, name: str, rows: slice, device: torch.device | str = "cpu") -> Tensor:
        """Return some rows of a matrix, float32 (rows, width) on the device.

        The rows must not be reordered.
        """
        assert not self.is_reordered(name), name
        stored = self._stored_name(name)
        data = self.reader.data(stored, rows).to(device)
        return dequantize(data, self.reader.tensors[stored].type)

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a tensor, or the values of a bias, in Hugging Face's order."""
        if not self.is_reordered(name):
            return rows
        return separate_rope_rows(rows, self.heads[name.split(".")[-2]])

    def error(self, name: str, text: str) -> ValueError:
        """Return an error about a tensor that begins with the file and its name there."""
        return ValueError(f"{self.reader.path}: {self._stored_name(name)} {text}")

    def _stored_name(self, name: str) -> str:
        return gguf_name(name, self.config.architecture)

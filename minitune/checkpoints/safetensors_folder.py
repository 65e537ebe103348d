"""The safetensors files of a model folder.

A folder holds one model.safetensors, or the shards that model.safetensors.index.json lists, or
other *.safetensors files without an index. The files are memory-mapped and opened once, so host
memory holds only the tensors that are in use.

In a multimodal wrapper's folder the text model's tensors have a prefix. They go by the names that
they have in a plain folder, and the wrapper's other tensors are left out.
"""

import math
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from minitune.device import read_files_ahead
from minitune.read_files import MAX_INDEX_BYTES, file_exists, read_json, require_readable

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Endings of constants that old writers saved or listed beside the weights; not loaded.
NOT_WEIGHTS = ("rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
TIED_HEAD = "lm_head.weight"  # some indexes list it although the embedding is used instead
# Weight files of other formats, which a folder may hold instead of safetensors.
FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz")
LFS_POINTER = b"version https://git-lfs"  # beginning of the small text that stands for a file
# Prefixes of a text model's tensors in a wrapper's folder -> prefix in a plain folder
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "lm_head.": "lm_head.",
    # Qwen2-VL's first layout
    "model.embed_tokens.": "model.embed_tokens.",
    "model.layers.": "model.layers.",
    "model.norm.": "model.norm.",
}
# In bitsandbytes' names, between a linear and its quantisation type, "nf4" or "fp4".
QUANT_STATE = ".weight.quant_state.bitsandbytes__"
TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,  # parts of quantised weights
}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file by name, on the CPU.

    Raises: ValueError that names the file if it is missing, truncated or of another format.
    """
    try:
        if file_exists(path):  # refuses a FIFO or device, which would not end
            require_readable(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        pickled = path.with_suffix(".bin")
        if not path.exists() and pickled.exists():
            raise ValueError(
                f"{pickled}: a pickled file, which may run code and is not read; "
                "save the adapter as safetensors"
            ) from None
        raise ValueError(
            f"{path}: not found, truncated, or not a safetensors file ({error})"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file that exists."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def text_name(stored: str) -> str | None:
    """Return the plain name of a tensor of a wrapper, or None if it is not the text model's."""
    prefix = next(filter(stored.startswith, TEXT_PREFIXES), None)
    return None if prefix is None else TEXT_PREFIXES[prefix] + stored.removeprefix(prefix)


class SafetensorsFolder:
    """The tensors of a model folder by name, read lazily.

    is_wrapper: True if the folder holds a multimodal model, whose text model is read.

    Raises: ValueError that names the file if the index is broken, or if a shard is missing,
        truncated or no safetensors file; or if a wrapper holds no text model.
    """

    def __init__(self, folder: str | Path, is_wrapper: bool = False):
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}  # by the tensor's name in the files
        self._files = {}  # open files by path
        self._open_files()
        # name -> name in the files
        self._stored_name = self._text_names() if is_wrapper else {n: n for n in self._file_of}

    def _open_files(self) -> None:
        """Open the files of the folder, and check them against the index if there is one."""
        index = self.folder / INDEX
        if not file_exists(index):
            for path in self._files_without_index():
                self._open(path)
            return
        listed = _read_index(index)
        if file_exists(self.folder / WHOLE) and WHOLE not in listed.values():
            raise ValueError(
                f"{self.folder}: holds {WHOLE}, and {INDEX}, which lists other files; "
                "remove the one that is out of date"
            )
        for file in sorted(set(listed.values())):
            if not file_exists(self.folder / file):
                raise ValueError(f"{index}: names the shard {file}, which is not in the folder")
            self._open(self.folder / file)
        self._check_index(index, listed)

    def _files_without_index(self) -> list[Path]:
        whole = self.folder / WHOLE
        files = [whole] if file_exists(whole) else sorted(self.folder.glob("*.safetensors"))
        if not files:
            foreign = sorted(
                path.name for pattern in FOREIGN_WEIGHTS for path in self.folder.glob(pattern)
            )
            found = f", but {foreign[0]}" if foreign else ""
            raise ValueError(
                f"{self.folder}: holds no *.safetensors{found}; other weight formats are not "
                "read, and pickled files may run code: save the model as safetensors"
            )
        return files

    def _open(self, path: Path) -> None:
        """Open a file and add its tensors to the names."""
        require_readable(path)
        try:
            file = self._files[path] = safe_open(path, "pt")
        except SafetensorError as error:
            if _is_lfs_pointer(path):
                raise ValueError(
                    f"{path}: a pointer of Git LFS, not the file; fetch it with `git lfs pull`"
                ) from None
            raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
        for name in file.keys():  # noqa: SIM118 (not a dictionary)
            if name in self._file_of:
                other = self._file_of[name].name
                raise ValueError(f"{self.folder}: {name} is in both {other} and {path.name}")
            self._file_of[name] = path

    def _text_names(self) -> dict[str, str]:
        """Return the name of each tensor of a wrapper's text model -> its name in the files."""
        names: dict[str, str] = {}
        for stored in self._file_of:
            name = text_name(stored)
            if name is None:
                continue
            if name in names:
                raise ValueError(
                    f"{self.folder}: holds {names[name]} and {stored}, which are the same tensor "
                    "of the text model; remove the one that is out of date"
                )
            names[name] = stored
        if not names:
            raise ValueError(
                f"{self.folder}: holds no text model; its tensors would begin with "
                f"{', '.join(TEXT_PREFIXES)}"
            )
        return names

    def _check_index(self, index: Path, listed: dict[str, str]) -> None:
        """Raise ValueError if the index and the shards disagree on a weight."""
        for name, file in listed.items():
            is_needed = not name.endswith(NOT_WEIGHTS) and not name.endswith(TIED_HEAD)
            found = self._file_of.get(name)
            if found != self.folder / file and (is_needed or found is not None):
                raise ValueError(f"{index}: says that {file} holds {name}, but it does not")
        unlisted = self._file_of.keys() - listed.keys()
        if extra := sorted(name for name in unlisted if not name.endswith(NOT_WEIGHTS)):
            path = self._file_of[extra[0]]
            raise ValueError(f"{path}: holds {extra[0]}, which is missing from {index.name}")

    def read_ahead(self) -> None:
        """Ask the system to read the files from disk, as `read_files_ahead`."""
        read_files_ahead(list(self._files))

    def names(self) -> list[str]:
        """Return the names of all tensors of the model."""
        return list(self._stored_name)

    def __contains__(self, name: str) -> bool:
        return name in self._stored_name

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the first file's header."""
        first = next(iter(self._files.values()))
        return first.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading the tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading the tensor.

        Raises: ValueError if no weight has such a dtype.
        """
        dtype = self._slice(name).get_dtype()
        if dtype not in TORCH_DTYPES:
            hint = ", and FP8 with a quantization_config" if dtype.startswith("F8") else ""
            raise self.error(name, f"is {dtype}; weights are F32, F16 or BF16{hint}")
        return TORCH_DTYPES[dtype]

    def nbytes(self, name: str) -> int:
        """Return the stored bytes of a tensor without reading it, or 0 if it is missing."""
        if name not in self:
            return 0
        dtype = TORCH_DTYPES.get(self._slice(name).get_dtype(), torch.uint8)  # FP8 has one byte
        return math.prod(self.shape(name)) * dtype.itemsize

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of a tensor in safetensors' words, of any tensor."""
        return self._slice(name).get_dtype()

    def rows(self, name: str, rows: slice) -> Tensor:
        """Return some rows of a tensor as they are stored, on the CPU; the others are not read."""
        stored = self._slice(name)
        return stored[rows] if stored.get_shape() else self._read(name)

    def load(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return a tensor on the device.

        shape: shape that the tensor must have; None accepts any.

        Raises: ValueError if the tensor is missing, or has another shape or no weight's dtype.
        """
        self.check_shape(name, shape)
        self.dtype(name)
        return self._read(name).to(device)

    def remap(self, name: str) -> None:
        """Map the file of a tensor anew: pages that were read leave this process's memory.

        The old mapping is closed with the last tensor that was loaded from it.
        """
        path = self._path(name)
        self._files[path] = safe_open(path, "pt")

    def is_dequantized(self, name: str) -> bool:
        """Return True if `load` computes the tensor from a quantised one; here, False."""
        return False

    def check_shape(self, name: str, shape: tuple[int, ...] | None) -> None:
        """Raise ValueError if a tensor is missing or has another shape than `shape`."""
        found = self.shape(name)
        if shape is not None and found != tuple(shape):
            raise self.error(name, f"has shape {found}, config.json asks for {tuple(shape)}")

    def _read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, as it is stored."""
        return self._files[self._path(name)].get_tensor(self._stored_name[name])

    def error(self, name: str, text: str) -> ValueError:
        """Return an error about a tensor that begins with its file and its name there."""
        return ValueError(f"{self._path(name)}: {self._stored_name[name]} {text}")

    def _path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._file_of[self._stored_name[name]]

    def _slice(self, name: str):
        if name not in self._stored_name:
            raise ValueError(f"{self.folder}: holds no tensor {name}")
        return self._files[self._path(name)].get_slice(self._stored_name[name])

    @property
    def prequantized(self) -> bool:
        """Return True if any linear is stored as NF4."""
        return any(f"{QUANT_STATE}nf4" in name for name in self._stored_name)


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _read_index(path: Path) -> dict[str, str]:
    """Return the file name of each tensor that an index lists."""
    weight_map = read_json(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    valid = isinstance(weight_map, dict) and weight_map
    if not valid or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(
            f"{path}: not a safetensors index; expected a weight_map from tensor to file names"
        )
    for file in set(weight_map.values()):
        if not _lies_below(file):
            raise ValueError(
                f"{path}: names the shard {file!r:.100}, expected a file in its folder"
            )
    return weight_map


def _lies_below(name: str) -> bool:
    """Return True if a path is relative and has no `..`; links of the files are not followed."""
    windows = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    return bool(windows.name) and not windows.anchor and ".." not in windows.parts

"""The checks of the models that a run writes at its end, before it trains.

A run of hours must not end with a refusal that was known at its beginning. The checks that need
the trained weights stay behind: whether a merged weight is finite, and whether a written file holds
what it should. Everything else comes first: names, types, tokenizer, architecture, merge base, the
range of the base's weights, and the room on the disk.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from minitune.atomic_files import existing_folder
from minitune.checkpoints.find_model import ADAPTER, checkpoint_step
from minitune.checkpoints.merge import merged_tensors
from minitune.config.sft_config import SFTConfig
from minitune.gguf.model_metadata import gguf_name
from minitune.gguf.quantization.quantize import check_range
from minitune.gguf.writer import Content
from minitune.model.causal_lm import CausalLM
from minitune.training.checkpoint import RunSize
from minitune.training.own_files import MERGED, checkpoints, existing_outputs
from minitune.training.run_folder import RUNS

LONGEST_NAME = 255  # bytes, of every common file system
FLOAT32 = 4  # bytes
# Magnitude from which a weight is read again: NF4 rounds scales by less than a tenth.
NEAR_LIMIT = 0.9 * torch.finfo(torch.float16).max
MOMENTS_8BIT = 2 + 8 / 256  # bytes a parameter, as in optimizer.py


def check_new_names(output: str | Path, files: Iterable[str]) -> None:
    """Check that a run can write its outputs into a folder under their names.

    files: names of the GGUF files.

    Raises: ValueError if the folder is not writable, a name is too long, or a folder stands in the
        place of a file or the other way round.
    """
    output = Path(output)
    folder = existing_folder(output)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {output}: {folder} is not writable; choose another one")
    for name in files:
        length = len(os.fsencode(f".{name}.partial"))
        if length > LONGEST_NAME:
            raise ValueError(
                f"{output / name}: its name has {length} bytes while it is written, and a file "
                f"system takes {LONGEST_NAME}; rename the model's folder"
            )
        if (output / name).exists() and not (output / name).is_file():
            raise ValueError(f"{output / name}: is no file, and a GGUF file gets this name")
    for name in (ADAPTER, MERGED):
        if (output / name).exists() and not (output / name).is_dir():
            raise ValueError(
                f"{output / name}: is a file, and a folder of the run gets this name; move it, or "
                "choose another output_dir"
            )


def require_room(args: SFTConfig, needed: Mapping[str, int]) -> None:
    """Check that the disk has room for the outputs of a run, all together.

    An output of an earlier run counts as free if the run deletes it before it begins.

    needed: words for an output -> its bytes.

    Raises: ValueError if the disk has less room.
    """
    output = Path(args.output_dir or RUNS)
    free = shutil.disk_usage(existing_folder(output)).free
    if args.overwrite and not args.resume:
        free += sum(_bytes_on_disk(output / name) for name in existing_outputs(output))
    total = sum(needed.values())
    if total > free:
        words_needed = [words for words, nbytes in needed.items() if nbytes]
        parts = ", ".join(f"{needed[words]:,} for {words}" for words in words_needed)
        has_several = any(words.endswith(" checkpoints") for words in words_needed)
        lower = "set a lower save_total_limit, " if has_several else ""
        raise ValueError(
            f"{output}: the run needs {total:,} bytes at its end ({parts}), but only {free:,} are "
            f"left on the disk; {lower}ask for fewer models, or choose another output_dir"
        )


def bytes_of_run(model: CausalLM, args: SFTConfig, size: RunSize) -> dict[str, int]:
    """Return words -> bytes, for the checkpoints and the adapter that a run adds to the disk."""
    adapter = FLOAT32 * sum(p.numel() for _, p in model.adapter_parameters())
    moments = MOMENTS_8BIT if args.optim == "adamw_8bit" else 2 * FLOAT32
    trained = sum(p.numel() for _, p in model.trainable_parameters())
    count = _new_checkpoints(args, size)
    words = "1 checkpoint" if count == 1 else f"{count} checkpoints"
    return {words: count * (adapter + int(moments * trained)), "the adapter": adapter}


def _new_checkpoints(args: SFTConfig, size: RunSize) -> int:
    """Return how many more checkpoints the disk holds after the run than now."""
    present = checkpoints(args.output_dir) if args.resume and args.output_dir else []
    done = checkpoint_step(present[-1]) if present else 0
    intervals = {"steps": args.save_steps, "epoch": size.steps_per_epoch}
    interval = intervals.get(args.save_strategy)
    saves = 0 if interval is None else -(-size.total_steps // interval) - done // interval
    if args.save_total_limit is not None:
        saves = min(saves, args.save_total_limit - len(present))
    return max(0, saves)


def check_base_range(model: CausalLM, merge_base: str, contents: Sequence[Content]) -> None:
    """Check that the weights of the base fit the floats of the files, before there is an adapter.

    A file of any type but F32 and BF16 holds float16. Only tensors whose loaded values come near
    its limit are merged and looked at.

    contents: of the GGUF files, from `check_gguf`.

    Raises: ValueError as the export, if a weight does not fit.
    """
    types = {info.name: [] for content in contents for info in content.infos}
    for content in contents:
        for info in content.infos:
            types[info.name].append(info.type)
    large = [name for name in model.config.tensor_shapes() if _largest(model, name) > NEAR_LIMIT]
    for name, tensor in merged_tensors(model, merge_base, large):
        file_name = gguf_name(name, model.config.architecture)
        for kind in types.get(file_name, ()):
            try:
                check_range(tensor, kind)
            except ValueError as error:
                raise ValueError(f"{file_name}: {error}") from None


def _largest(model: CausalLM, name: str) -> float:
    """Return the largest magnitude of a tensor as the model holds it."""
    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    if kind == "weight" and getattr(module, "quantized", None) is not None:
        values = module.quantized.dequantize(model.dtype)
    else:
        values = getattr(module, kind).detach()
    return max(map(abs, (bound.item() for bound in values.aminmax())))


def _bytes_on_disk(path: Path) -> int:
    """Return the bytes of a file or of the files in a folder; those behind links do not count."""
    if path.is_symlink():
        return 0
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(p.stat().st_size for p in paths if p.is_file() and not p.is_symlink())

"""The models that a run writes at its end: the merged folder and the GGUF files."""

from collections.abc import Sequence
from pathlib import Path

from minitune.atomic_files import atomic_folder
from minitune.checkpoints.merge import merge_to_folder
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import export_gguf
from minitune.model.causal_lm import CausalLM
from minitune.training.run_folder import MERGED, add_outputs


def write_models(
    model: CausalLM,
    tokenizer: Tokenizer,
    output: Path,
    merge: bool = False,
    methods: Sequence[str] = (),
    merge_base: str = "auto",
    progress: bool | None = None,
) -> list[Path]:
    """Write OUTPUT/merged and GGUF files, and return their paths.

    An output of the same name is replaced once the new one is complete.

    merge: write the merged folder.
    methods: types of the GGUF files.
    merge_base: weights to merge onto (checkpoints/merge.py).
    progress: show bars in bytes, as in progress.py.

    Raises: ValueError if an output cannot be written.
    """
    written = []
    if merge:
        with atomic_folder(output / MERGED, keep_others=False) as partial:
            merge_to_folder(model, partial, tokenizer, merge_base=merge_base, progress=progress)
        written.append(output / MERGED)
        add_outputs(output, [MERGED])
    if methods:
        paths = export_gguf(
            model, output, tokenizer, list(methods), merge_base, overwrite=True, progress=progress
        )
        written += paths
        add_outputs(output, [path.name for path in paths])
    return written

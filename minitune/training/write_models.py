"""The models that a run writes at its end: the merged folder and the GGUF files."""

from collections.abc import Sequence
from pathlib import Path

from minitune.atomic_files import atomic_folder
from minitune.checkpoints.merge import merge_to_folder
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.export import plan_export
from minitune.model.causal_lm import CausalLM
from minitune.training.own_files import MERGED, add_outputs, check_free
from minitune.training.run_folder import locked_run_folder


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

    An output of a run with the same name is replaced once the new one is complete.

    merge: write the merged folder.
    methods: types of the GGUF files.
    merge_base: weights to merge onto (checkpoints/merge.py).
    progress: show bars in bytes, as in progress.py.

    Raises: ValueError if an output cannot be written.
    """
    if not output.is_dir():
        raise ValueError(f"{output}: the run folder is no longer there; export the model elsewhere")
    written = []
    with locked_run_folder(output):
        if merge:
            _take_names(output, [MERGED])
            if (output / MERGED).is_symlink():
                (output / MERGED).unlink()
            with atomic_folder(output / MERGED, keep_others=False) as partial:
                merge_to_folder(model, partial, tokenizer, merge_base=merge_base, progress=progress)
            written.append(output / MERGED)
        if methods:
            plan = plan_export(model, output, tokenizer, list(methods), merge_base, overwrite=True)
            _take_names(output, [path.name for path in plan.targets])
            written += plan.write(progress)
    return written


def _take_names(output: Path, names: Sequence[str]) -> None:
    """List names in outputs.json. Raise ValueError if a file that no run wrote has one of them."""
    check_free(output, names)
    add_outputs(output, names)

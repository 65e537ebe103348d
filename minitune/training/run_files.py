"""The files that a run writes while it trains: config, facts, checkpoints and the adapter.

A run without a folder has `NoRunFiles`, which take the same calls and write nothing.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from minitune.atomic_files import (
    atomic_folder,
    atomic_write_text,
    os_errors_as_value_error,
)
from minitune.checkpoints.adapter import write_adapter_files
from minitune.checkpoints.find_model import ADAPTER, checkpoint_step
from minitune.config.cli import toml_text, with_absolute_paths
from minitune.data.templates.adapter_template import save_template
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM
from minitune.progress import print_message
from minitune.training.checkpoint import save_checkpoint
from minitune.training.optimizer import FlatAdamW
from minitune.training.own_files import (
    CONFIG,
    FACTS,
    METRICS,
    add_outputs,
    checkpoints,
    delete,
)
from minitune.training.run_facts import RunFacts


class RunFiles:
    """The files of one run, in its folder.

    output: the folder.
    metrics: the path of metrics.jsonl.
    saved_step: step of the last checkpoint of this run, or of the one it continues from.
    """

    def __init__(self, output: Path, saved_step: int = 0, save_total_limit: int | None = None):
        self.output, self.metrics, self.saved_step = output, output / METRICS, saved_step
        self._save_total_limit = save_total_limit
        with os_errors_as_value_error(output):
            self._status = output.stat()

    def check_there(self) -> None:
        """Raise ValueError if the folder was deleted, moved or replaced during the run."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._status, self.output.stat()):
                return
        raise ValueError(
            f"{self.output}: the folder of this run is no longer there: it was deleted or moved "
            "during the run, and nothing more can be saved; if it was moved, move it back, and "
            "resume=True continues it; otherwise start again"
        )

    def write_config(self, settings: dict[str, Any]) -> None:
        """Write config.toml, and list it in outputs.json with metrics.jsonl and run.json.

        The paths become absolute, so the file repeats the run from every working directory.

        Raises: ValueError if a file cannot be written.
        """
        add_outputs(self.output, [CONFIG, METRICS, FACTS])
        atomic_write_text(self.output / CONFIG, toml_text(with_absolute_paths(settings)))

    def write_facts(self, facts: RunFacts) -> None:
        """Write run.json; a warning says if it cannot be written, because no step depends on it."""
        try:
            self.check_there()
            text = json.dumps(facts.to_json(), indent=1) + "\n"
            atomic_write_text(self.output / FACTS, text)
        except ValueError as error:
            print_message("warning", f"{error}; the report of this run will lack facts")

    def save(
        self,
        model: CausalLM,
        optimizer: FlatAdamW,
        step: int,
        state: dict[str, Any],
        kept_step: int | None = None,
    ) -> None:
        """Write checkpoint-N, and delete the checkpoints that it makes obsolete.

        These are later checkpoints than the one that the run continues from, left by the run
        before, and the oldest beyond save_total_limit.

        step: optimizer steps done, N.
        state: the content of state.json.
        kept_step: the step of the best checkpoint, which stays, or None.

        Raises: ValueError if the checkpoint cannot be written.
        """
        self.check_there()
        folder = self.output / f"checkpoint-{step}"
        if folder.is_symlink():  # of a run before; its target stays
            folder.unlink()
        save_checkpoint(model, optimizer, state, folder)
        with os_errors_as_value_error(self.output):
            _delete_checkpoints(self.output, after=self.saved_step, except_step=step)
            for old in self._beyond_limit(kept_step):
                delete(old)
        self.saved_step = step

    def _beyond_limit(self, kept_step: int | None) -> list[Path]:
        """Return the oldest checkpoints beyond save_total_limit, except the best one.

        The best checkpoint counts, except if the limit is 1: then the newest stays too.
        """
        limit, saved = self._save_total_limit, checkpoints(self.output)
        if limit is None:
            return []
        newest = saved[-limit:]
        if all(checkpoint_step(folder) != kept_step for folder in newest):
            kept = [folder for folder in saved if checkpoint_step(folder) == kept_step]
            newest = kept + saved[-max(1, limit - len(kept)) :]
        return [folder for folder in saved if folder not in newest]

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint that was saved last, or None if there is none."""
        folder = self.output / f"checkpoint-{self.saved_step}"
        return folder if folder.is_dir() else None

    def finish(self, model: CausalLM, tokenizer: Tokenizer, step: int) -> Path:
        """Write the adapter with its chat template, and return its folder.

        Later checkpoints, left by the run that this one continues, are deleted.

        step: optimizer steps done.

        Raises: ValueError if the adapter cannot be written.
        """
        self.check_there()
        adapter = self.output / ADAPTER
        if step > self.saved_step:
            with os_errors_as_value_error(self.output):
                _delete_checkpoints(self.output, after=self.saved_step)
        add_outputs(self.output, [ADAPTER])
        if adapter.is_symlink():
            adapter.unlink()
        with atomic_folder(adapter) as partial:
            write_adapter_files(model, partial)
            save_template(tokenizer, partial)
        if not tokenizer.template_was_assigned:
            save_template(tokenizer, adapter)  # removes the template of a run before
        return adapter


class NoRunFiles:
    """The files of a run without a folder: there are none."""

    output = metrics = None
    saved_step = 0

    def check_there(self) -> None:
        """Do nothing: no folder can be missing."""

    def write_config(self, settings: dict[str, Any]) -> None:
        """Do nothing: the settings are not written."""

    def save(self, *arguments: Any) -> None:
        """Raise ValueError: a checkpoint needs a folder."""
        raise ValueError(
            "a callback set should_save, but without output_dir and with save_strategy 'no' the "
            "run has no folder; name output_dir"
        )

    def last_checkpoint(self) -> None:
        """Return None: there is no checkpoint."""

    def finish(self, model: CausalLM, tokenizer: Tokenizer, step: int) -> None:
        """Return None: the adapter is in the model only."""


def _delete_checkpoints(output: Path, after: int, except_step: int | None = None) -> None:
    """Delete checkpoints of steps later than `after`, except `except_step`.

    A run that is resumed from an earlier step writes its own later checkpoints.
    """
    for folder in checkpoints(output):
        step = checkpoint_step(folder)
        if step > after and step != except_step:
            delete(folder)

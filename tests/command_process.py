"""A command in a process of its own, forked after the imports, to which something happens."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path

from command_inputs import train, train_arguments, write_inputs

from minitune import SFTTrainer

SAVING = ("--max-steps", "4", "--save-steps", "2", "--r", "2")
DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class Place:
    """The files of one fault: a model, data, and the run folder of the command."""

    def __init__(self, folder: Path):
        self.folder, self.inputs, self.output = folder, folder / "inputs", folder / "run"
        self.inputs.mkdir()
        write_inputs(self.inputs)

    def train(self, *more: str, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """Run the train command; return its exit code and the last line of stderr.

        before: called in the process of the command.
        """
        arguments = train_arguments(self.inputs, self.output, *SAVING, *more)
        return self.command(lambda: train(arguments), before)

    def command(self, run: Callable[[], int], before: Callable[[], None]) -> tuple[int, str]:
        """Run a command in a forked process, as `train` does."""
        log = self.folder / "log"
        process = os.fork()
        if not process:
            _be_command(run, before, log)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        lines = log.read_text().splitlines()
        shown = next((line for line in lines if line.startswith("interrupted")), "")
        return code, shown or (lines[-1] if lines else "")

    def at_step(self, step: int, act: Callable[[], None]) -> Callable[[], None]:
        """Return a function that lets a run call `act` while `step` steps are done."""

        def patch() -> None:
            accumulate = SFTTrainer.accumulate

            def acting(trainer, samples):
                if trainer.progress.step == step:
                    act()
                return accumulate(trainer, samples)

            SFTTrainer.accumulate = acting

        return patch


def _be_command(run: Callable[[], int], before: Callable[[], None], log: Path) -> None:
    """Run a command with stderr in a file, and end the process."""
    code = 99
    try:
        for number, handler in DEFAULT_HANDLERS.items():
            signal.signal(number, handler)
        os.environ["COLUMNS"] = "1000"
        sys.stdout, sys.stderr = io.StringIO(), log.open("w", buffering=1)
        before()
        code = run()
        util._exit_function()  # what a process does at its end: temporary folders are removed
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

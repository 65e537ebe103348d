"""The entry point `minitune COMMAND ...`, also `python -m minitune.commands COMMAND ...`."""

import sys
from collections.abc import Sequence

from minitune.commands import data, doctor, export, generate, plan, report, train
from minitune.config.cli import run_command, suggestion
from minitune.progress import wrapped
from minitune.training.versions import versions

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (train, generate, export, plan, data, report, doctor)
}
# The usual order of the work, in commands that can be typed.
FIRST_STEPS = """\
minitune plan --model llama-3-8b            memory and time, without weights
minitune data show --model DIR --data FILE  the tokens that are trained on
minitune doctor --model DIR                 checks this machine with the model
minitune train --model DIR --data FILE      writes runs/1, shows the next step
minitune report runs/1                      the run as a page with its curves
minitune COMMAND --help                     all flags of a command
minitune --version                          versions to name in a report"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help"]
    return run_command("minitune", _dispatch, *(arguments or ["help"]))


def _dispatch(name: str, *arguments: str) -> int:
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version", "version"):
        print(versions())
        return 0
    if name.startswith("-"):
        raise ValueError(f"{name} stands before the command; minitune COMMAND {name} ...")
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; {suggestion(name, COMMANDS)}")
    return COMMANDS[name].main(arguments)


def usage() -> str:
    """Return the list of commands, each with the first line of its module's docstring."""
    purposes = {name: module.__doc__.partition("\n")[0] for name, module in COMMANDS.items()}
    rows = [wrapped(text, 12, f"  {name:<10}") for name, text in purposes.items()]
    steps = [f"  {line}" for line in FIRST_STEPS.splitlines()]
    return "\n".join(["usage: minitune COMMAND ...", "", *rows, "", "First steps:", *steps])


if __name__ == "__main__":
    sys.exit(main())

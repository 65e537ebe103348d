"""The entry point `minitune COMMAND ...`, also `python -m minitune.commands COMMAND ...`."""

import sys
from collections.abc import Sequence

from minitune.commands import data, export, generate, plan, train
from minitune.config.cli import run_command, suggestion

COMMANDS = {
    module.__name__.rpartition(".")[2]: module for module in (train, generate, export, plan, data)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    return run_command("minitune", _dispatch, *arguments)


def _dispatch(name: str, *arguments: str) -> int:
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; {suggestion(name, COMMANDS)}")
    return COMMANDS[name].main(arguments)


def usage() -> str:
    """Return the list of commands, each with the first line of its module's docstring."""
    purposes = {name: module.__doc__.partition("\n")[0] for name, module in COMMANDS.items()}
    rows = [f"  {name:<10}{purpose}" for name, purpose in purposes.items()]
    return "\n".join(
        ["usage: minitune COMMAND ...", "", *rows, "", "minitune COMMAND --help lists its flags."]
    )


if __name__ == "__main__":
    sys.exit(main())

"""Write a run's curves, plan, data, samples and settings, or two runs side by side, as a page.

    minitune report runs/1                        writes runs/1/report.html
    minitune report runs/1 runs/2                 compares two runs, in the same file
    minitune report runs/1 --output page.html     writes another file

The page is one HTML file that needs no network. A run may be going on, or stopped: the page shows
the run so far. Only a report is replaced. `minitune train --report` writes the page at the end of a
run.
"""

import argparse
import sys
from collections.abc import Sequence

from minitune.config.cli import CommandParser, run_command
from minitune.report.write_report import write_report

DESCRIPTION = "Write the report of a run, or of two runs side by side, as one HTML page."


def main(argv: Sequence[str] | None = None, program: str = "minitune report") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    arguments = _parser(program).parse_args(argv)
    if arguments.run is None:
        raise ValueError(f"RUN is missing: {program} runs/1, or two runs to compare them")
    print(write_report(arguments.run, arguments.other, arguments.output))


def _parser(program: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog=program, description=DESCRIPTION)
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of the run, such as runs/1")
    parser.add_argument("other", metavar="RUN2", nargs="?", help="folder of a run to compare with")
    parser.add_argument("--output", metavar="FILE", help="the page (default: RUN/report.html)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

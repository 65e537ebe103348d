"""Write a run's curves, plan, data, samples and settings, or two runs side by side, as a page.

    minitune report runs/1                        writes runs/1/report.html
    minitune report runs/1 runs/2                 compares them: runs/1/report-with-2.html
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
from minitune.streams import printable

DESCRIPTION = "Write the report of a run, or of two runs side by side, as one HTML page."


def main(argv: Sequence[str] | None = None, program: str = "minitune report") -> int:
    """Run the command and return its exit code."""
    return run_command(program, _run, argv, program)


def _run(argv: Sequence[str] | None, program: str) -> None:
    arguments = _parser(program).parse_args(argv)
    if arguments.force:
        raise ValueError("--force, --overwrite: a report is replaced anyway; leave it out")
    if not arguments.runs:
        raise ValueError(f"RUN is missing: {program} runs/1, or two runs to compare them")
    if len(arguments.runs) > 2:
        raise ValueError(
            f"{len(arguments.runs)} runs are given; expected one run, or two to compare"
        )
    path = write_report(*arguments.runs, path=arguments.output)
    print(printable(str(path), sys.stdout))


def _parser(program: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog=program, description=DESCRIPTION)
    runs = "folder of the run, such as runs/1; two are compared"
    parser.add_argument("runs", metavar="RUN", nargs="*", help=runs)
    parser.add_argument("--force", "--overwrite", action="store_true", help=argparse.SUPPRESS)
    page = "the page (default: RUN/report.html, or RUN/report-with-RUN2.html)"
    parser.add_argument("--output", metavar="FILE", help=page)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The report of one or two runs as a file in the folder of the (first) run.

report.html            of one run
report-with-2.html     of the run and another, whose folder is named 2
"""

import time
from pathlib import Path

from minitune.atomic_files import atomic_write_text
from minitune.report.html_report import html_report
from minitune.report.run_record import read_run
from minitune.training.own_files import REPORT, comparison_name, is_report
from minitune.training.run_facts import time_text

SUFFIXES = (".html", ".htm")


def write_report(
    run: str | Path, other: str | Path | None = None, path: str | Path | None = None
) -> Path:
    """Write the report of a run as one HTML page that needs no network, and return its path.

    A run may be unfinished, and of an older version: the page says what is missing.

    run: the folder of the run, such as trainer.output.
    other: the folder of a second run, which is shown beside the first one.
    path: the file; default: report.html in the folder of the run, or report-with-NAME.html if a
        second run is given. A report that is there is replaced, and nothing else.

    Raises: ValueError if a folder holds no run, both are one, or the file cannot be written.
    """
    if run is None:
        raise ValueError("run is None: a run without a folder leaves no record; set output_dir")
    name = REPORT if other is None else comparison_name(Path(other))
    target = Path(run) / name if path is None else Path(path)
    check_report_path(target)
    records = [read_run(folder) for folder in (run, other) if folder is not None]
    if other is not None and Path(run).samefile(other):
        raise ValueError(f"{other} is the first run itself; name another run to compare with")
    atomic_write_text(target, html_report(records, time_text(time.time())))
    return target


def check_report_path(path: Path) -> None:
    """Check that a report may be written to a path.

    Raises: ValueError if the name is not that of a page, or something else than a report is there.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"report {path}: expected a file name that ends in .html")
    if (path.exists() or path.is_symlink()) and not is_report(path):
        raise ValueError(f"{path} exists and is no report, so it is not replaced; choose another")

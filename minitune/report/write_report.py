"""The report of one or two runs as a file: report.html in the folder of the run."""

from pathlib import Path

from minitune.atomic_files import atomic_write_text
from minitune.report.html_report import html_report
from minitune.report.run_record import read_run
from minitune.training.own_files import REPORT, is_report

SUFFIXES = (".html", ".htm")


def write_report(
    run: str | Path, other: str | Path | None = None, path: str | Path | None = None
) -> Path:
    """Write the report of a run as one HTML page that needs no network, and return its path.

    A run may be unfinished, and of an older version: the page says what is missing.

    run: the folder of the run, such as trainer.output.
    other: the folder of a second run, which is shown beside the first one.
    path: the file; default: report.html in the folder of the run. A report that is there is
        replaced, and nothing else.

    Raises: ValueError if a folder holds no run, or the file cannot be written.
    """
    if run is None:
        raise ValueError("run is None: a run without a folder leaves no record; set output_dir")
    target = Path(run) / REPORT if path is None else Path(path)
    check_report_path(target)
    records = [read_run(folder) for folder in (run, other) if folder is not None]
    atomic_write_text(target, html_report(records))
    return target


def check_report_path(path: Path) -> None:
    """Check that a report may be written to a path.

    Raises: ValueError if the name is not that of a page, or something else than a report is there.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"report {path}: expected a file name that ends in .html")
    if (path.exists() or path.is_symlink()) and not is_report(path):
        raise ValueError(f"{path} exists and is no report, so it is not replaced; choose another")

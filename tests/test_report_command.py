"""`minitune report` and `train --report` write a page of a run, and replace nothing but reports."""

import io
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from command_inputs import train, train_arguments, write_inputs
from training_runs import make_smallest_model, new_trainer

import minitune
from minitune.commands.__main__ import main
from minitune.training.own_files import REPORT_MARK, existing_outputs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_smallest_model(folder / "model")
    new_trainer(model, folder / "first", max_steps=2, logging_steps=1).train()
    return folder / "first"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """Change to a folder with a copy of the run, and return its name."""
    shutil.copytree(finished, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    return Path("first")


def error_of(capsys, *arguments) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1
    return error


# ---- minitune report


def test_the_report_of_a_run_is_a_page_in_its_folder_whose_path_is_printed(run, capsys):
    for _ in range(2):  # a report is replaced
        assert main(["report", str(run)]) == 0
        assert capsys.readouterr() == ("first/report.html\n", "")
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>") and REPORT_MARK in page and "first" in page


def test_two_runs_are_compared_in_the_folder_of_the_first_or_in_another_file(run, capsys):
    shutil.copytree(run, "second")
    assert main(["report", "first", "second", "--output", "both.html"]) == 0
    assert main(["report", "first", "second"]) == 0
    assert main(["report", "first"]) == 0
    names = ["both.html", "first/report-with-second.html", "first/report.html"]
    assert capsys.readouterr().out.splitlines() == names
    for path in names[:2]:
        assert "second" in Path(path).read_text()
    assert "second" not in Path(names[2]).read_text()
    assert not list(Path("second").glob("report*"))


def test_a_run_is_not_compared_with_itself(run, capsys):
    text = "is the first run itself; name another run to compare with"
    for other in ("first", "first/", Path("first").resolve(), "first/../first"):
        assert f"{other} {text}" in error_of(capsys, "first", other)
    assert not list(run.glob("report*"))


def test_a_long_name_of_the_other_run_is_cut_in_the_name_of_the_page(run):
    shutil.copytree(run, 60 * "日")
    page = minitune.write_report(run, 60 * "日")
    assert page.name == f"report-with-{50 * '日'}.html" and page.name in existing_outputs(run)


def test_a_path_that_the_terminal_cannot_show_is_printed_with_escapes(run, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["report", "first", "--output", "ö.html"]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xf6.html\n"
    assert Path("ö.html").exists()


def test_a_file_that_is_no_report_stays(run, capsys):
    Path("mine.html").write_text("<!doctype html>mine")
    Path("link.html").symlink_to("nowhere")
    Path("folder.html").mkdir()
    for name in ("mine.html", "link.html", "folder.html"):
        assert f"{name} exists and is no report" in error_of(capsys, run, "--output", name)
    assert Path("mine.html").read_text() == "<!doctype html>mine"
    (run / "report.html").write_text("mine")
    assert "first/report.html exists and is no report" in error_of(capsys, run)


def test_wrong_arguments_are_refused_by_name(run, capsys):
    assert "RUN is missing: minitune report runs/1" in error_of(capsys)
    assert "absent: not found; name the folder of a run" in error_of(capsys, "absent")
    assert "absent: not found" in error_of(capsys, run, "absent")
    assert "page.txt: expected a file name that ends in .html" in error_of(
        capsys, run, "--output", "page.txt"
    )
    below_a_file = run / "config.toml" / "page.html"
    assert f"{below_a_file}: its folder could not be made" in error_of(
        capsys, run, "--output", below_a_file
    )
    assert "use --output" in error_of(capsys, run, "--output-dir", "x")
    assert "3 runs are given; expected one run, or two to compare" in error_of(
        capsys, run, run, "third"
    )
    for flag in ("--force", "--overwrite"):
        assert "a report is replaced anyway; leave it out" in error_of(capsys, run, flag)
    assert not (run / "report.html").exists()


def test_the_python_function_writes_the_same_page(run, tmp_path):
    assert minitune.write_report(run) == run / "report.html"
    other = minitune.write_report(str(run), path=tmp_path / "page.html")
    pages = [
        path.read_text().partition("This page was written") for path in (other, run / "report.html")
    ]
    assert pages[0][:2] == pages[1][:2] and pages[0][1]
    shutil.copytree(run, "second")
    both = minitune.write_report(run, "second", "both.html")
    assert "second" in both.read_text()
    with pytest.raises(
        ValueError, match=r"report=True .*minitune\.write_report\(trainer\.output\)"
    ):
        minitune.SFTConfig(report=True)
    with pytest.raises(ValueError, match=r"run is None.*set output_dir"):
        minitune.write_report(None)


# ---- the report as a file of the run


def test_a_run_that_replaces_another_deletes_its_report_and_no_other_page(finished, run):
    minitune.write_report(run)
    shutil.copytree(run, "second")
    minitune.write_report(run, "second")
    assert existing_outputs(run)[-2:] == ["report-with-second.html", "report.html"]
    Path(run, "report-with-mine.html").write_text("mine")
    shutil.copy(run / "report.html", run / "reports.html")
    Path(run, "mine.html").write_text("mine")
    model = finished.parent / "model"
    with pytest.raises(ValueError, match="already holds a run"):
        new_trainer(model, run, max_steps=1).train()
    new_trainer(model, run, max_steps=1, overwrite=True).train()
    pages = sorted(path.name for path in run.glob("*.html"))
    assert pages == ["mine.html", "report-with-mine.html", "reports.html"]
    (run / "report.html").write_text("mine")
    new_trainer(model, run, max_steps=1, overwrite=True).train()
    assert (run / "report.html").read_text() == "mine"


def test_a_folder_with_nothing_but_a_report_holds_no_run(finished, run):
    Path("reports").mkdir()
    minitune.write_report(run, path="reports/report.html")
    assert existing_outputs("reports") == []
    new_trainer(finished.parent / "model", Path("reports"), max_steps=1).train()
    assert Path("reports/report.html").exists()


# ---- train --report


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and datasets."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_training_writes_the_report_at_its_end_if_asked_to(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(train_arguments(inputs, output)) == 0
    error = capsys.readouterr().err
    command = next(line for line in error.splitlines() if "report.py" in line)
    assert shlex.split(command)[-1] == str(output)
    assert not (output / "report.html").exists()

    assert train(train_arguments(inputs, output, "--overwrite", "--report")) == 0
    error = capsys.readouterr().err
    assert f"saved      {output}/report.html" in error
    assert "report.py" not in error
    assert REPORT_MARK in (output / "report.html").read_text()
    assert "report = true" in (output / "config.toml").read_text()


def test_training_does_not_begin_if_its_report_could_not_be_written(inputs, tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert train(train_arguments(inputs, tmp_path, "--report")) == 2
    assert "report.html exists and is no report" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_script_of_a_checkout_is_the_command(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "first"])
    code = compile((ROOT / "scripts" / "report.py").read_text(), "report.py", "exec")
    with pytest.raises(SystemExit) as end:
        exec(code, {"__name__": "__main__", "__file__": str(ROOT / "scripts" / "report.py")})
    assert end.value.code == 0 and capsys.readouterr().out == "first/report.html\n"

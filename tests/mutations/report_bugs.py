"""Bugs of the report: what is read from a run folder, and which files it may replace."""

from mutations.mutation import Mutation

REPORT_BUGS = [
    Mutation(
        "a report replaces a file that is none",
        "minitune/report/write_report.py",
        "(path.exists() or path.is_symlink()) and not is_report(path)",
        "False",
        ("test_report_command.py::test_a_file_that_is_no_report_stays",),
    ),
    Mutation(
        "a folder with a report counts as a run's",
        "minitune/training/own_files.py",
        "_reports(output))] if found else found",
        "_reports(output))]",
        ("test_report_command.py::test_a_folder_with_nothing_but_a_report_holds_no_run",),
    ),
    Mutation(
        "a run that is resumed still counts as finished",
        "minitune/report/run_record.py",
        "is_finished = bool(facts.end)",
        "is_finished = (folder / ADAPTER).is_dir()",
        ("test_run_record.py::test_a_resumed_run_takes_back_that_the_run_was_finished",),
    ),
    Mutation(
        "numbers that are not finite reach the page",
        "minitune/report/run_record.py",
        "{name: value for name, value in record.items() if VALUES.hold(value)}",
        "dict(record)",
        ("test_run_record.py::test_values_that_are_no_finite_numbers_are_left_out_and_named[NaN]",),
    ),
    Mutation(
        "the facts of a run are written at its begin only",
        "minitune/training/trainer.py",
        "self._update_facts(end=",
        "dict(end=",
        ("test_run_record.py::test_a_finished_run_is_read_whole",),
    ),
    Mutation(
        "the histogram leaves out the longest samples",
        "minitune/data/inspector/dataset_summary.py",
        "longest // width + 2) * width",
        "longest // width + 1) * width",
        ("test_dataset_summary.py::test_the_histogram_holds_every_sample_once",),
    ),
    Mutation(
        "answers of an earlier step count as those after the training",
        "minitune/report/samples.py",
        "run.is_finished and answer.step == run.steps_done",
        "run.is_finished",
        ("test_html_report.py::test_an_unfinished_run_says_so_and_lists_its_notes",),
    ),
    Mutation(
        "an axis of rounding errors",
        "minitune/report/axes.py",
        "high - low <= 1e-9 * max(abs(low), abs(high))",
        "high == low",
        ("test_report_curves.py::test_axes_have_round_numbers",),
    ),
    Mutation(
        "settings of files stand before those of the training",
        "minitune/report/html_report.py",
        'rows.sort(key=lambda row: (row.label == "output_dir", _is_of_files(row.label)))',
        "pass",
        (
            "test_html_report_two_runs.py"
            "::test_settings_of_files_and_logging_follow_those_of_the_training",
        ),
    ),
    Mutation(
        "the time of a step counts evaluations",
        "minitune/report/overview.py",
        "a_step = training / steps",
        "a_step = run.seconds / steps",
        ("test_html_report.py::test_the_time_of_a_step_is_that_of_the_training_alone",),
    ),
]

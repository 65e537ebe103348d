"""The HTML page of two runs: their differences, side by side."""

import re
from dataclasses import replace

from example_runs import PROMPTS, example_run
from html_pages import chart_of, curves_of, words_in, words_of

from minitune.report.html_report import html_report
from minitune.training.run_facts import DataRecord


def two_runs():
    first = example_run()
    second = example_run("runs/second", steps=20, rate=4e-4, is_finished=False, total_steps=40)
    return first, second


def test_two_runs_show_their_different_settings_first():
    source = html_report(two_runs())
    different = source.partition("<h2>Different settings</h2>")[2].partition("<h2>")[0]
    rows = "learning_rate 0.0002 0.0004 output_dir runs/letters runs/second"
    assert words_in(different).strip() == f"letters second {rows}"
    equal = source.partition("<h2>Equal settings</h2>")[2].partition("</body>")[0]
    assert "model models/base" in words_in(equal) and "learning" not in words_in(equal)
    assert source.index("Different settings") < source.index("<h2>Curves</h2>")


def test_two_runs_with_equal_settings_say_so():
    words = words_of(example_run("a"), example_run("b"))
    assert "None: all settings are equal." in words


def test_two_runs_share_the_charts_in_two_colours_and_strokes():
    chart = chart_of(html_report(two_runs()), "Learning rate")
    (steps, _, points), (other_steps, _, other_points) = curves_of(chart)
    assert steps[-1] == 40 and points[-1][0] == 1000
    assert other_steps[-1] == 20 and other_points[-1][0] == 500
    assert re.findall(r'<path class="(run-.)"', chart) == ["run-1", "run-2"]
    assert "letters" in chart and "second" in chart


def test_two_runs_show_both_numbers_and_their_difference():
    first = example_run("a", training=[{"step": 1, "loss": 2.0}])
    second = example_run("b", training=[{"step": 1, "loss": 1.0}])
    words = words_of(first, second)
    assert "Training loss 2.0000 at step 1 1.0000 −1.0000 at step 1 Evaluation" in words
    assert "1.0000 at step 1 2.0000 +1.0000 at step 1 Evaluation" in words_of(second, first)
    assert "2.0000 equal" in words_of(first, replace(first, name="b"))


def run_of_losses(name, losses, evaluations):
    """Return a run with a loss at each step, and a dict of evaluation losses by step."""
    return example_run(
        name,
        training=[{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)],
        evaluations=[{"step": step, "eval_loss": loss} for step, loss in evaluations.items()],
    )


def test_runs_of_unequal_length_are_compared_at_their_last_common_step_too():
    first = run_of_losses("a", [4.0, 3.0], {1: 3.5, 2: 3.0})
    second = run_of_losses("b", [3.75, 3.25, 2.0, 1.0], {2: 2.5, 4: 0.75})
    words = words_of(first, second)
    training = "1.0000 −2.0000 at step 4 at step 2, in both: 3.0000 and 3.2500, +0.2500"
    evaluation = "0.7500 −2.2500 at step 4, the best at step 2, in both: 3.0000 and 2.5000, −0.5000"
    assert training in words and evaluation in words
    assert "in both" not in words_of(first, replace(first, name="b"))
    for evaluations in ([], [{"step": 0, "eval_loss": 2.0}]):
        without = replace(second, training=[{"step": 7, "loss": 1.0}], evaluations=evaluations)
        assert "in both" not in words_of(run_of_losses("a", [4.0], {0: 2.0, 9: 1.0}), without)


def test_runs_of_unequal_length_are_smoothed_up_to_the_common_step():
    short, long = example_run("a", steps=200), example_run("b", steps=400)
    words = words_of(short, long)
    found = re.search(r"at step 200, in both: (\S+) and (\S+), ", words)
    until = replace(long, training=long.training[:200])
    assert f"Training loss {found[1]} at step 200, smoothed" in words_of(short)
    assert f"Training loss {found[2]} at step 200, smoothed" in words_of(until)


def test_the_models_of_two_runs_have_the_marks_of_their_runs():
    first, second = example_run("a"), example_run("b", facts=[("model", "other: 1 M parameters")])
    marks = re.findall(
        r'class="quiet model">(<svg.*?class="(run-.)")?', html_report([first, second])
    )
    assert [style for _, style in marks] == ["run-1", "run-2"]
    same = html_report([first, replace(first, name="b")])
    assert re.findall(r'class="quiet model">(.)', same) == ["b"]


def test_settings_of_files_and_logging_follow_those_of_the_training():
    names = ("output_dir", "logging_steps", "save_steps", "r", "eval_data", "data", "merge")
    first = example_run("a", settings=dict.fromkeys(names, 1))
    second = example_run("b", settings=dict.fromkeys(names, 2))
    words = words_of(first, second)
    order = "r 1 2 data 1 2 logging_steps 1 2 save_steps 1 2 eval_data 1 2 merge 1 2 output_dir 1 2"
    assert f"Different settings a b {order}" in words


def test_answers_of_two_runs_are_paired_in_their_order():
    words = words_of(*two_runs())
    prompt = PROMPTS[0]
    assert f"Before both: 0 to {prompt}" in words
    assert (
        "Sample answers Answers during the training stand side by side at about equal shares"
        in words
    )
    assert f"During step 10 10 to {prompt} step 5 5 to {prompt}" in words


def test_answers_during_runs_of_unequal_length_are_paired_by_their_share():
    def run(name, steps):
        return example_run(
            name,
            steps=steps[-1],
            samples=[
                {"step": step, "samples": [{"prompt": "p", "answer": f"of {name}{step}"}]}
                for step in steps
            ],
        )

    words = words_of(run("a", range(10, 80, 10)), run("b", [10, 20, 30]))
    rows = re.findall(r"step (\d+) of a\d+ step (\d+) of b\d+", words)
    assert rows == [("20", "10"), ("50", "20"), ("70", "30")]
    assert "Left out: 4 more answers" in words
    assert "equal shares" not in words_of(run("a", [10, 20, 30]), run("b", [10, 20, 30]))


def test_answers_of_two_runs_end_with_their_last_ones():
    words = words_of(*two_runs())
    prompt = PROMPTS[0]
    assert f"Last step 40 40 to {prompt} step 20 20 to {prompt}" in words


def test_facts_that_differ_stand_before_those_that_agree():
    first = example_run("a", facts=[("model", "m"), ("note", "x"), ("note", "y"), ("r", "1")])
    second = example_run("b", facts=[("model", "m"), ("note", "x"), ("note", "z")])
    assert "Run a b note y z r 1 – model m note x" in words_of(first, second)


def test_data_that_both_runs_have_is_shown_once():
    first, second = example_run("a"), example_run("b")
    assert words_of(first, second).count("records 135") == 1
    other = replace(second, data=[DataRecord("data", [("records", "7")])])
    words = words_of(first, other)
    assert "records 135" in words and "records 7" in words


def test_runs_of_one_folder_name_keep_their_whole_names():
    words = words_of(example_run("a/run"), example_run("b/run"))
    assert "a/run, evaluation" in words and "b/run, evaluation" in words

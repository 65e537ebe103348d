"""The HTML page of one run: its numbers, its curves and its texts."""

import re
from dataclasses import replace

import pytest
from example_runs import PROMPTS, example_run, training_records
from html_pages import chart_of, curves_of, words_in, words_of

from minitune.report.html_report import html_report
from minitune.report.run_record import RunRecord


def test_the_top_names_the_state_and_the_main_numbers():
    run = example_run(training=training_records(40, noise=0))
    words = words_of(run)
    last = run.training[-1]["loss"]
    for text in (
        "runs/letters finished base: 8,030.3 M parameters",
        "Steps 40 of 40 100%, 3 epochs",
        f"Training loss {last:.4f} at step 40 ",
        f"Evaluation loss {run.evaluations[-1]['eval_loss']:.4f} at step 40, the best",
        "Time of a step 118 ms 4.7 s in all Speed",
        "tokens/s, median; 73,200 tokens in all",
        "Peak memory 14.80 GiB planned 14.90 GiB",
    ):
        assert text in words


def test_the_best_evaluation_stands_before_the_last_one():
    run = example_run(
        evaluations=[{"step": 1, "eval_loss": 0.25}, {"step": 2, "eval_loss": 0.3}],
    )
    text = "Evaluation loss 0.2500 at step 1, the best; 0.3000 at step 2, the last"
    assert text in words_of(run)


def test_the_training_loss_is_the_smoothed_one_of_the_chart():
    source = html_report([example_run(steps=300)])
    last = curves_of(chart_of(source, "Loss"))[0][1][-1]
    assert f"Training loss {last} at step 300, smoothed" in words_in(source)
    assert last != f"{training_records(300)[-1]['loss']:.4f}"


def timed_run(name, rate, seconds):
    """Return a run of 8 steps of 100 tokens each, in parts of 4 steps.

    rate: tokens a second of both parts.
    seconds: of the run, with everything else.
    """
    records = [
        {"step": 4, "loss": 1.0, "tokens": 400, "tokens_per_second": rate, "seconds": seconds / 2},
        {"step": 8, "loss": 1.0, "tokens": 800, "tokens_per_second": rate, "seconds": seconds},
    ]
    return example_run(name, steps=8, training=records, seconds=seconds)


def test_the_time_of_a_step_is_that_of_the_training_alone():
    slow, fast = timed_run("plain", 40.0, 20.5), timed_run("with answers", 50.0, 90.0)
    words = words_of(slow, fast)
    assert "Time of a step 2.5 s 20 s in all" not in words  # 0.5 s of 20.5 are worth a word
    assert "Time of a step 2.5 s 0:20 in all, of it 0.5 s evaluations" in words
    rest = "1:30 in all, of it 1:14 evaluations, answers and checkpoints"
    assert f"2 s −20.0% {rest}" in words


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokens_per_second": 0}, "Time of a step – 0:20 in all"),
        ({"tokens": 399}, "Time of a step – 0:20 in all"),
        ({"step": 0}, "Time of a step – 0:20 in all"),
    ],
)
def test_records_that_tell_no_speed_leave_the_time_of_a_step_open(changes, text):
    run = timed_run("run", 50.0, 20.0)
    broken = replace(run, training=[run.training[0], run.training[1] | changes])
    assert text in words_of(broken)
    without = [{k: v for k, v in record.items() if k != "tokens"} for record in run.training]
    assert text in words_of(replace(run, training=without))


def test_a_value_that_is_no_number_breaks_the_line():
    records = [{"step": step, "loss": 1.0 + step, "grad_norm": 1.0} for step in (1, 2, 4, 5)]
    run = example_run(training=records, evaluations=[], gaps={"loss": [3]})
    source = html_report([run])
    path = re.search(r'd="(M.*?)" data-steps', chart_of(source, "Loss"))[1]
    assert re.sub(r"[\d. ]", "", path) == "MLML"
    path = re.search(r'd="(M.*?)" data-steps', chart_of(source, "Gradient norm"))[1]
    assert re.sub(r"[\d. ]", "", path) == "MLLL"


def test_the_page_names_its_time():
    source = html_report([example_run()], "2026-11-26 09:30 +0100")
    assert "This page was written 2026-11-26 09:30 +0100." in words_in(source)
    assert "was written" not in words_of(example_run())


def test_an_unfinished_run_says_so_and_lists_its_notes():
    run = example_run(steps_done=40, total_steps=160, is_finished=False, notes=["line 3 is broken"])
    words = words_of(run)
    assert "not finished" in words and "40 of 160 25%" in words and "line 3 is broken" in words
    assert "Last step 40" in words and "After step 40" not in words
    early = words_of(example_run(steps_done=40, total_steps=160))
    assert "40 of 160 ended early" in early and "After step 40" in early
    # the last answers of a finished run may be those of an earlier step
    later = words_of(example_run(steps_done=45, total_steps=45))
    assert "Last step 40" in later and "After" not in later


def test_a_run_without_any_record_still_gives_a_page():
    words = words_of(RunRecord("runs/1", 0, None, False, notes=["no step is recorded"]))
    assert "runs/1 not finished" in words and "no step is recorded" in words
    assert "Steps 0 Training loss – no record" in words and "Curves" not in words


@pytest.mark.parametrize("count", [0, 3])
def test_a_report_is_of_one_run_or_two(count):
    with pytest.raises(ValueError, match=f"a report of {count} runs; expected one run, or two"):
        html_report([example_run()] * count)


def test_curves_hold_the_values_at_their_places():
    run = example_run(training=[{"step": s, "loss": v} for s, v in ((0, 4.0), (5, 1.0), (10, 2.0))])
    training, evaluation = curves_of(chart_of(html_report([replace(run, steps_done=10)]), "Loss"))
    assert training[:2] == ([0, 5, 10], ["4.0000", "1.0000", "2.0000"])
    # the axes end at 0 and 4, and at steps 0 and 40
    assert training[2] == [(0, 0), (125, 750), (250, 500)]
    assert evaluation[1][-1] == "0.7002 at step 40"


def test_charts_without_values_are_left_out():
    source = html_report([example_run()])
    assert "<b>Loss scale</b>" not in source and "<b>Gradient norm</b>" in source
    scaled = [record | {"loss_scale": 1024.0} for record in training_records(9)]
    chart = chart_of(html_report([example_run(training=scaled)]), "Loss scale")
    assert curves_of(chart)[0][1] == ["1,024"] * 9


def test_units_are_those_that_people_read():
    source = html_report([example_run()])
    assert curves_of(chart_of(source, "Peak memory"))[0][1][-1] == "14.80"
    assert ">5e-5</text>" in chart_of(source, "Learning rate")
    assert "GiB" in chart_of(source, "Peak memory") and "tokens/s" in chart_of(source, "Speed")


def test_a_long_noisy_loss_is_smoothed_over_its_faint_values():
    chart = chart_of(html_report([example_run(steps=300)]), "Loss")
    assert "Bold: mean of 17 records; faint: each record" in chart
    assert chart.count('class="faint run-1"') == 1
    assert "Bold" not in chart_of(html_report([example_run(steps=40)]), "Loss")


def test_the_sections_show_data_plan_facts_and_settings():
    words = words_of(example_run())
    for text in (
        "records 135",
        "48 - 63 101",
        "2 answers are empty",
        "weights 5.31 GiB",
        "versions torch 2.11.0",
        "learning_rate 0.0002",
    ):
        assert text in words


def test_settings_are_written_as_people_read_them():
    values = {"modules": ["q_proj", "k_proj"], "texts": ["a, b", "c"], "none": [], "on": True}
    words = words_of(example_run(settings=values))
    assert "modules q_proj, k_proj" in words and 'texts ["a, b", "c"]' in words
    assert "none []" in words and "on true" in words


def test_answers_stand_below_their_prompt_from_before_to_after():
    words = words_of(example_run())
    prompt = PROMPTS[0]
    rows = " ".join(f"Step {step} {step} to {prompt}" for step in (10, 20, 30))
    assert f"{prompt} Before 0 to {prompt} {rows} After step 40 40 to {prompt}" in words


def test_of_many_answers_the_page_shows_some_and_counts_the_others():
    samples = [
        {"step": step, "samples": [{"prompt": "p", "answer": f"answer {step}."}]}
        for step in range(101)
    ]
    words = words_of(example_run(steps=100, samples=samples))
    assert "answer 0." in words and "answer 100." in words
    assert words.count("answer ") == 6 and "Left out: 95 more answers during training" in words


def test_prompts_beyond_the_first_ones_are_folded():
    source = html_report([example_run(prompts=[f"prompt {i}" for i in range(7)])])
    shown, _, folded = source.partition("<details><summary>2 more prompts</summary>")
    assert "prompt 4<" in shown and "prompt 5<" not in shown and "prompt 6<" in folded

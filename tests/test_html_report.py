"""The HTML page of the report: its numbers, its curves, its texts and its size."""

import base64
import hashlib
import math
import re
from dataclasses import replace

import pytest
from example_runs import PROMPTS, example_run, training_records
from html_pages import Page
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.report.html_report import html_report
from minitune.report.run_record import RunRecord
from minitune.training.own_files import REPORT_MARK
from minitune.training.run_facts import DataRecord

HOSTILE = "</pre><script>alert('x')</script>\x1b]0;owned\x07\u202e\udc80 & <img src=https://evil/x>"
SHOWN_HOSTILE = HOSTILE.replace("\x1b", "<U+001B>").replace("\x07", "<U+0007>")
SHOWN_HOSTILE = SHOWN_HOSTILE.replace("\u202e", "<U+202E>").replace("\udc80", "<U+DC80>")


def words_of(*runs):
    """Return the texts of a report as one line."""
    return words_in(html_report(runs))


def words_in(source):
    """Return the texts of a markup as one line."""
    return re.sub(r"\s+", " ", " ".join(Page(source.replace("<wbr>", "")).texts))


def chart_of(source, title):
    """Return the markup of a chart."""
    charts = re.findall(r'<figure class="card chart.*?</figure>', source, re.DOTALL)
    return next(chart for chart in charts if f"<b>{title}</b>" in chart)


def curves_of(chart):
    """Return (steps, values, points) of each curve of a chart."""
    found = re.findall(r'd="M(.*?)" data-steps="(.*?)" data-values="(.*?)"', chart)
    return [
        (
            [float(step) for step in steps.split()],
            values.split(";"),
            [tuple(map(float, point.split())) for point in points.split("L")],
        )
        for points, steps, values in found
    ]


# ---- one run


def test_the_top_names_the_state_and_the_main_numbers():
    run = example_run(training=training_records(40, noise=0))
    words = words_of(run)
    last = run.training[-1]["loss"]
    for text in (
        "runs/letters finished base: 8,030.3 M parameters",
        "Steps 40 of 40 100%, 3 epochs",
        f"Training loss {last:.4f} at step 40, the lowest",
        f"Evaluation loss {run.evaluations[-1]['eval_loss']:.4f} at step 40, the best",
        "Time 4.7 s 118 ms a step",
        "tokens/s, median; 73,200 tokens in all",
        "Peak memory 14.80 GiB planned 14.90 GiB",
    ):
        assert text in words


def test_the_best_values_are_named_if_they_are_not_the_last_ones():
    run = example_run(
        training=[{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.75}],
        evaluations=[{"step": 1, "eval_loss": 0.25}, {"step": 2, "eval_loss": 0.3}],
    )
    words = words_of(run)
    assert "Training loss 0.7500 at step 2; lowest 0.5000 at step 1" in words
    assert "Evaluation loss 0.3000 at step 2; best 0.2500 at step 1" in words


def test_an_unfinished_run_says_so_and_lists_its_notes():
    run = example_run(steps_done=40, total_steps=160, is_finished=False, notes=["line 3 is broken"])
    words = words_of(run)
    assert "not finished" in words and "40 of 160 25%" in words and "line 3 is broken" in words
    assert "Last step 40" in words and "After step 40" not in words
    early = words_of(example_run(steps_done=40, total_steps=160))
    assert "40 of 160 ended early" in early and "After step 40" in early


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


# ---- two runs


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
    assert re.search(
        r"Training loss 2\.0000 at step 1, the lowest 1\.0000 −50\.0%", words_of(first, second)
    )
    assert "2.0000 equal" in words_of(first, replace(first, name="b"))


def test_answers_of_two_runs_are_paired_in_their_order():
    words = words_of(*two_runs())
    prompt = PROMPTS[0]
    assert f"Before both: 0 to {prompt}" in words
    assert f"During step 10 10 to {prompt} step 5 5 to {prompt}" in words
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


# ---- safety and size


def test_the_policy_refuses_requests_and_allows_only_the_script_of_the_page():
    source = html_report([example_run()])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', source)[1]
    assert policy.startswith("default-src 'none';")
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert source.index("Content-Security-Policy") < source.index("<style>")
    assert REPORT_MARK in source.partition("<style>")[0]


def test_the_page_names_no_address():
    source = html_report(two_runs())
    assert not re.search(r"https?:|@import|url\(|src=|href=", source)
    assert not {"link", "img", "iframe", "a", "object", "form"} & set(Page(source).tags)


def test_hostile_texts_stay_texts_everywhere():
    run = RunRecord(
        HOSTILE,
        1,
        2,
        True,
        training=[{"step": 1, "loss": 1.0}],
        evaluations=[{"step": 1, "eval_loss": 1.0}],
        samples=[{"step": 1, "samples": [{"prompt": HOSTILE, "answer": HOSTILE}]}],
        settings={HOSTILE: HOSTILE, "list": [HOSTILE]},
        facts=[("model", HOSTILE), (HOSTILE, HOSTILE)],
        plan=[(HOSTILE, HOSTILE), ("peak", HOSTILE)],
        data=[DataRecord(HOSTILE, [(HOSTILE, HOSTILE)], [(1, 2, 3)], [HOSTILE])],
        notes=[HOSTILE],
    )
    for runs in ([run], [run, replace(run, settings={}, facts=[("model", "x")])]):
        source = html_report(runs)
        page = Page(source)
        assert page.tags.count("script") == 1 and "img" not in page.tags
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", source)
        assert "".join(page.texts).count(SHOWN_HOSTILE) >= 15
        source.encode()


TEXTS = st.text(max_size=20)
NUMBERS = st.floats(-1e300, 1e300) | st.integers(-(2**63), 2**63)
METRICS = ["learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds", "epoch"]
RECORDS = st.fixed_dictionaries(
    {"step": st.integers(0, 10**6), "loss": NUMBERS},
    optional=dict.fromkeys([*METRICS, "peak_memory_bytes", "loss_scale"], NUMBERS),
)


@settings(max_examples=40)
@given(st.lists(RECORDS, max_size=5), st.lists(st.tuples(TEXTS, TEXTS), max_size=3), st.booleans())
def test_random_records_give_a_page_that_a_parser_reads(records, texts, is_finished):
    run = RunRecord(
        "run",
        max((record["step"] for record in records), default=0),
        None,
        is_finished,
        training=sorted(records, key=lambda record: record["step"]),
        samples=[{"step": 3, "samples": [{"prompt": p, "answer": a} for p, a in texts]}],
        settings=dict(texts),
    )
    source = html_report([run, replace(run, name="other", facts=texts)])
    Page(source)
    source.encode()
    assert "nan" not in "".join(re.findall(' d="(.*?)"', source))


def test_two_runs_of_100_000_records_and_50_long_prompts_stay_below_2_mb():
    prompts = [f"{i} " + "日<&>\n" * 1000 for i in range(50)]
    long = example_run("a", steps=100_000, prompts=prompts)
    texts = {f"setting {i}": "&" * 9000 for i in range(100)}
    other = replace(long, name="b", training=long.training[::10], settings=texts)
    source = html_report([long, replace(other, notes=["x" * 10**6])])
    assert len(source.encode()) < 2 * 10**6
    assert re.search(r"… [\d,]+ more characters", source)
    steps, values, _ = curves_of(chart_of(source, "Gradient norm"))[0]
    assert 500 < len(steps) == len(values) < 900 and steps[-1] == 100_000


def test_a_run_full_of_long_texts_stays_below_2_mb():
    long = "<&>" * 400
    rows = [(f"{i}{long}", f"{i}{long}") for i in range(210)]
    runs = [
        example_run(
            f"{name}/{long[:1000]}",
            steps=20,
            prompts=[f"{i}{name}{long}" for i in range(110)],
            settings={label: f"{name}{text}" for label, text in rows},
            facts=[("model", name + long), *rows],
            plan=[(label, name + text) for label, text in rows],
            data=[DataRecord(f"{i}{long}", rows, [(1, 2, 3)] * 99, [long] * 25) for i in range(9)],
            notes=[name + long] * 25,
        )
        for name in "ab"
    ]
    assert len(html_report(runs).encode()) < 2 * 10**6


def test_the_spikes_of_a_long_run_are_in_its_curve():
    records = [{"step": s, "loss": 1.0, "learning_rate": 1e-4} for s in range(1, 20_001)]
    records[777]["learning_rate"] = 9e-4
    steps, values, _ = curves_of(
        chart_of(html_report([example_run(training=records)]), "Learning rate")
    )[0]
    assert values[steps.index(778)] == "9e-4" and values.count("9e-4") == 1


def test_values_that_are_not_finite_leave_a_gap_in_no_number():
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0, "grad_norm": math.nan}]
    assert "Gradient norm" not in html_report([example_run(training=records)])

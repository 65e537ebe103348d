"""The HTML page of any run is safe, and below its limit of bytes."""

import base64
import hashlib
import math
import re
from dataclasses import replace

from example_runs import example_run
from html_pages import Page, chart_of, curves_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.report.html_report import html_report
from minitune.report.run_record import RunRecord
from minitune.training.own_files import REPORT_MARK
from minitune.training.run_facts import DataRecord

HOSTILE = "</pre><script>alert('x')</script>\x1b]0;owned\x07\u202e\udc80 & <img src=https://evil/x>"
SHOWN_HOSTILE = HOSTILE.replace("\x1b", "<U+001B>").replace("\x07", "<U+0007>")
SHOWN_HOSTILE = SHOWN_HOSTILE.replace("\u202e", "<U+202E>").replace("\udc80", "<U+DC80>")


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
    source = html_report([example_run(), example_run("runs/second", rate=4e-4)])
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


def test_a_run_of_many_datasets_of_one_label_stays_below_2_mb():
    data = [DataRecord("data", [("a", "b")], [(1, 2, 3)] * 60)] * 2000
    for runs in ([example_run(data=data)], [example_run(data=data), example_run("b", data=data)]):
        source = html_report(runs)
        assert len(source.encode()) < 2 * 10**5
        assert f"Left out: {1992 * len(runs):,} more datasets" in source


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

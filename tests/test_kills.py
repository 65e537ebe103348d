"""kill -9 at random points of training, saving and export: every run resumes to the same bytes."""

import os

import pytest
from kills import run_kills

COUNT = int(os.environ.get("KILL_POINTS", "25"))


@pytest.mark.slow  # a minute
def test_killed_runs_resume_to_the_same_bytes_and_exports_are_absent_or_whole():
    figures = run_kills(COUNT)
    assert figures.wrong == []
    assert figures.killed > 0.8 * COUNT  # the others had ended before the kill came
    assert len(figures.phases) > 1

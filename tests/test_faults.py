"""Every fault of the table in tests/faults.py has its stated outcome, exit code and files."""

import re

import pytest
from faults import FAULTS, observe


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_the_stated_outcome(fault):
    code, line, names = observe(fault)
    assert code == fault.code, line
    assert re.search(fault.words, line)
    assert names == tuple(sorted(fault.left))

"""The table of deliberate bugs fits the code and the tests; tests/mutations/run.py runs it."""

import ast
from collections import Counter

import pytest
from mutations.mutation import ROOT
from mutations.table import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_bug_changes_one_place_and_leaves_python(mutation):
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    changed = mutation.changed_source(source)
    assert changed != source
    ast.parse(changed)
    for test in mutation.tests:
        file, name = test.partition("[")[0].split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_two_bugs_have_one_name():
    counts = Counter(mutation.name for mutation in MUTATIONS)
    assert [name for name, count in counts.items() if count > 1] == []


def test_a_bug_whose_text_is_gone_is_an_error_that_names_it():
    mutation = MUTATIONS[0]
    with pytest.raises(ValueError, match=f"{mutation.name}: the original text occurs 0 times"):
        mutation.changed_source("")

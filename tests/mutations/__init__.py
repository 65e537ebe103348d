"""Deliberate bugs, each beside the tests that must catch it.

    python tests/mutations/run.py                      every bug that needs no GPU
    python tests/mutations/run.py --gpu                the bugs that need a GPU
    python tests/mutations/run.py --only loss rope     the bugs with these words in their names

A bug is one change of a text that occurs once in its file. run.py makes it in a copy of the tree
and runs the tests beside it. tests/test_mutations.py checks that the table fits the code.
"""

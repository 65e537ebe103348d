"""Mutants of every file that minitune reads, each run in a forked process under limits.

Command line: tests/fuzz_readers.py. Imports minitune, and the helpers beside this folder.
"""

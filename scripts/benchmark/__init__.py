"""Parts of scripts/bench.py: the cases, their records and tables, and the log of attempts.

They may import minitune and each other. records.py does not import minitune, because the process of
a peer loads it too.
"""

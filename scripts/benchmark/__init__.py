"""Parts of scripts/bench.py: the cases, their records and tables, and the log of attempts.

They may import minitune and each other; records.py imports neither, because a peer's process loads it too.
"""

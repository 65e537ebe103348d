"""Commands that run other systems beside minitune: the benchmark's peers and the exactness comparisons.

They may import minitune, scripts/benchmark and the other systems; no test imports those by accident.
"""

"""Commands that run other systems beside minitune: peers of the benchmark, and exactness.

They may import minitune, scripts/benchmark and the other systems.
"""

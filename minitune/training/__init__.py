"""The training run: passes and CUDA graphs, optimizer, loop, run folder, log.

May import: everything below minitune/api.py except commands.
"""

"""The settings of a run and the shape of a model, as frozen dataclasses that check their values.

May import: minitune/device.py and minitune/atomic_files.py.
"""

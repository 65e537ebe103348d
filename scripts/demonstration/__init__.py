"""The demonstration of `python scripts/train.py --demo`: its model, its task and its data.

May import: minitune.
"""

"""The plan of a training step: memory, time and the choice between saving, recomputing, offloading.

May import: kernels, `device.py`, `atomic_files.py`, `config/` and `model/`.
"""

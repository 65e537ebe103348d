"""The plan of a step: memory model, time model, the search, and offloaded activations.

May import: kernels, device.py, atomic_files.py, config, model.
"""

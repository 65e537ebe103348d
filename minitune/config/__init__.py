"""Settings and shapes: checked dataclasses, the table of architectures, flags and TOML.

May import: kernels, device.py, atomic_files.py.
"""

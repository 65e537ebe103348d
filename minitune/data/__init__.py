"""From records to batches: text and spans, tokens and labels, packed samples.

May import: kernels, device.py, atomic_files.py, config.
"""

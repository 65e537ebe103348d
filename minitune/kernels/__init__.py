"""The kernels, imported as `minitune.kernels`; in a checkout their files stand in `kernels/` at the top level.

The name `kernels` itself belongs to a PyPI package that transformers looks for, so it is never put on the import path.
A wheel holds the kernel files in this very folder instead, and not this file.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))

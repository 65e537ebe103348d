"""The door to the kernels: `minitune.kernels` finds the files of `kernels/` in a checkout.

The name `kernels` belongs to a PyPI package that transformers looks for, so the checkout's folder
never joins the import path. In a wheel the kernel files stand in this folder, and this file is
left out.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "kernels"))

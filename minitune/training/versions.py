"""The versions of the programs that compute, in a line for a person."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def versions() -> str:
    """Return the versions of minitune, torch and Python, and the GPU."""
    try:
        own = version("minitune")
    except PackageNotFoundError:  # a checkout
        own = "from a checkout"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"minitune {own}, torch {torch.__version__}, Python {platform.python_version()}, {device}"
    )

"""Triton, or stand-ins for it where it is not installed.

A CUDA build of torch brings Triton, a CPU build does not. A CPU never launches a kernel: there the
public functions of the kernel files run their PyTorch references. While these files are imported
they use one name of `tl`, the annotation `tl.constexpr`. Their decorator `jit` stands in
compile_ahead.py.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":  # Triton is there and broken
        raise
    triton = None
    tl = SimpleNamespace(constexpr=None)


def check_triton(device: object) -> None:
    """Raise ValueError if Triton is not installed.

    device: the GPU that needs it, for the message.
    """
    if triton is None:
        raise ValueError(
            f"device {device} needs Triton, which is not installed; install triton (a CUDA build "
            "of torch for Linux brings it), or choose the device cpu"
        )

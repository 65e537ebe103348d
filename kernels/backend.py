"""What every kernel file needs to know about where it runs: is there Triton, is there a GPU, how much shared memory.

Triton exists for Linux only. Elsewhere `triton` and `tl` are stand-ins that let the kernel files be imported; there is
no GPU to launch on there, so no stand-in is ever called.
"""

import functools
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=None)

INTERPRETER_SHARED_MEMORY = 99 * 1024


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on x runs its Triton kernel: on a GPU, but for float64, which is there to check others."""
    return x.is_cuda and x.dtype != torch.float64


@functools.cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use: 99 KiB on sm_86, 89 and 120, 163 on sm_80, 227 on sm_90."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def matmul_accumulated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b that leaves in the accumulator's dtype instead of being rounded to that of the inputs."""
    wide = accumulator(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def add_matmul_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b, where total has the accumulator's dtype and the product is not rounded before."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def copy_into(buffer: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """The result, in the caller's buffer if there is one."""
    return result if buffer is None else buffer.copy_(result)


def require(condition: bool, message: str) -> None:
    """ValueError unless the condition holds: how public functions refuse their input."""
    if not condition:
        raise ValueError(message)

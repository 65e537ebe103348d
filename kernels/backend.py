"""Helpers shared by all kernel files: backend, argument checks, access to rows, matmuls."""

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import torch

from .compile_ahead import jit, stands_for_gpu
from .optional_triton import tl

triton = SimpleNamespace(jit=jit)  # kernels are decorated as in Triton's own examples

INTERPRETER_SHARED_MEMORY = 99 * 1024  # bytes, as on sm_86
# Triton 3.3 and later multiply matrices by tensor cores from this compute capability on.
TENSOR_CORE_CAPABILITY = (8, 0)
DEPENDENT_LAUNCH_CAPABILITY = (9, 0)  # programmatic dependent launch


def use_triton(x: torch.Tensor) -> bool:
    """Return True if an operation on x runs its Triton kernel: x is on a GPU and not in float64.

    float64 runs the PyTorch reference everywhere, because it only serves to check the other dtypes.
    """
    return (x.is_cuda or stands_for_gpu(x)) and x.dtype != torch.float64


@functools.cache
def shared_memory_limit(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use.

    The limit is 64 KiB on sm_75, 163 KiB on sm_80, 227 KiB on sm_90, and 99 KiB on sm_86, sm_89 and
    sm_120.
    """
    if device.type == "cpu":
        return INTERPRETER_SHARED_MEMORY
    # The meta device has no index and stands for the current GPU.
    return torch.cuda.get_device_properties(device.index).shared_memory_per_block_optin


@functools.cache
def has_tensor_core_kernels(device: torch.device) -> bool:
    """Return True if Triton's products of 16-bit matrices run on the device's tensor cores.

    On older GPUs `tl.dot` becomes fused multiply-adds in float32. cuBLAS uses tensor cores there.
    """
    if device.type == "cpu":
        return True
    return torch.cuda.get_device_capability(device.index) >= TENSOR_CORE_CAPABILITY


@functools.cache
def has_dependent_launches(device: torch.device) -> bool:
    """Return True if a launch may begin before the one before it ends, from sm_90 on."""
    if device.type == "cpu":
        return False
    return torch.cuda.get_device_capability(device.index) >= DEPENDENT_LAUNCH_CAPABILITY


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def check_rows(
    like: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    max_row_stride: int = 2**63,
    **tensors: torch.Tensor | None,
) -> None:
    """Check that tensors have the shape and device of `like`, one of `dtypes`, and contiguous rows.

    like: tensor of any number of dimensions; a row is its last dimension.
    dtypes: allowed dtypes.
    max_row_stride: most elements between two entries of the first dimension.
    tensors: arguments by name; None is skipped. Only the last dimension must be contiguous.

    The check runs before every launch, so the message is formatted only if the check fails.

    Raises: ValueError if a tensor does not fit.
    """
    shape, device = like.shape, like.device
    for name, x in tensors.items():
        if x is None:
            continue
        fits = x is like or (x.shape == shape and x.device == device)
        if not fits or x.dtype not in dtypes or (x.stride(-1) != 1 and shape[-1] > 1):
            found = f"{tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}"
            dtype_names = " or ".join(map(str, dict.fromkeys(dtypes)))
            wanted = f"{tuple(shape)} {dtype_names} on {device} with contiguous rows"
            raise ValueError(f"{name} is {found}; expected {wanted}")
        if x.stride(0) > max_row_stride:
            raise ValueError(
                f"rows of {name} are {x.stride(0)} elements apart; "
                f"expected at most {max_row_stride}"
            )


def empty_contiguous_like(x: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised contiguous tensor with the shape, dtype and device of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def row_stride(x: torch.Tensor | None) -> int:
    """Return the elements between two rows of x, 0 if there is no x."""
    return 0 if x is None else x.stride(0)


def rows_of_weights(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return a tensor for weights one below the other, and the rows of each weight in it.

    shapes: (out_features, in_features) of each weight.
    out: the tensor, possibly a range of columns of wider rows; None for a new one.

    Raises: ValueError if the in_features differ, or `out` has another shape or dtype.
    """
    in_features = shapes[0][1]
    if any(shape[1] != in_features for shape in shapes):
        raise ValueError(f"weights of shapes {list(shapes)} differ in in_features")
    rows = [shape[0] for shape in shapes]
    whole = sum(rows), in_features
    if out is None:
        out = torch.empty(whole, dtype=dtype, device=device)
    if out.shape != whole or out.dtype != dtype or (out.stride(1) != 1 and out.numel()):
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}; expected {whole} {dtype} with contiguous rows"
        )
    return out, out.split(rows)


def copy_into(buffer: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """Copy the result into the buffer and return the buffer; return the result if there is none."""
    return result if buffer is None else buffer.copy_(result)


def matmul(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None, multiplier: float
) -> torch.Tensor:
    """Return multiplier * a @ b, written into `out` if given; the matmul applies the factor.

    torch.mm is this call with a factor of 1.
    """
    if out is None:
        out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    return torch.addmm(out, a, b, beta=0, alpha=multiplier, out=out)


def matmul_accumulated(a: torch.Tensor, b: torch.Tensor, multiplier: float = 1.0) -> torch.Tensor:
    """Return multiplier * a @ b in the accumulator's dtype, not rounded to the dtype of a and b.

    PyTorch refuses such a product of bfloat16 below compute capability 8.0, but not of float16.
    """
    acc_dtype = accumulator(a.dtype)
    if a.dtype == acc_dtype or not a.is_cuda:
        return matmul(a.to(acc_dtype), b.to(acc_dtype), None, multiplier)
    out = torch.empty((a.shape[0], b.shape[1]), dtype=acc_dtype, device=a.device)
    return torch.addmm(out, a, b, beta=0, alpha=multiplier, out_dtype=acc_dtype, out=out)


def add_matmul_(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, multiplier: float = 1.0
) -> torch.Tensor:
    """Add multiplier * a @ b in place to `total`, in the accumulator's dtype.

    The product is not rounded.
    """
    if a.dtype != total.dtype and a.is_cuda:
        return torch.addmm(total, a, b, alpha=multiplier, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=multiplier)


def offset_weight(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """Return the weight of a norm plus the offset, which is added in the accumulator's dtype."""
    return weight if offset == 0.0 else weight.to(accumulator(weight.dtype)) + offset


@triton.jit
def tanh_and_slope(x):
    """Return tanh(x) and its derivative 1 - tanh(x)^2, both accurate to float32.

    With e = exp(-2 |x|), |tanh(x)| is (1 - e) / (1 + e) and the derivative 4 e / (1 + e)^2. The
    difference 1 - e loses digits below 1/4, so a Taylor polynomial takes over there.
    """
    TWO_LOG2_E: tl.constexpr = 2.8853900817779268
    e = tl.exp2(tl.abs(x) * -TWO_LOG2_E)
    inverse = 1.0 / (1.0 + e)
    large = (1.0 - e) * inverse
    x2 = x * x
    # -1/3, 2/15, -17/315 and 62/2835; the next term is below 1e-8 of x.
    series = -0.33333333333 + x2 * (0.13333333333 + x2 * (-0.053968253968 + x2 * 0.021869488536))
    small = x + x * x2 * series
    tanh = tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))
    return tanh, 4 * e * inverse * inverse


@triton.jit
def load_row(x_ptr, row, x_row_stride, columns, mask):
    """Return the given columns of one row in float32, zero if masked."""
    return tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(x_ptr, row, x_row_stride, columns, x, mask):
    """Store x into the given columns of one row, cast to the dtype of x_ptr."""
    tl.store(x_ptr + row * x_row_stride + columns, x.to(x_ptr.dtype.element_ty), mask=mask)

"""Few rows are multiplied straight from NF4 and 16 bit, each row as if it were alone."""

from dataclasses import replace

import pytest
import torch
from kernel_checks import (
    CODE,
    DTYPES,
    in_each_dtype,
    kernel,
    normal,
    quantised,
    strided,
)

from minitune.kernels import few_row_weights
from minitune.kernels.few_row_linear import (
    few_row_linear,
    few_row_linear_reference,
    few_row_logits,
)
from minitune.kernels.few_row_weights import FewRowAdapters, FewRowWeight, fits_few_rows

SIXTEEN_BIT = [dtype for dtype in DTYPES if dtype != torch.float32]


def weights(kind, sizes, width, dtype, device):
    """Return weights of these numbers of rows, in NF4, in 16 bit, or some in each."""
    parts = []
    for i, size in enumerate(sizes):
        if kind == "dense" or (kind == "both" and i == 1):
            parts.append(normal(size, width, dtype=dtype, device=device))
        else:
            parts.append(quantised((size, width), kind != "plain", device=device))
    return FewRowWeight(tuple(parts), tuple(CODE.tolist()))


def adapters(rows, sizes, width, dtype, device, count=2, rank=16):
    """Return adapters of all rows in turn, and every third row without one."""
    of_row = torch.arange(rows, dtype=torch.int32) % (count + 1) - 1
    return FewRowAdapters(
        normal(count * len(sizes) * rank, width, dtype=dtype, device=device) / width**0.5,
        normal(count, sum(sizes), rank, dtype=dtype, device=device),
        torch.tensor([2.0, 0.5, 1.0][:count], device=device),
        of_row.to(device),
    )


@kernel
@in_each_dtype
@pytest.mark.parametrize(
    ("kind", "rows", "sizes", "width"),
    [
        ("nested", 1, (70, 3), 256),
        ("plain", 3, (66,), 192),
        ("dense", 5, (3, 66), 320),
        ("both", 18, (3, 65, 4), 128),
        ("nested", 2, (5,), 576),  # 9 blocks in 8 splits, so three splits are empty
    ],
)
def test_products_are_as_good_as_the_formula(kind, rows, sizes, width, dtype, device, monkeypatch):
    monkeypatch.setattr(few_row_weights, "SHORT_SPLIT", 64)
    weight = weights(kind, sizes, width, dtype, device)
    x = strided(normal(rows, width, dtype=dtype, device=device))
    for lora in (None, adapters(rows, sizes, width, dtype, device)):
        exact = few_row_linear_reference(x, weight, lora, 1.5, acc=torch.float64)
        plain = few_row_linear_reference(x, weight, lora, 1.5)
        largest, eps = exact.abs().max(), torch.finfo(dtype).eps
        # Both round z to dtype, but not always to the same side.
        allowed = 2 * (plain - exact).abs().max() + 1e-6 * largest
        allowed += 0 if lora is None else eps * largest
        y = few_row_linear(x, weight, lora, 1.5)
        assert y.dtype == dtype
        assert (y - exact).abs().max() <= allowed + eps * largest
        total = normal(rows, sum(sizes), device=device)
        narrow = torch.empty(rows, sum(sizes), dtype=dtype, device=device)
        sums = few_row_linear(x, weight, lora, 1.5, add_to=total.clone(), rounded=narrow)
        assert torch.equal(narrow, sums.to(dtype))
        assert (sums - total - exact).abs().max() <= allowed + 1e-6 * largest


@kernel
@in_each_dtype
def test_logits_are_as_good_as_the_formula(dtype, device):
    x, head = normal(3, 128, dtype=dtype, device=device), normal(300, 128, device=device)
    logits = few_row_logits(x, head.to(dtype), 0.5)
    exact = 0.5 * x.double() @ head.to(dtype).double().t()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.gpu  # the interpreter's products are NumPy's, whose sums depend on the shape
@kernel
@pytest.mark.parametrize("kind", ["nested", "dense"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_the_bits_of_a_row_depend_neither_on_the_rows_nor_on_other_adapters(kind, dtype, device):
    weight = weights(kind, (130, 70), 1024, dtype, device)
    x = normal(64, 1024, dtype=dtype, device=device)
    lora = adapters(64, (130, 70), 1024, dtype, device)
    whole = few_row_linear(x, weight, lora)
    for rows in (slice(5, 6), slice(10, 17), slice(20, 53)):
        some = replace(lora, of_row=lora.of_row[rows].contiguous())
        assert torch.equal(few_row_linear(x[rows], weight, some), whole[rows])
    base = few_row_linear(x, weight)
    assert torch.equal(whole[lora.of_row < 0], base[lora.of_row < 0])
    assert not torch.equal(whole, base)
    first = replace(lora, a=lora.a[: len(lora.a) // 2], b=lora.b[:1].contiguous())
    rows = lora.of_row == 0
    alone = few_row_linear(x[rows], weight, replace(first, of_row=lora.of_row[rows].contiguous()))
    assert torch.equal(alone, whole[rows])


def test_wrong_shapes_are_refused_by_name():
    weight = weights("nested", (70,), 128, torch.float32, "cpu")
    x = torch.zeros(3, 128)
    for wrong, message in (
        ({"x": torch.zeros(3, 64)}, "expected contiguous rows of 128"),
        ({"x": torch.zeros(65, 128)}, "at most 64"),
        ({"weight": weights("nested", (70,), 96, torch.float32, "cpu")}, "expected NF4 in blocks"),
        ({"adapters": adapters(3, (69,), 128, torch.float32, "cpu")}, "expected .32, 128. and"),
        ({"adapters": adapters(2, (70,), 128, torch.float32, "cpu")}, "and 3 rows"),
        ({"adapters": adapters(3, (70,), 128, torch.float32, "cpu", rank=8)}, "power of two"),
    ):
        wrong = {"x": x, "weight": weight} | wrong
        if wrong["weight"] is not weight:
            wrong["x"] = torch.zeros(3, 96)
        with pytest.raises(ValueError, match=message):
            few_row_linear(**wrong)


def test_a_weight_fits_if_its_rows_are_whole_blocks():
    assert fits_few_rows(quantised((3, 128), True))
    assert not fits_few_rows(quantised((3, 96), True))
    assert not fits_few_rows(torch.zeros(3, 128).t())
    assert not fits_few_rows(torch.zeros(3, 128, dtype=torch.int8))

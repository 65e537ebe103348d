"""Attention of a decode step over pages, and the writing of pages, against PyTorch."""

import math

import pytest
import torch
from kernel_checks import (
    assert_as_good_as_plain,
    in_each_dtype,
    kernel,
    normal,
    plain_attention,
    strided,
)

from minitune.kernels import backend, key_value_pages
from minitune.kernels import decode_attention as module
from minitune.kernels.decode_attention import decode_attention, store_keys_values

PAGE = 16


def pages_of(lengths, page, device, spare=2):
    """Return a page table whose pages lie in disorder, and the number of pages."""
    counts = [math.ceil(n / page) for n in lengths]
    order = torch.randperm(sum(counts) + spare, generator=torch.Generator().manual_seed(5))
    table = torch.full((len(lengths), max(counts) + spare), -1, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[taken : taken + count]
        taken += count
    return table.to(device), len(order)


def run(lengths, H, G, K, dtype, device, page=PAGE, **options):
    """Return (out, plain out, exact out) of rows that see this many keys; unseen places are NaN."""
    table, pages = pages_of(lengths, page, device)
    keys = torch.full((pages, page, G, K), math.nan, dtype=dtype, device=device)
    values = keys.clone()
    q = strided(normal(len(lengths), H * K, dtype=dtype, device=device)).unflatten(1, (H, K))
    rows = torch.tensor(lengths, dtype=torch.int32, device=device)
    plain, exact = [], []
    for row, n in enumerate(lengths):
        k, v = (normal(n, G, K, dtype=dtype, device=device, seed=row + s) for s in (0, 100))
        place = torch.arange(n, device=device)
        places = table[row].long()[place // page] * page + place % page
        key_value_pages.store_keys_values_reference(k, v, keys, values, places)
        window = options.get("window") or n
        seen = (place >= n - window)[None]
        rest = seen, options["scale"], options.get("softcap", 0.0)
        for outs, to in ((plain, dtype), (exact, torch.float64)):
            outs.append(plain_attention(*(x.to(to) for x in (q[row : row + 1], k, v)), *rest)[0])
    out = decode_attention(q, keys, values, table, rows, **options)
    return out, torch.cat(plain), torch.cat(exact)


@kernel
@in_each_dtype
@pytest.mark.parametrize(
    ("lengths", "H", "G", "K", "options"),
    [
        ([1, 130], 4, 2, 64, {}),
        ([130], 3, 1, 24, {"softcap": 2.0}),
        ([3, 150], 2, 1, 128, {"window": 70}),
        ([40], 17, 1, 16, {"window": 1}),
        ([33], 1, 1, 256, {}),
    ],
    ids=str,
)
def test_decode_attention_errs_at_most_twice_as_much_as_pytorch(
    lengths, H, G, K, options, dtype, device, monkeypatch
):
    for name, value in (("WHOLE", 64), ("SPLIT", 32), ("SPLITS_AT_ONCE", 2)):
        monkeypatch.setattr(module, name, value)
    out, plain, exact = run(lengths, H, G, K, dtype, device, scale=K**-0.5, **options)
    assert_as_good_as_plain([out], [plain], [exact])


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("options", [{}, {"window": 37, "softcap": 3.0}], ids=str)
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(options, triton, device, monkeypatch):
    """Other rows, their number, the width of the table and the number of programs change no bit."""
    for name, value in (("WHOLE", 64), ("SPLIT", 32), ("MAX_SPLITS", 3)):
        monkeypatch.setattr(module, name, value)
    if not triton:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    lengths, H, G, K = [50, 1, 0, 150], 2, 1, 16
    table, pages = pages_of(lengths, PAGE, device, spare=300)
    q = normal(4, H, K, device=device)
    keys, values = (normal(pages, PAGE, G, K, device=device, seed=s) for s in (1, 2))
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = decode_attention(q, keys, values, table, lengths, scale=0.3, **options)
    assert not out[2].any() and out[[0, 1, 3]].any(-1).all()
    monkeypatch.setattr(module, "ENOUGH_PROGRAMS", 1)
    for row, width in ((0, 4), (1, 1), (3, 10)):
        mine = slice(row, row + 1)
        wide = torch.full((1, H * K + 8), math.nan, device=device)
        buffer = wide[:, 8:].unflatten(1, (H, K))
        tables = table[mine, :width], lengths[mine]
        alone = decode_attention(q[mine], keys, values, *tables, scale=0.3, out=buffer, **options)
        assert alone is buffer and torch.equal(alone, out[mine]) and wide[:, :8].isnan().all()
    # The pages of the longest row, one behind the other.
    count = 10
    keys, values = (x[table[3, :count].long()] for x in (keys, values))
    table = torch.arange(count, dtype=torch.int32, device=device)[None]
    in_order = decode_attention(q[3:], keys, values, table, lengths[3:], scale=0.3, **options)
    assert torch.equal(in_order, out[3:])


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "reference"])
def test_the_last_keys_beside_the_pages_give_the_same_bits_and_go_to_their_pages(
    triton, device, monkeypatch
):
    monkeypatch.setattr(module, "WHOLE", 16)
    monkeypatch.setattr(module, "SPLIT", 16)
    if not triton:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    lengths, H, G, K = [65, 1, 0], 18, 1, 24
    table, pages = pages_of(lengths, PAGE, device)
    q = normal(3, H, K, device=device)
    expected = normal(2, pages, PAGE, G, K, device=device)
    last = torch.tensor([64, 0], device=device)
    places = table[:2].long().gather(1, last[:, None] // PAGE)[:, 0], last % PAGE
    stale = expected.clone()
    stale[:, *places] = math.nan
    new = [strided(normal(3, G * K, device=device)).unflatten(1, (G, K)) for _ in range(2)]
    for x, pages in zip(new, expected, strict=True):
        x[:2] = pages[places]
    rest = table, torch.tensor(lengths, dtype=torch.int32, device=device)
    out = decode_attention(q, *expected, *rest, scale=0.3, window=40)
    assert torch.equal(decode_attention(q, *stale, *rest, scale=0.3, window=40, new=new), out)
    assert torch.equal(stale, expected)


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "reference"])
def test_keys_and_values_go_to_their_places_and_a_negative_place_skips(triton, device, monkeypatch):
    monkeypatch.setattr(key_value_pages, "COPY_BLOCK", 16)
    if not triton:
        monkeypatch.setattr(backend, "use_triton", lambda x: False)
    k, v = (strided(normal(3, 40, device=device, seed=s)).unflatten(1, (5, 8)) for s in (0, 1))
    keys, values = torch.zeros(2, 2, 4, 5, 8, device=device)
    store_keys_values(k, v, keys, values, torch.tensor([6, -1, 0], device=device))
    for x, pages in ((k, keys), (v, values)):
        expected = torch.zeros(8, 5, 8, device=device)
        expected[6], expected[0] = x[0], x[2]
        assert torch.equal(pages.flatten(0, 1), expected)


def test_decode_attention_refuses_what_does_not_fit():
    q, pages = normal(2, 4, 8), normal(3, PAGE, 2, 8)
    table, lengths = (torch.ones(*shape, dtype=torch.int32) for shape in ((2, 3), (2,)))
    rest = {"scale": 1.0}
    for arguments, options, message in (
        ((q, pages, pages, table.long(), lengths), rest, r"page_table .* expected torch.int32"),
        ((q, pages, pages, table[:1], lengths), rest, r"page_table is \(1, 3\).* each of 2"),
        ((q, pages, pages, table, lengths[:1]), rest, r"lengths is \(1,\)"),
        ((q, pages, pages[:, :8], table, lengths), rest, r"values is \(3, 8, 2, 8\)"),
        ((q, pages.half(), pages, table, lengths), rest, "keys is .* expected .* torch.float32"),
        ((q[:, :3], pages, pages, table, lengths), rest, "3 query heads are not a multiple of 2"),
        ((q, pages[..., :4], pages, table, lengths), rest, r"expected \(rows, heads, head width\)"),
        ((q, pages, pages, table, lengths), {"scale": 0.0}, "scale 0.0; expected above 0"),
        ((q, pages, pages, table, lengths), {"scale": 1.0, "window": 0}, "window 0; expected"),
        ((q, pages, pages, table, lengths), rest | {"new": (q, q)}, r"new_keys is \(2, 4, 8\)"),
        ((q, pages, pages, table, lengths), {"scale": 1.0, "out": q[:1]}, r"out is \(1, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments, **options)
    with pytest.raises(ValueError, match=r"places \(2,\) torch.int32; expected"):
        store_keys_values(q[:, :2], q[:, :2], pages, pages, lengths)
    with pytest.raises(ValueError, match=r"v is \(2, 4, 8\)"):
        store_keys_values(q[:, :2], q, pages, pages, lengths.long())


# ---- GPU only


@pytest.mark.gpu
@in_each_dtype
@pytest.mark.parametrize(("H", "G", "K"), [(32, 8, 128), (9, 3, 64), (8, 4, 256), (48, 1, 96)])
@pytest.mark.parametrize("window", [None, 1000])
def test_decode_attention_holds_its_bound_at_real_sizes(H, G, K, window, dtype):
    lengths = [384, 1, 5000, 64, 700]
    options = {"scale": K**-0.5, "window": window, "page": 64}
    out, plain, exact = run(lengths, H, G, K, dtype, "cuda", **options)
    assert_as_good_as_plain([out], [plain], [exact])


@pytest.mark.gpu
@in_each_dtype
@pytest.mark.parametrize("length", [384, 9000])
def test_a_row_has_the_same_bits_alone_and_among_7_and_64_rows(length, dtype):
    H, G, K, page = 32, 8, 128, 64
    lengths = [length, *range(1, 64)]
    table, pages = pages_of(lengths, page, "cuda")
    q = normal(64, H, K, dtype=dtype, device="cuda")
    keys, values = (normal(pages, page, G, K, dtype=dtype, device="cuda", seed=s) for s in (1, 2))
    lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    outs = []
    for rows in (1, 7, 64):
        tables = table[:rows, : table.shape[1] - (rows == 1)], lengths[:rows]
        outs.append(decode_attention(q[:rows], keys, values, *tables, scale=0.1))
    assert torch.equal(outs[0], outs[1][:1]) and torch.equal(outs[1], outs[2][:7])

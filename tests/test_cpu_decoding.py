"""Decode steps on a CPU: their weights and attention give the values of the training layer."""

import pytest
import torch
from tiny import draw_adapter, make_tiny_model
from tiny_families import make_tiny_family
from transformers_twin import load

from minitune.model.adapter_switch import own_adapter
from minitune.model.decoding import cpu_step, cpu_weights, step_weights
from minitune.model.decoding.engine import decode
from minitune.model.decoding.requests import Request
from minitune.model.linear import FusedLinear
from minitune.model.sampling import SamplingConfig

GREEDY = SamplingConfig()
LENGTHS = (5, 64, 130, 7)


def requests_of(lengths, tokens=12, adapters=(0,)):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in lengths]
    return [Request(p, tokens, 0, adapters[i % len(adapters)]) for i, p in enumerate(prompts)]


def values_of(model, requests, **options):
    answers = decode(model, requests, GREEDY, logprobs=True, **options)
    return [x.tokens for x in answers], torch.tensor([x.logprobs for x in answers])


def without_cpu_weights(monkeypatch):
    """Let steps dequantise each layer, as for a model without room for its weights."""
    monkeypatch.setattr(step_weights, "cpu_weights_fit", lambda model: False)


@pytest.fixture
def model(tmp_path):
    return load(make_tiny_model(tmp_path / "m", attention_bias=True), load_in_4bit=False)[0]


@pytest.mark.parametrize(
    ("form", "lengths"),
    [
        *(
            (form, LENGTHS)
            for form in ("nf4", "gemma2", "gemma3", "olmo2", "granite", "ministral3")
        ),
        *((form, (70, 70, 70)) for form in ("nf4", "gemma3")),
        *((form, (90,)) for form in ("nf4", "gemma3", "olmo2")),
    ],
    ids=str,
)
def test_a_step_gives_the_values_of_the_training_layers(tmp_path, monkeypatch, form, lengths):
    folder = tmp_path / "m"
    make_tiny_model(folder) if form == "nf4" else make_tiny_family(folder, form)
    model, _ = load(folder, load_in_4bit=form == "nf4")
    tokens, logprobs = values_of(model, requests_of(lengths))
    model.free_generation_memory()
    without_cpu_weights(monkeypatch)
    expected, expected_logprobs = values_of(model, requests_of(lengths))
    assert tokens == expected
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=2e-5, atol=2e-5)


def test_a_row_has_the_same_values_alone_and_in_batches(model):
    """Bits may differ, because the layout of the weights depends on the number of rows."""
    requests = requests_of((60,) * 8, tokens=20)
    tokens, logprobs = values_of(model, requests)
    for first, rows in ((0, 1), (2, 2), (3, 5)):
        some, values = values_of(model, requests[first : first + rows])
        assert some == tokens[first : first + rows]
        torch.testing.assert_close(values, logprobs[first : first + rows], rtol=1e-5, atol=1e-5)


def test_each_row_has_its_adapter_in_one_step(model):
    own = own_adapter(model)
    requests = requests_of((20, 9, 31), adapters=(0, 1))
    tokens, logprobs = values_of(model, requests, adapters=[own, {}])
    for i, request in enumerate(requests):
        adapters = [[own, {}][request.adapter]] * 2
        alone, values = values_of(model, [request], adapters=adapters)
        assert alone == [tokens[i]]
        torch.testing.assert_close(values[0], logprobs[i], rtol=1e-5, atol=1e-5)
    assert values_of(model, requests, adapters=[{}, {}])[0][0] != tokens[0]


def test_pages_that_do_not_follow_each_other_are_gathered(model, monkeypatch):
    requests = requests_of((70, 64, 65))
    expected = values_of(model, requests)
    monkeypatch.setattr(cpu_step, "_equally_spaced", lambda table, used: None)
    tokens, logprobs = values_of(model, requests)
    assert tokens == expected[0]
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "used", "expected"),
    [
        ([[3, 4], [5, 6]], [2, 2], (3, 2)),
        ([[3, 4], [6, 7]], [2, 2], (3, 3)),
        ([[3, 0], [5, 6]], [1, 2], (3, 2)),
        ([[3, 4], [5, 0]], [2, 1], None),  # a view would end behind the second row's pages
        ([[5, 6], [3, 4]], [2, 2], None),
        ([[3, 5]], [2], None),
        ([[3, 4], [5, 6], [8, 9]], [2, 2, 2], None),
    ],
)
def test_one_view_holds_rows_that_are_equally_far_apart(table, used, expected):
    assert cpu_step._equally_spaced(table, used) == expected


def test_hidden_keys_that_are_not_finite_change_nothing(model):
    requests = requests_of((40, 50))
    expected = values_of(model, requests)
    cache = model.decode_engine._memory.cache
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    tokens, logprobs = values_of(model, requests)
    assert tokens == expected[0]
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)


def test_a_second_call_builds_no_weight_and_reads_a_changed_adapter(model, monkeypatch):
    requests = requests_of((9, 14))
    first, _ = values_of(model, requests)

    def refuse(*arguments):
        raise AssertionError("a weight was dequantised again")

    with monkeypatch.context() as patch:
        patch.setattr(FusedLinear, "dequantize_into_", refuse)
        assert values_of(model, requests)[0] == first
        base, _ = values_of(model, requests, adapters=[{}])
        assert base != first
        draw_adapter(model, b=0.3)
        changed, _ = values_of(model, requests)
    model.free_generation_memory()
    assert changed == values_of(model, requests)[0] != first


@pytest.mark.parametrize("packings", [(), (8,), (8, 16)])
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 16, 17])
def test_products_are_those_of_float64_in_every_layout(rows, packings):
    if packings and not cpu_weights._can_pack():
        pytest.skip("PyTorch was built without MKL")
    generator = torch.Generator().manual_seed(rows)
    weight, wide, residual = (
        torch.randn(shape, generator=generator) for shape in ((72, 40), (rows, 48), (rows, 72))
    )
    frozen, x = cpu_weights.FrozenWeight(weight, packings), wide[:, :40]
    expected = x.double() @ weight.double().t()
    close = {"rtol": 1e-5, "atol": 1e-5}
    for multiplier in (1.0, 0.5):
        y = multiplier * expected
        out, total = torch.full((rows, 72), torch.nan), residual.clone()
        torch.testing.assert_close(frozen.product(x, None, multiplier).double(), y, **close)
        assert frozen.product(x, out, multiplier) is out
        torch.testing.assert_close(out.double(), y, **close)
        assert frozen.product(x, None, multiplier, add_to=total) is total
        torch.testing.assert_close(total.double(), residual + y, **close)
    # A packed layout is built only for the numbers of rows that read it.
    assert len(frozen._packed) == (5 <= rows <= max(packings, default=0))


@pytest.mark.parametrize(("layouts", "packed"), [(0, None), (1, ()), (2, (8,)), (3, (8, 16))])
def test_weights_are_packed_as_far_as_the_memory_has_room(model, monkeypatch, layouts, packed):
    if packed and not cpu_weights._can_pack():
        pytest.skip("PyTorch was built without MKL")
    linears = sum(fused.out_features * fused.in_features for fused in model.fused_linears())
    nbytes = 4 * (linears + model.model.embed_tokens.weight.numel())
    monkeypatch.setattr(cpu_weights, "free_memory", lambda device: 2 * layouts * nbytes)
    model.free_generation_memory()
    expected, _ = values_of(model, requests_of((9,) * 12, tokens=4))
    weights = model.decode_engine._memory.weights
    assert (weights and weights._head._packings) == packed
    monkeypatch.undo()
    model.free_generation_memory()
    assert values_of(model, requests_of((9,) * 12, tokens=4))[0] == expected


def test_a_model_without_room_for_its_weights_decodes_without_them(model, monkeypatch):
    requests = requests_of((9, 14))
    expected, _ = values_of(model, requests)
    model.free_generation_memory()
    monkeypatch.setattr(cpu_weights, "free_memory", lambda device: 1000)
    assert values_of(model, requests)[0] == expected
    assert model.decode_engine._memory.weights is None

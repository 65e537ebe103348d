"""Decode steps on a GPU: CUDA graphs, batch invariance, and the memory that stays."""

import pytest
import torch
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.model.adapter_switch import own_adapter
from minitune.model.decoding import decode_graphs
from minitune.model.decoding.engine import decode
from minitune.model.decoding.requests import Request
from minitune.model.linear import FusedLinear
from minitune.model.sampling import SamplingConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPE = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 1024, "positions": 1024}
WARM = SamplingConfig(temperature=0.8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("m"), **SHAPE)
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=1024, device="cuda")
    FastLanguageModel.get_peft_model(model, r=16)
    with torch.no_grad():
        for _, p in model.adapter_parameters():
            p.normal_(0, 0.05)
    return model


def random_requests(count, seed=0, limit=40):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, 1024, (n,), generator=generator).tolist() for n in lengths]
    return [Request(prompt, limit, seed=i) for i, prompt in enumerate(prompts)]


def results(answers):
    return [(answer.tokens, answer.logprobs) for answer in answers]


@pytest.mark.parametrize("config", [SamplingConfig(), WARM], ids=["greedy", "drawn"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(model, config):
    requests = random_requests(80)
    together = results(decode(model, requests, config, logprobs=True))
    for count in (1, 7, 33):
        assert results(decode(model, requests[:count], config, logprobs=True)) == together[:count]
    few = decode(model, requests, config, logprobs=True, max_rows=5)
    assert results(few) == together
    eager = decode(model, requests[:9], config, logprobs=True, keep=False)
    assert results(eager) == together[:9]


def test_a_second_call_captures_nothing_and_dequantises_for_prompts_only(model, monkeypatch):
    requests = random_requests(3)
    first = results(decode(model, requests, WARM, logprobs=True))
    captured, dequantised = [], []
    inner, original = decode_graphs._captured, FusedLinear.dequantize_into_
    monkeypatch.setattr(decode_graphs, "_captured", lambda *x: captured.append(1) or inner(*x))
    monkeypatch.setattr(
        FusedLinear,
        "dequantize_into_",
        lambda self, weight: dequantised.append(self) or original(self, weight),
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert results(decode(model, requests, WARM, logprobs=True)) == first
    assert not captured
    assert len(dequantised) == 4 * len(model.model.layers)  # one prefill
    assert torch.cuda.memory_allocated() <= before + 2**20
    model.free_generation_memory()
    assert torch.cuda.memory_allocated() < before


def test_steps_in_graphs_read_the_adapters_values_of_each_call(model):
    requests = random_requests(4)
    own = own_adapter(model)
    base = results(decode(model, requests, WARM, adapters=[{}], logprobs=True))
    first = results(decode(model, requests, WARM, logprobs=True))
    mixed = [Request(r.prompt, r.limit, r.seed, a) for a in (0, 1) for r in requests]
    found = results(decode(model, mixed, WARM, adapters=[own, {}], logprobs=True))
    assert found == first + base and first != base
    graphs = model.decode_engine._memory._graphs
    assert results(decode(model, requests, WARM, adapters=[{}], logprobs=True)) == base
    assert model.decode_engine._memory._graphs is graphs  # the base needs no others
    saved = [p.detach().clone() for _, p in model.adapter_parameters()]
    for _, p in model.adapter_parameters():
        p.data *= 0.5
    changed = results(decode(model, requests, WARM, logprobs=True))
    for (_, p), value in zip(model.adapter_parameters(), saved, strict=True):
        p.data.copy_(value)
    assert changed != first == results(decode(model, requests, WARM, logprobs=True))


def test_more_rows_than_few_take_dequantised_weights(model):
    requests = random_requests(100, limit=5)
    few = decode(model, requests, SamplingConfig())
    many = decode(model, requests, SamplingConfig(), max_rows=100)
    equal = sum(a.tokens == b.tokens for a, b in zip(few, many, strict=True))
    assert equal > 60  # bf16 sums in another order choose another token now and then


def test_logprobs_of_generation_are_those_of_the_training_forward(model):
    requests = random_requests(8)
    for request, answer in zip(requests, decode(model, requests, WARM, logprobs=True), strict=True):
        ids = torch.tensor([[*request.prompt, *answer.tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1].float()
        tokens = torch.tensor(answer.tokens, device=logits.device)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu()
        assert (
            torch.tensor(answer.logprobs) - expected
        ).abs().max() < 0.3  # bfloat16, random weights

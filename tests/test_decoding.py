"""The decode engine gives each request the answer that it has alone."""

import copy
import threading

import pytest
import torch
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.model import adapter_switch
from minitune.model.decoding import decode_call, decode_memory, prefill
from minitune.model.decoding.engine import decode
from minitune.model.decoding.few_row_step import FewRowStep
from minitune.model.decoding.kv_cache import PAGE, KVCache
from minitune.model.decoding.requests import Request
from minitune.model.sampling import SamplingConfig
from minitune.model.unchanged_tensors import KnownTensors

GREEDY = SamplingConfig()
# Below, at and above the border of a page, with and without an answer that crosses a border.
LENGTHS = (3, 60, 63, 64, 65, 130, 9)
LIMITS = (5, 9, 4, 3, 2, 6, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("m"), attention_bias=True)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, dtype=torch.float32, device="cpu"
    )
    FastLanguageModel.get_peft_model(model, r=4)
    fill_adapter_(model, 0.1)
    return model


def fill_adapter_(model, scale):
    with torch.no_grad():
        for i, (_, p) in enumerate(model.adapter_parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * scale)


def requests_of(model, seed=0, adapter=0):
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Request(p, n, 7 + i, adapter) for i, (p, n) in enumerate(zip(prompts, LIMITS))]  # noqa: B905


def tokens_of(answers):
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def alone(model):
    return [tokens_of(decode(model, [request], GREEDY))[0] for request in requests_of(model)]


def page_nbytes(model):
    return KVCache.page_nbytes(model.config, model.dtype)


@pytest.mark.parametrize(("max_rows", "pages"), [(1, 4), (2, 7), (3, 6), (64, 5), (65, 100)])
@pytest.mark.parametrize("begins_early", [False, True])  # True is the order of a GPU
def test_slots_and_pages_change_no_answer(model, alone, max_rows, pages, begins_early, monkeypatch):
    monkeypatch.setattr(decode_call, "steps_begin_early", lambda device: begins_early)
    budget = pages * page_nbytes(model)
    found = decode(model, requests_of(model), GREEDY, max_rows=max_rows, cache_memory=budget)
    assert tokens_of(found) == alone
    assert model.decode_engine._memory.cache.pages <= pages


def test_the_cache_holds_the_tokens_of_a_pass_without_a_cache(model, alone):
    for request, answer in zip(requests_of(model), alone, strict=True):
        ids = torch.tensor([[*request.prompt, *answer]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
        (found,) = decode(model, [request], GREEDY, logprobs=True)
        assert torch.allclose(
            torch.tensor(found.logprobs), logits.log_softmax(-1).amax(-1), atol=1e-5
        )


def test_one_prompt_is_read_once_for_all_its_answers(model, monkeypatch):
    read = []
    inner = decode_call.prefill

    def counted(model, cache, prompts, pages, weights):
        read.extend(map(len, prompts))
        return inner(model, cache, prompts, pages, weights)

    monkeypatch.setattr(decode_call, "prefill", counted)
    warm = SamplingConfig(temperature=1.5)
    prompt, other = [5, 6, 7] * 20, [9] * 64
    requests = [Request(p, 8, seed) for seed in range(3) for p in (prompt, other)]
    together = tokens_of(decode(model, requests, warm))
    assert read == [60, 64]
    assert together == [tokens_of(decode(model, [request], warm))[0] for request in requests]
    assert len(set(map(tuple, together))) == 6
    limited = decode(model, requests, warm, cache_memory=3 * page_nbytes(model))
    assert tokens_of(limited) == together


@pytest.mark.parametrize("name", ["MAX_PREFILL_ROWS", "pads"])
def test_prefill_in_parts_or_padded_as_on_a_gpu_gives_the_same_answers(
    model, alone, monkeypatch, name
):
    changed = 70 if name == "MAX_PREFILL_ROWS" else lambda device: True
    monkeypatch.setattr(prefill, name, changed)
    assert tokens_of(decode(model, requests_of(model), GREEDY)) == alone


def test_padded_prompts_begin_at_blocks_of_attention_and_fill_whole_tiles(monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_TILE_ROWS", 256)
    pages = [[1], [2, 3, 4], [5, 6]]
    packed = prefill.pack_prompts([[7] * 3, [8] * 130, [9] * 128], pages, True)
    assert len(packed.ids) == 2 * 256
    assert packed.last_rows.tolist() == [2, 128 + 129, 384 + 127]
    assert (packed.positions == 0).nonzero()[:, 0].tolist() == [0, 128, 384]
    assert int((packed.places >= 0).sum()) == 3 + 130 + 128
    assert packed.places[384:].tolist() == [*range(5 * PAGE, 7 * PAGE)]


@pytest.mark.parametrize("max_rows", [64, 65])  # weights of decode steps, and dequantised ones
def test_each_row_has_its_adapter(model, alone, max_rows):
    own = adapter_switch.own_adapter(model)
    twin = copy.deepcopy(model)
    fill_adapter_(twin, -0.2)
    branches = dict(twin.linears())
    other = {
        linear: adapter_switch.Branch(branches[name].lora_A, branches[name].lora_B, 0.5)
        for name, linear in model.linears()
        if "q_proj" in name or "down_proj" in name
    }
    with adapter_switch.switched_adapter(model, other):
        expected = tokens_of(decode(model, requests_of(model), GREEDY))
    with adapter_switch.without_lora(model):
        base = tokens_of(decode(model, requests_of(model), GREEDY))
    mixed = [r for a in range(3) for r in requests_of(model, adapter=a)]
    given = {"adapters": [own, {}, other], "max_rows": max_rows}
    found = tokens_of(decode(model, mixed, GREEDY, **given))
    assert found == alone + base + expected
    assert alone[1] != base[1] != expected[1] != alone[1]
    assert adapter_switch.own_adapter(model) == own


@pytest.mark.parametrize("is_nf4", [True, False])
def test_weights_as_they_are_stored_give_the_same_answers(tmp_path, monkeypatch, is_nf4):
    folder = make_tiny_model(tmp_path / "m", attention_bias=True)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, dtype=torch.float32, device="cpu", load_in_4bit=is_nf4
    )
    FastLanguageModel.get_peft_model(model, r=4)
    fill_adapter_(model, 0.1)
    own = adapter_switch.own_adapter(model)
    mixed = [r for a in range(2) for r in requests_of(model, adapter=a)]

    def answers():
        first = tokens_of(decode(model, mixed, GREEDY, adapters=[own, {}]))
        for _, p in model.adapter_parameters():
            p.data = p.data.mul_(-0.5) if is_nf4 else p.data * -0.5  # in place or in other memory
        return first, tokens_of(decode(model, requests_of(model), GREEDY))

    expected = answers()
    model.free_generation_memory()
    fill_adapter_(model, 0.1)
    monkeypatch.setattr(decode_memory, "new_step_weights", FewRowStep)  # as on a GPU
    assert answers() == expected
    weights = model.decode_engine._memory.weights
    base = tokens_of(decode(model, requests_of(model), GREEDY, adapters=[{}]))
    assert base == expected[0][len(LENGTHS) :] != expected[0][: len(LENGTHS)]
    assert model.decode_engine._memory.weights is weights


def test_a_request_that_never_fits_is_refused_by_name(model):
    request = Request([5] * 100, 100)
    message = r"up to 200 tokens, need .* MiB, but cache_memory is .* MiB; raise cache_memory, or"
    with pytest.raises(ValueError, match=message):
        decode(model, [request], GREEDY, cache_memory=4 * page_nbytes(model))
    assert len(decode(model, [request], GREEDY, cache_memory=5 * page_nbytes(model))) == 1


def test_an_answer_ends_with_its_end_token(model, alone):
    end = alone[1][2]
    expected = [x[: x.index(end) + 1] if end in x else x for x in alone]
    assert (
        tokens_of(decode(model, requests_of(model), GREEDY, end_tokens=[end])) == expected != alone
    )


def test_a_callback_may_end_an_answer(model, alone):
    heard = []

    def end_second(i, token):
        heard.append((i, token))
        return i == 1 and len([x for x in heard if x[0] == 1]) == 3

    found = tokens_of(decode(model, requests_of(model), GREEDY, on_token=end_second))
    assert found == [alone[0], alone[1][:3], *alone[2:]]
    assert [[token for i, token in heard if i == row] for row in range(len(found))] == found


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_failing_callback_leaves_the_engine_usable(model, alone, error):
    def fail(i, token):
        if i == 3:
            raise error("stop")

    with pytest.raises(error):
        decode(model, requests_of(model), GREEDY, on_token=fail)
    assert tokens_of(decode(model, requests_of(model), GREEDY)) == alone


def test_a_callback_may_generate_itself(model, alone):
    inner = []

    def generate(i, token):
        if i == 0 and not inner:
            inner.extend(tokens_of(decode(model, requests_of(model), GREEDY)))
            model.free_generation_memory()  # has no effect in the midst of a call

    assert tokens_of(decode(model, requests_of(model), GREEDY, on_token=generate)) == alone
    assert inner == alone


def test_threads_that_share_a_model_get_their_own_answers(model, alone):
    found = {}

    def work(name):
        requests = requests_of(model)
        found[name] = tokens_of(decode(model, requests, GREEDY, max_rows=3 + name))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), alone)


def test_a_second_call_reuses_the_memory_until_it_is_freed(model, alone):
    model.free_generation_memory()
    with torch.inference_mode():
        first = decode(model, requests_of(model), GREEDY)
    memory = model.decode_engine._memory
    keys, head = memory.cache.keys, memory.head
    assert tokens_of(decode(model, requests_of(model), GREEDY)) == tokens_of(first) == alone
    assert memory.cache.keys is keys and memory.head is head
    copied = copy.deepcopy(model)
    assert copied.decode_engine is not model.decode_engine
    assert tokens_of(decode(copied, requests_of(model), GREEDY)) == alone
    decode(model, requests_of(model), GREEDY, keep=False)
    assert model.decode_engine._memory is memory
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]))
    assert model.decode_engine._memory is None


def test_changed_adapters_are_read_at_the_next_call(model, alone):
    model_of = copy.deepcopy(model)
    assert tokens_of(decode(model_of, requests_of(model), GREEDY)) == alone
    for _, p in model_of.adapter_parameters():
        p.data *= 0.5
    changed = tokens_of(decode(model_of, requests_of(model), GREEDY))
    model_of.free_generation_memory()
    assert tokens_of(decode(model_of, requests_of(model), GREEDY)) == changed != alone


@pytest.mark.parametrize("way", ["in place", "data", "parameter"])
def test_changed_weights_of_the_base_are_read_at_the_next_call(model, alone, way):
    changed = copy.deepcopy(model)
    assert tokens_of(decode(changed, requests_of(model), GREEDY)) == alone
    with torch.no_grad():
        if way == "in place":
            changed.model.layers[0].self_attn.q_proj.quantized.packed.bitwise_xor_(0x11)
        elif way == "data":
            changed.lm_head.weight.data = changed.lm_head.weight.flip(1)
        else:  # a second one may get the id of the first
            for _ in range(2):
                weight = changed.lm_head.weight.flip(1)
                changed.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
            changed.lm_head.weight.neg_()
    found = tokens_of(decode(changed, requests_of(model), GREEDY))
    changed.free_generation_memory()
    assert found == tokens_of(decode(changed, requests_of(model), GREEDY)) != alone


def test_another_tensor_with_the_id_of_a_freed_one_is_no_known_one():
    tensors = [torch.zeros(3)]
    known = KnownTensors(tensors)
    assert known.are(tensors) and not known.are(tensors * 2)
    address = tensors[0].data_ptr()
    tensors[0] = torch.zeros(3)  # the first one is freed
    known._states[0] = [tensors[0].data_ptr()]  # as if it had got its memory, too
    assert address and not known.are(tensors)


@pytest.mark.parametrize("begins_early", [False, True])
def test_slots_without_a_sequence_read_and_write_page_0(model, monkeypatch, begins_early):
    monkeypatch.setattr(decode_call, "steps_begin_early", lambda device: begins_early)
    steps = []
    step_ = decode_memory.DecodeMemory.step_

    def checked_step_(memory, model, rows, width):
        padding = memory.buffers.inputs(memory.cache.slots, memory.cache.width).select(
            slice(rows, None)
        )
        steps.append([int(x.count_nonzero()) for x in vars(padding).values()])
        step_(memory, model, rows, width)

    monkeypatch.setattr(decode_memory.DecodeMemory, "step_", checked_step_)
    decode(model, requests_of(model), GREEDY, max_rows=4)
    assert len(steps) > 8 and steps == [[0, 0, 0]] * len(steps)

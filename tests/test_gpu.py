"""The whole model on a GPU, through the Triton kernels."""

import pytest
import torch
from micro_step_checks import assert_same_bits, random_samples, results
from plain_llama import PlainLlama
from tiny import draw_adapter, make_tiny_model
from tiny_families import make_tiny_family

from minitune import FastLanguageModel
from minitune.data.batching import collate
from minitune.training.micro_step import MicroStep

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden": 256,
    "layers": 4,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "ffn": 704,
    "vocab": 2048,
    "tie": False,
}

FAMILY_SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 704,
    "vocab_size": 2048,
}
# The cases whose lists fit any shape.
GPU_FAMILIES = (
    "qwen2",
    "qwen3",
    "mistral with a window",
    "smollm3",
    "granite",
    "phi3 in part rotated",
    "ministral3",
    "olmo2",
    "olmo3",
    "gemma2",
    "gemma3",
)


def load(folder, dtype, device="cuda"):
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=256, dtype=dtype, device=device
    )
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    draw_adapter(model, b=0.05)
    return model


def packed_batch(vocab, lengths=(200, 1, 77, 130, 3)):
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    return samples, {
        "input_ids": torch.cat(samples),
        "labels": torch.cat(samples),
        "position_ids": positions,
    }


def gradients(parameters):
    return torch.cat([p.grad.double().flatten() for p in parameters])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", ["llama", *GPU_FAMILIES])
def test_a_step_in_bf16_errs_at_most_twice_as_much_as_plain_pytorch_in_bf16(tmp_path, family):
    if family == "llama":
        folder = make_tiny_model(tmp_path / "m", **SHAPE)
    else:
        folder = make_tiny_family(tmp_path / "m", family, **FAMILY_SHAPE)
    model = load(folder, torch.bfloat16)
    samples, inputs = packed_batch(SHAPE["vocab"])
    loss = model(**inputs).loss
    loss.backward()
    ours = gradients(p for _, p in model.trainable_parameters())
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        plain = PlainLlama(model, dtype)
        value = plain.loss([(s.cuda(), s.cuda()) for s in samples])
        value.backward()
        results[dtype] = value.item(), gradients(plain.adapter.values())
    (exact_loss, exact), (plain_loss, plain_gradients) = (
        results[torch.float64],
        results[torch.bfloat16],
    )
    ours_error, plain_error = relative(ours, exact), relative(plain_gradients, exact)
    print(f"gradient error: ours {ours_error:.4f}, plain bf16 {plain_error:.4f}")
    assert ours_error <= 2 * plain_error
    assert abs(loss.item() - exact_loss) <= max(2 * abs(plain_loss - exact_loss), 1e-3 * exact_loss)


def test_float32_on_the_gpu_equals_float32_on_the_cpu(tmp_path):
    folder = make_tiny_model(tmp_path / "m", **SHAPE)
    _, inputs = packed_batch(SHAPE["vocab"])
    found = []
    for device in ("cpu", "cuda"):
        model = load(folder, torch.float32, device)
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.item(), gradients(p for _, p in model.trainable_parameters()).cpu()))
    assert abs(found[0][0] - found[1][0]) < 1e-5 * found[0][0]
    assert relative(found[1][1], found[0][1]) < 1e-4


def test_quantising_on_the_gpu_gives_the_bytes_of_the_cpu(tmp_path):
    folder = make_tiny_model(tmp_path / "m", **SHAPE)
    on_cpu, on_gpu = load(folder, torch.float32, "cpu"), load(folder, torch.float32)
    for (name, a), (_, b) in zip(on_cpu.linears(), on_gpu.linears(), strict=True):
        assert torch.equal(a.quantized.packed, b.quantized.packed.cpu()), name
        assert torch.allclose(
            a.weight_as(torch.float32), b.weight_as(torch.float32).cpu(), rtol=1e-5, atol=1e-7
        ), name


def test_cached_decoding_equals_decoding_without_a_cache(tmp_path):
    model = load(make_tiny_model(tmp_path / "m", **SHAPE), torch.float32)
    prompts = [[5, 9, 300, 41], [7], list(range(11, 40))]
    for prompt, answer in zip(prompts, model.generate(prompts, max_new_tokens=20), strict=True):
        ids = list(prompt)
        for _ in range(20):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]


@pytest.mark.parametrize("family", GPU_FAMILIES)
def test_a_family_decodes_and_replays_its_micro_steps_in_graphs(tmp_path, family):
    folder = make_tiny_family(tmp_path / "m", family, **FAMILY_SHAPE)
    model = load(folder, torch.float32)
    prompt = list(range(11, 51))
    (answer,) = model.generate([prompt], max_new_tokens=20, eos_token_ids=[])
    logits = model(input_ids=torch.tensor([prompt + answer])).logits
    assert answer == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    model = load(folder, torch.bfloat16)
    batch = collate(random_samples([40, 200, 9], SHAPE["vocab"]))
    eager, replayed = (
        results(MicroStep(model, capture=capture), [batch] * 2) for capture in (False, True)
    )
    assert_same_bits(replayed, eager)


def test_ten_steps_follow_the_float32_curve_of_the_cpu(tmp_path):
    folder = make_tiny_model(tmp_path / "m", **SHAPE)
    _, inputs = packed_batch(SHAPE["vocab"])
    curves = {}
    for device, dtype in (
        ("cpu", torch.float32),
        ("cuda", torch.float32),
        ("cuda", torch.bfloat16),
    ):
        model = load(folder, dtype, device)
        optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=3e-4)
        curves[device, dtype] = curve = []
        for _ in range(10):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
    reference = torch.tensor(curves["cpu", torch.float32])
    assert reference[-1] < 0.9 * reference[0]
    assert torch.allclose(torch.tensor(curves["cuda", torch.float32]), reference, rtol=1e-3)
    assert torch.allclose(torch.tensor(curves["cuda", torch.bfloat16]), reference, rtol=2e-2)

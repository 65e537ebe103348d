"""Comparisons of a model and its gradients with transformers + PEFT in float32."""

import pytest
import torch
from tiny import draw_adapter

from minitune import FastLanguageModel
from minitune.config.architectures import LORA_TARGETS


def load(
    folder,
    targets=LORA_TARGETS,
    checkpointing="unsloth",
    load_in_4bit=True,
    with_adapter=True,
    **kwargs,
):
    """Return a model in float32 on the CPU with a random adapter, and its tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=256,
        dtype=torch.float32,
        load_in_4bit=load_in_4bit,
        device="cpu",
        **kwargs,
    )
    if not with_adapter:
        return model, tokenizer
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=12, target_modules=targets, use_gradient_checkpointing=checkpointing
    )
    draw_adapter(model, b=0.1)
    return model, tokenizer


def batch(model, rows=2, length=37, seed=0):
    ids = torch.randint(
        3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
    labels = ids.clone()
    labels[0, : length // 3] = -100
    return ids, labels


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for _, p in model.trainable_parameters()])


def clear_gradients(model):
    for _, p in model.trainable_parameters():
        p.grad = None


def loss_and_gradient(model, **inputs):
    clear_gradients(model)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), flat_gradient(model)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def hf_twin(model, folder):
    """Return transformers + PEFT in float32, with this model's dequantised weights and adapter."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            if (quantized := getattr(module, "quantized", None)) is not None:
                hf.get_submodule(name).weight.copy_(quantized.dequantize(torch.float32))
    lora = model.lora
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=list(lora.target_modules),  # the model's own names
        task_type="CAUSAL_LM",
    )
    hf = peft.get_peft_model(hf, config)
    with torch.no_grad():
        for name, p in model.trainable_parameters():
            hf.get_parameter(
                "base_model.model." + name.replace(".weight", ".default.weight")
            ).copy_(p)
    return hf


def compare_with_transformers(model, folder, ids, labels, bound):
    hf = hf_twin(model, folder)
    expected = hf(input_ids=ids, labels=labels)
    # Compute their loss once more in float64: torch's float32 log_softmax on a CPU errs by 4e-6 at
    # V = 49152. In the last layers of SmolLM2 that is 3e-4 in the gradients; float32 costs 2e-5.
    exact = torch.nn.functional.cross_entropy(
        expected.logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    )
    exact.backward()
    assert abs(exact.item() - expected.loss.item()) < 1e-5 * expected.loss.item()
    assert relative(model(input_ids=ids).logits, expected.logits) < bound
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert abs(loss.item() - exact.item()) < bound * exact.item()
    worst = 0.0
    for name, p in model.trainable_parameters():
        reference = hf.get_parameter(
            "base_model.model." + name.replace(".weight", ".default.weight")
        ).grad
        assert reference.norm() > 0
        worst = max(worst, relative(p.grad, reference))
        assert worst < bound, name
    return worst

"""llama.cpp computes from a GGUF file the same as transformers from the merged folder."""

from pathlib import Path

import pytest
import torch
from gguf_files import LLAMA3_ROPE, dequantised
from referees.llama_cpp import LlamaCpp
from test_merge import load
from tiny import make_tiny_model

from minitune import FastLanguageModel
from minitune.checkpoints.merge import merge_to_folder
from minitune.data.batching import collate
from minitune.data.sources.sources import load_dataset
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.gguf.export import export_gguf
from minitune.gguf.lora_adapter import save_gguf_adapter

DEMO = Path(__file__).parents[1] / "scripts" / "demonstration"
SHAPES = {
    "grouped queries, tied": {},
    "llama3 rope, untied, a tensor that needs padding": {
        "rope_scaling": LLAMA3_ROPE,
        "tie": False,
        "tokenizer": "llama3",
        "head_dim": 24,
    },
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "wide heads": {"head_dim": 32, "kv_heads": 1},
    "biases": {"attention_bias": True, "tie": False},
    "sentencepiece, width no multiple of 32": {
        "hidden": 48,
        "heads": 3,
        "kv_heads": 1,
        "ffn": 80,
        "tokenizer": "spm",
    },
}


def transformers_log_probabilities(folder, ids):
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return hf(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_llama_cpp_computes_what_transformers_does_on_the_merged_folder(tmp_path, shape):
    model, tokenizer = load(make_tiny_model(tmp_path / "base", **shape))
    path = export_gguf(model, tmp_path / "model.gguf", tokenizer, "f16")
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    prompt = torch.randint(3, 400, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = transformers_log_probabilities(tmp_path / "merged", prompt)
    llama_cpp = LlamaCpp(path)
    for length in (1, 2, 17, 40, 90):
        found = llama_cpp.next_log_probabilities(prompt[:length], 512)
        # float16 makes 0.01 - 0.06; plain rows of q and k, or a missing rope_freqs or bias, make
        # several units
        assert (found - expected[length - 1]).abs().max() < 0.1, length


def train_a_little(model, tokenizer, steps=5, rows=3):
    """Take a few optimizer steps on the demonstration; answers become JSON, not yet right."""
    records = [record for _, record in load_dataset(DEMO / "train.jsonl")[: steps * rows]]
    samples = tokenize_dataset(records, tokenizer, 256).samples
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=3e-3)
    with model.resident_weights():
        for step in range(steps):
            batch = collate(samples[step * rows : (step + 1) * rows])
            output = model(batch.input_ids, labels=batch.labels, position_ids=batch.position_ids)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def questions(tokenizer):
    """Return the prompts of a few held-out texts of the demonstration."""
    records = [record for _, record in load_dataset(DEMO / "heldout.jsonl")[::8]]
    return [
        tokenizer.apply_chat_template(record["messages"][:-1], add_generation_prompt=True)
        for record in records
    ]


@pytest.mark.slow
def test_the_trained_real_model_answers_in_llama_cpp_as_it_does_here(tmp_path, smollm2):
    model, tokenizer = load(smollm2, lora=False)
    FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, use_gradient_checkpointing=False)
    train_a_little(model, tokenizer)
    prompts = questions(tokenizer)
    ours = model.generate(prompts, max_new_tokens=20, eos_token_ids=tokenizer.eos_token_ids)
    path = export_gguf(model, tmp_path / "real.gguf", tokenizer, "f16", merge_base="nf4")
    llama_cpp = LlamaCpp(path)
    answers = [llama_cpp.answer(ids, 20) for ids in prompts]
    assert all(answer.startswith("{") for answer in answers)  # the base model answers in words
    assert answers == tokenizer.batch_decode(ours, skip_special_tokens=True)
    text = Path(__file__).read_text(encoding="utf-8")
    assert llama_cpp.tokenize(text) == tokenizer.encode(text)


@pytest.mark.slow
def test_the_real_gguf_base_with_its_adapter_answers_in_llama_cpp_as_it_does_here(
    tmp_path, smollm2_gguf
):
    model, tokenizer = load(smollm2_gguf, lora=False)
    FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, use_gradient_checkpointing=False)
    train_a_little(model, tokenizer)
    prompts = questions(tokenizer)
    ours = model.generate(prompts, max_new_tokens=20, eos_token_ids=tokenizer.eos_token_ids)
    adapter = save_gguf_adapter(model, tmp_path / "adapter.gguf", tokenizer)
    # In the file's own types llama.cpp rounds activations to 8 bits, which may turn a near tie.
    llama_cpp = LlamaCpp(dequantised(smollm2_gguf, tmp_path / "float32.gguf"), adapter)
    answers = [llama_cpp.answer(ids, 20) for ids in prompts]
    assert answers == tokenizer.batch_decode(ours, skip_special_tokens=True)
    assert all(answer.startswith("{") for answer in answers)  # the base alone answers in words

"""The check of an NF4 base against its 16-bit base."""

import math

import numpy as np
import pytest
import torch
from command_inputs import train, train_arguments, write_inputs
from test_merge import write_prequantized
from tiny import make_tiny_model
from tiny_families import make_tiny_family
from training_runs import new_trainer
from transformers_twin import load

from minitune.data.samples import Sample
from minitune.training.check_base import CHECKED_TOKENS, check_base, checked_samples


def random_samples(vocab, lengths=(37, 5, 2, 61), seed=0):
    """Return samples of random ids whose first third is not trained on."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        ids = rng.integers(3, vocab, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 3, -100, ids)
        samples.append(Sample(ids, labels))
    return samples


def log_probabilities(transformers, folder, samples, weights=None):
    """Return transformers' log probabilities and the target of each trained-on token.

    weights: name of a linear -> its weight, if it is not that of the folder.
    """
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    rows, targets = [], []
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            hf.get_submodule(name).weight.copy_(weight)
        for sample in samples:
            ids = torch.from_numpy(np.array(sample.input_ids, dtype=np.int64))
            labels = torch.from_numpy(np.array(sample.labels, dtype=np.int64))[1:]
            logits = hf(input_ids=ids[None]).logits[0, :-1].double()
            rows.append(logits[labels != -100].log_softmax(-1))
            targets.append(labels[labels != -100])
    return torch.cat(rows), torch.cat(targets)


@pytest.mark.parametrize("family", ["llama", "llama in shards", "granite", "phi3"])
def test_the_check_gives_the_numbers_of_both_models_in_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    if family == "llama":
        folder = make_tiny_model(tmp_path / "base")
    elif family == "llama in shards":
        folder = make_tiny_model(tmp_path / "base", tie=False, shards=2, attention_bias=True)
    else:
        folder = make_tiny_family(tmp_path / "base", family)
    model, _ = load(folder, with_adapter=False)
    samples = random_samples(model.config.vocab_size)
    check = check_base(model, samples)

    nf4 = {name: linear.weight_as(torch.float32) for name, linear in model.linears()}
    log_p, targets = log_probabilities(transformers, folder, samples)
    log_q, _ = log_probabilities(transformers, folder, samples, nf4)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert divergence > 1e-6
    assert check.divergence == pytest.approx(divergence, rel=1e-4)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert check.agreement == pytest.approx(agreement)
    for perplexity, logs in ((check.perplexity_16bit, log_p), (check.perplexity_nf4, log_q)):
        expected = math.exp(-logs.gather(1, targets[:, None]).mean().item())
        assert perplexity == pytest.approx(expected, rel=1e-4)
    assert (check.samples, check.tokens) == (4, len(targets))
    assert check.bytes_16bit == sum(2 * weight.numel() for weight in nf4.values())


def test_the_model_keeps_its_nf4_weights_also_if_the_check_fails(tmp_path, monkeypatch):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    ids = torch.arange(3, 40)[None]
    samples = random_samples(model.config.vocab_size)
    before = model(input_ids=ids).logits
    with model.resident_weights():
        check = check_base(model, samples)
    assert check == check_base(model, samples) and check.divergence > 0
    assert torch.equal(model(input_ids=ids).logits, before)

    def fail(*_):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(type(model.model.layers[1]), "forward_saving_", fail)
        check_base(model, samples)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_long_logits_in_tiles_give_the_same_numbers(tmp_path, monkeypatch):
    model, _ = load(make_tiny_model(tmp_path / "base"), with_adapter=False)
    samples = random_samples(model.config.vocab_size)
    whole = check_base(model, samples)
    monkeypatch.setattr("minitune.training.check_base.compared_rows", lambda _: 7)
    tiled = check_base(model, samples)
    assert tiled.divergence == pytest.approx(whole.divergence, rel=1e-5)
    assert (tiled.agreement, tiled.tokens) == (whole.agreement, whole.tokens)


def test_a_base_without_nf4_or_without_sixteen_bit_weights_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    samples = random_samples(512)
    model, _ = load(folder, load_in_4bit=False)
    with pytest.raises(ValueError, match="in 16 bit, not in NF4, so there is nothing to check"):
        check_base(model, samples)
    write_prequantized(load(folder, with_adapter=False)[0], tmp_path / "nf4")
    model, _ = load(tmp_path / "nf4")
    with pytest.raises(ValueError, match="holds 4-bit weights only, so there is nothing"):
        check_base(model, samples)
    model, _ = load(folder)
    untrained = Sample([3, 4, 5], [-100, -100, -100])
    with pytest.raises(ValueError, match="no trained-on token; choose other samples"):
        check_base(model, [untrained])


def test_the_checked_samples_are_spread_over_the_data_and_few(tmp_path):
    folder = make_tiny_model(tmp_path / "base", positions=4096)
    records = [{"input_ids": [3 + i] * 100} for i in range(80)]
    trainer = new_trainer(folder, tmp_path / "a", records=records)
    firsts = [int(sample.input_ids[0]) for sample in checked_samples(trainer.data.train.samples)]
    assert firsts == [3, 13, 23, 33, 43, 53, 63, 73]
    long = [{"input_ids": [3 + i] * n} for i, n in enumerate([CHECKED_TOKENS + 9, 5])]
    options = {"max_seq_length": 4096}
    trainer = new_trainer(folder, tmp_path / "b", records=long, model_options=options)
    chosen = checked_samples(trainer.data.train.samples)
    assert [len(sample.input_ids) for sample in chosen] == [CHECKED_TOKENS + 9]


def test_the_train_command_prints_the_check_and_trains_the_same(tmp_path, capsys):
    inputs = write_inputs(tmp_path)
    assert train(train_arguments(inputs, tmp_path / "plain")) == 0
    assert "\ncheck " not in capsys.readouterr().err
    assert train(train_arguments(inputs, tmp_path / "checked", "--check-base")) == 0
    assert "check      8 samples, " in (printed := capsys.readouterr().err)
    assert "KL(16 bit || NF4) 0." in printed and "--no-load-in-4bit" in printed
    adapters = [
        (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in ("plain", "checked")
    ]
    assert adapters[0] == adapters[1]
    more = ("--check-base", "--no-load-in-4bit")
    assert train(train_arguments(inputs, tmp_path / "16 bit", *more)) == 0
    assert "check      the base is in 16 bit, not in NF4" in capsys.readouterr().err
    assert "check_base" not in (tmp_path / "checked" / "config.toml").read_text()

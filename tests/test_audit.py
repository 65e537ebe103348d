"""The merge audit gives the numbers of the files that an export writes."""

import math

import pytest
import torch
from test_merge import load, write_prequantized
from tiny import draw_adapter, make_tiny_model
from tiny_families import make_tiny_family

from minitune import FastLanguageModel
from minitune.checkpoints.merge import merge_to_folder
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.gguf.audit.audit_table import AuditRow, MergeAudit
from minitune.gguf.audit.merge_audit import audit_merges, audited_samples
from minitune.gguf.export import convert_folder, export_gguf
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.importance.importance_collection import importance_from_data
from minitune.gguf.lora_adapter import save_gguf_adapter
from minitune.gguf.reader import GgufReader

TEXTS = [
    "Twelve lamps go to Lisbon.",
    "She didn't say when.",
    "The invoice follows by letter, and a table for four at eight o'clock.",
]
RECORDS = [{"text": text} for text in TEXTS] + [
    {"prompt": "Where do the lamps go?", "completion": " To Oslo."}
]
# Rows of whole blocks of the K types
WIDE = {"hidden": 256, "ffn": 256, "tie": False, "layers": 1, "vocab": 400, "dtype": torch.float32}


def rows_of(audit):
    return {row.way: row for row in (audit.trained, audit.base, *audit.rows)}


def samples_of(model, tokenizer):
    return tokenize_dataset(RECORDS, tokenizer, model.max_seq_length).samples


def model_log_probabilities(model, samples):
    """Return the log probabilities of all trained-on tokens of the samples, float64."""
    rows = []
    for sample in samples:
        logits = model(input_ids=torch.tensor(sample.input_ids.tolist())[None]).logits[0, :-1]
        labels = torch.tensor(sample.labels.tolist())[1:]
        rows.append(logits[labels != -100].detach().double().log_softmax(-1))
    return torch.cat(rows)


def with_weights_of_(model, path):
    """Fill the base of a 16-bit model with the dequantised weights of a GGUF file."""
    weights = FileWeights(GgufReader(path), model.config)
    for name in model.config.tensor_shapes():
        model.get_parameter(name).data = weights.load(name)
    return model


def check_row(row, log_p, log_q, samples):
    """Compare a row of the table with the numbers of two log probabilities."""
    labels = torch.cat([torch.tensor(sample.labels.tolist())[1:] for sample in samples])
    targets = labels[labels != -100]
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert row.divergence == pytest.approx(divergence, rel=2e-4, abs=1e-9), row.way
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert row.agreement == pytest.approx(agreement), row.way
    loss = -log_q.gather(1, targets[:, None]).mean().item()
    assert math.log(row.perplexity) == pytest.approx(loss, rel=1e-5), row.way


def test_the_rows_of_merged_folders_are_the_numbers_of_the_loaded_folders(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base", attention_bias=True))
    audit = rows_of(audit_merges(model, tokenizer, RECORDS, "f16"))
    samples = samples_of(model, tokenizer)
    trained = model_log_probabilities(model, samples)
    check_row(audit["as trained (NF4 + adapter)"], trained, trained, samples)
    with model.disable_adapter():
        base = model_log_probabilities(model, samples)
    check_row(audit["base without the adapter"], trained, base, samples)
    for source, label in (("original", "merged on 16 bit"), ("nf4", "merged on NF4")):
        folder = merge_to_folder(model, tmp_path / source, tokenizer, source)
        merged, _ = load(folder, lora=False, load_in_4bit=False)
        row = audit[f"{label}, folder"]
        check_row(row, trained, model_log_probabilities(merged, samples), samples)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert row.nbytes == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_rows_of_gguf_files_are_the_numbers_of_the_written_files(tmp_path, family):
    if family == "llama":
        folder, methods = make_tiny_model(tmp_path / "base", **WIDE), ["q4_k_m", "bf16"]
    else:
        folder, methods = make_tiny_family(tmp_path / "base", family), ["q4_0"]
    model, tokenizer = load(folder)
    audit = rows_of(audit_merges(model, tokenizer, RECORDS, methods))
    samples = samples_of(model, tokenizer)
    trained = model_log_probabilities(model, samples)
    plain, _ = load(folder, lora=False, load_in_4bit=False)
    for source, label in (("original", "merged on 16 bit"), ("nf4", "merged on NF4")):
        paths = export_gguf(model, tmp_path / source, tokenizer, methods, source, verify=False)
        for path, method in zip(paths, methods, strict=True):
            row = audit[f"{label}, {method.upper()}"]
            way = model_log_probabilities(with_weights_of_(plain, path), samples)
            check_row(row, trained, way, samples)
            assert row.nbytes == path.stat().st_size
    # The base's file, with the adapter beside it.
    adapted, _ = load(folder, load_in_4bit=False)
    adapter = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    for method in methods:
        path = convert_folder(folder, tmp_path / "files", method, verify=False)
        row = audit[f"{method.upper()} base + adapter"]
        way = model_log_probabilities(with_weights_of_(adapted, path), samples)
        check_row(row, trained, way, samples)
        assert row.nbytes == path.stat().st_size + adapter.stat().st_size


def test_an_importance_matrix_quantises_as_in_the_export(tmp_path):
    folder = make_tiny_model(tmp_path / "base", **WIDE)
    model, tokenizer = load(folder)
    matrix = importance_from_data(model, tokenizer, RECORDS)
    plain, weighted = (
        rows_of(audit_merges(model, tokenizer, RECORDS, "q4_0", importance=importance))
        for importance in (None, matrix)
    )
    path = export_gguf(model, tmp_path, tokenizer, "q4_0", importance=matrix, verify=False)
    samples = samples_of(model, tokenizer)
    trained = model_log_probabilities(model, samples)
    row = weighted["merged on 16 bit, Q4_0"]
    file = with_weights_of_(load(folder, lora=False, load_in_4bit=False)[0], path)
    check_row(row, trained, model_log_probabilities(file, samples), samples)
    assert row.divergence != plain["merged on 16 bit, Q4_0"].divergence
    assert row.nbytes == path.stat().st_size


def test_a_lossless_way_keeps_everything_and_the_base_nothing(tmp_path):
    # The 16-bit weights of the folder are the base in training and in a file of floats.
    model, tokenizer = load(make_tiny_model(tmp_path / "base"), load_in_4bit=False)
    audit = audit_merges(model, tokenizer, RECORDS, ["f32", "q4_0"])
    rows = rows_of(audit)
    assert (audit.base.survival, audit.base.way) == (0.0, "base without the adapter")
    lossless = rows["F32 base + adapter"]
    assert (lossless.divergence, lossless.agreement, lossless.survival) == (0.0, 1.0, 1.0)
    assert lossless.perplexity == audit.trained.perplexity
    assert audit.trained.way == "as trained (16 bit + adapter)" and audit.trained.survival == 1.0
    assert not any("NF4" in way for way in rows)
    rounded = rows["merged on 16 bit, folder"]
    assert 0.99 < rounded.survival < 1 and rounded.survival > rows["Q4_0 base + adapter"].survival
    assert rounded.divergence == rows["merged on 16 bit, F32"].divergence


def test_a_base_of_4_bit_weights_is_audited_on_these(tmp_path):
    source, _ = load(make_tiny_model(tmp_path / "source"), lora=False)
    model, tokenizer = load(write_prequantized(source, tmp_path / "base"))
    audit = audit_merges(model, tokenizer, RECORDS, "f32")
    ways = [row.way for row in audit.rows]
    assert ways == ["merged on NF4, folder", "merged on NF4, F32", "F32 base + adapter"]
    assert min(row.survival for row in audit.rows) > 0.99


def test_a_gguf_base_and_its_adapter_are_the_model_as_trained(tmp_path):
    folder = make_tiny_model(tmp_path / "base", **WIDE)
    file = convert_folder(folder, tmp_path / "base.gguf", "q4_k_m", verify=False)
    model, tokenizer = load(file)
    audit = audit_merges(model, tokenizer, RECORDS, ["q8_0", "q4_k_m"])
    trained = audit.trained
    assert trained.way == "GGUF base + adapter (as trained)" and audit.trained_ships
    assert (trained.divergence, trained.survival) == (0.0, 1.0)
    assert trained.nbytes > file.stat().st_size
    ways = [row.way for row in audit.rows]
    assert ways == ["merged, folder", "merged, Q8_0", "merged, Q4_K_M"]
    paths = export_gguf(model, tmp_path / "out", tokenizer, ["q8_0", "q4_k_m"], verify=False)
    samples, plain = samples_of(model, tokenizer), load(folder, lora=False, load_in_4bit=False)[0]
    expected = model_log_probabilities(model, samples)
    for path, row in zip(paths, audit.rows[1:], strict=True):
        way = model_log_probabilities(with_weights_of_(plain, path), samples)
        check_row(row, expected, way, samples)
        assert row.nbytes == path.stat().st_size


def test_the_audit_repeats_and_leaves_the_model_as_it_is(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    ids = torch.arange(3, 40)[None]
    before = model(input_ids=ids).logits
    with model.resident_weights():
        first = audit_merges(model, tokenizer, RECORDS, "q4_0")
    assert first == audit_merges(model, tokenizer, RECORDS, "q4_0")
    assert torch.equal(model(input_ids=ids).logits, before)


def test_long_logits_in_tiles_give_the_same_numbers(tmp_path, monkeypatch):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    whole = audit_merges(model, tokenizer, RECORDS, "q4_0")
    monkeypatch.setattr("minitune.gguf.audit.audit_pass.compared_rows", lambda _: 7)
    tiled = audit_merges(model, tokenizer, RECORDS, "q4_0")
    for row, expected in zip(tiled.rows, whole.rows, strict=True):
        assert row.divergence == pytest.approx(expected.divergence, rel=1e-5)
        assert row.agreement == expected.agreement


def test_more_tokens_than_the_limit_leave_out_whole_samples_and_the_table_says_so(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    model.max_seq_length = 64
    records = [{"text": f"{i} lamps"} for i in range(40)] + [{"text": " ".join(TEXTS) * 4}]
    records.append({"input_ids": [3, 4], "labels": [-100, -100]})
    samples = tokenize_dataset(records, tokenizer, 64).samples
    audit = audit_merges(model, tokenizer, records, "f32", max_tokens=60)
    chosen = audited_samples(samples, 60)
    assert audit.samples == len(chosen) and audit.left_out == 41 - audit.samples > 0
    assert sum(len(sample.input_ids) for sample in chosen) == audit.context <= 60
    firsts = [int(sample.input_ids[0]) for sample in chosen]
    assert firsts != [int(samples[i].input_ids[0]) for i in range(len(chosen))]
    assert f"; {audit.left_out} samples left out (token limit); 1 cut to length" in str(audit)
    assert "; 1 without a trained-on token\n" in str(audit)
    assert len(audited_samples(samples, 1)) == 1
    assert len(audited_samples(samples, 10_000)) == 41


def test_an_untrained_adapter_has_nothing_that_could_survive(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"), lora=False)
    FastLanguageModel.get_peft_model(model, r=4)
    audit = audit_merges(model, tokenizer, RECORDS, "q8_0")
    assert audit.base.divergence == 0 and audit.base.survival is None
    assert audit.recommended is None
    assert audit.recommendation.startswith("The adapter changes nothing measurable on this text")


def test_bad_arguments_are_refused_by_name(tmp_path):
    folder = make_tiny_model(tmp_path / "base")
    plain, tokenizer = load(folder, lora=False)
    with pytest.raises(ValueError, match="no adapter, so there is no fine-tune to audit"):
        audit_merges(plain, tokenizer, RECORDS)
    model, _ = load(folder)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="max_tokens is 0; expected at least 1"):
        audit_merges(model, tokenizer, RECORDS, max_tokens=0)
    with pytest.raises(ValueError, match="quantization_method 'q9' is not supported"):
        audit_merges(model, tokenizer, RECORDS, "q9")
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        audit_merges(model, tokenizer, tmp_path / "nowhere.jsonl")
    in_16_bit, _ = load(tmp_path / "adapter", lora=False, load_in_4bit=False)
    with pytest.raises(ValueError, match=r"NF4 weights, and the model holds 16-bit.*4bit=True"):
        audit_merges(in_16_bit, tokenizer, RECORDS)
    in_16_bit.save_pretrained(tmp_path / "other")
    in_nf4, _ = load(tmp_path / "other", lora=False)
    with pytest.raises(ValueError, match=r"16-bit weights, and the model holds NF4.*4bit=False"):
        audit_merges(in_nf4, tokenizer, RECORDS)
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    again, _ = load(tmp_path / "merged", lora=False)
    again.load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="this adapter is merged into it already"):
        audit_merges(again, tokenizer, RECORDS)


# ---- the table


def table(*rows, base=1.0):
    """Return an audit of ways with (name, MB, KL)."""
    found = [
        AuditRow(way, int(mb * 1e6), kl, 0.9, 2.5, 1 - kl / base if base else None)
        for way, mb, kl in (("as trained", 90, 0.0), ("base", 80, base), *rows)
    ]
    return MergeAudit(found[0], found[1], tuple(found[2:]), samples=3, tokens=1000, context=2000)


def test_the_smallest_way_that_keeps_95_percent_is_recommended():
    audit = table(("large", 300, 0.001), ("good", 100, 0.05), ("small", 50, 0.051))
    assert audit.recommended.way == "good"
    assert audit.recommendation == (
        "Choose good, the smallest way that keeps at least 95%: it keeps 95.0% of the fine-tune in "
        "100.0 MB, perplexity 2.500 against 2.500 as trained."
    )


def test_without_a_good_way_the_one_that_keeps_most_is_recommended():
    audit = table(("a", 300, 0.2), ("b", 100, 0.4), ("c", 50, 1.5))
    assert audit.recommended.way == "a"
    assert audit.recommendation.startswith("No way keeps 95% of the fine-tune; choose a, which")
    (negative,) = [line for line in str(audit).splitlines() if line.startswith("c ")]
    assert negative.split()[-1] == "-50.0%"


def test_the_table_fits_into_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model, tokenizer = load(make_tiny_model(tmp_path / "base", **WIDE))
    audit = audit_merges(model, tokenizer, RECORDS, ["iq4_nl", "q4_k_m"])
    lines = str(audit).splitlines()
    assert lines[0] == f"4 samples, {audit.tokens} trained-on of {audit.context} tokens"
    assert max(map(len, lines)) <= 80
    huge = AuditRow("merged on 16 bit, Q4_K_M", 10**12, 12.3456, 1.0, 1e30, -1234.5)
    assert len(str(huge)) <= 80


def test_a_survival_that_rounds_to_zero_has_no_sign():
    assert str(AuditRow("merged, Q4_1", 10**8, 0.01, 0.9, 2.5, -1e-6)).endswith("  0.0%")


def test_the_drawn_adapter_of_these_tests_changes_the_base(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path / "base"), load_in_4bit=False)
    draw_adapter(model, b=0.001)
    weak = audit_merges(model, tokenizer, RECORDS, "q4_0")
    draw_adapter(model, b=0.03)
    strong = audit_merges(model, tokenizer, RECORDS, "q4_0")
    # The same rounding loses all of a weak fine-tune and a part of a strong one.
    assert weak.rows[-1].survival < 0 < strong.rows[-1].survival < 1

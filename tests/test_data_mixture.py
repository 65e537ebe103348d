"""Weights repeat the samples of a file or take a share of them, and belong to the run."""

import json
import tomllib

import numpy as np
import pytest
from command_inputs import train
from training_runs import RECORDS, make_smallest_model, new_trainer

from minitune.data.flat_samples import OriginFormat, SampleBuilder
from minitune.data.samples import Sample
from minitune.training.run_data import weighted


def two_sources(first, second):
    """Return samples of two sources, each sample with a token of its own."""
    builder = SampleBuilder([OriginFormat("a.jsonl", True), OriginFormat("b.csv", True)])
    for i in range(first + second):
        builder.add(Sample([i, i], [i, i]), 1, int(i >= first), i + 1, "text")
    return builder.build()


def tokens(samples):
    return [int(sample.input_ids[0]) for sample in samples]


def test_the_whole_part_of_a_weight_repeats_and_the_fraction_takes_a_share_by_the_seed():
    samples = two_sources(10, 20)
    mixed = tokens(weighted(samples, (2.3, 0.5), seed=1))
    counts = np.bincount(mixed, minlength=30)
    assert sorted(counts[:10]) == [2] * 7 + [3] * 3
    assert sorted(counts[10:]) == [0] * 10 + [1] * 10
    assert tokens(weighted(samples, (2.3, 0.5), seed=1)) == mixed
    assert tokens(weighted(samples, (2.3, 0.5), seed=2)) != mixed
    assert tokens(weighted(samples, (1, 1), seed=1)) == list(range(30))


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match=r"has 1 numbers, but .* 2 sources \(a.jsonl, b.csv\)"):
        weighted(two_sources(2, 2), (1,), seed=0)
    with pytest.raises(ValueError, match="leave no sample"):
        weighted(two_sources(1, 1), (0.1, 0.1), seed=0)


def test_weights_are_written_and_a_run_resumes_only_with_the_same_ones(tmp_path, capsys):
    files = []
    for name, part in (("a.jsonl", RECORDS[:10]), ("b.jsonl", RECORDS[10:])):
        files.append(tmp_path / name)
        files[-1].write_text("".join(json.dumps(record) + "\n" for record in part))
    folder, output = make_smallest_model(tmp_path / "model"), tmp_path / "run"
    settings = {"records": files, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = new_trainer(folder, output, data_weights=[2, 0.5], **settings)
    assert len(trainer.data.train.samples) == 2 * 10 + 7
    trainer.train()
    banner = capsys.readouterr().err
    assert "data       27 samples by data_weights, of 24 records: 0 skipped" in banner
    config = tomllib.loads((output / "config.toml").read_text())
    assert config["data"] == [str(path) for path in files]
    assert config["data_weights"] == [2, 0.5]
    again = settings | {"max_steps": 3, "resume": True}
    assert new_trainer(folder, output, data_weights=[2, 0.5], **again).train().global_step == 3
    with pytest.raises(ValueError, match="other samples would follow: the data changed; restore"):
        new_trainer(folder, output, data_weights=[1, 1], **again).train()


def test_the_command_takes_files_of_several_formats_and_leaves_bad_records_out(tmp_path, capsys):
    rows, table = tmp_path / "rows, old.jsonl", tmp_path / "table.csv"
    rows.write_text("".join(json.dumps(record) + "\n" for record in [*RECORDS, {"text": 3}]))
    table.write_text("prompt,completion\nHow many?,Four\nHow many now?,\nAnd then?,Five\n")
    model = make_smallest_model(tmp_path / "model")
    command = ["--model", str(model), "--device", "cpu", "--output-dir", str(tmp_path / "run")]
    command += ["--data", str(rows), str(table), "--max-steps", "1"]
    assert train(command) == 2
    first, *listed = capsys.readouterr().err.splitlines()
    assert first.endswith("2 of 28 records cannot be used (--skip-bad leaves them out):")
    assert [line.split(": ")[0] for line in listed] == [f"{rows}:25", f"{table}:3"]
    assert train([*command, "--skip-bad", "--data-weights", "1", "2"]) == 0
    error = capsys.readouterr().err
    assert "28 samples" in error and "2 bad records left out" in error

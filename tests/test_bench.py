"""Tests of scripts/bench.py: its records, its table, its peers, and wrong command lines."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench
from benchmark import records, table
from benchmark.model_shapes import SHAPES
from benchmark.random_checkpoints import write_random_checkpoint
from benchmark.step_profile import GROUPS

from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

COMMON_KEYS = {
    *("peer", "model", "gc", "targets", "bs", "seq", "r", "attention", "optim", "graphs"),
    *("load_s", "loaded_gb", "trainable"),
    *("peak_gb", "reserved_gb", "pinned_gb", "gpu", "versions", "date"),
    *("warmup_s", "warmup_steps_s", "tok_s", "loss0", "lossN"),
}
STEP_KEYS = COMMON_KEYS | {"ms", "min_ms", "max_ms"}
SHORT_KEYS = COMMON_KEYS | {
    *("ga", "steps", "s_per_step", "samples_s", "samples_s_all", "mean_len", "train_s")
}
PLAN_KEYS = {"planned_gb", "planned_ms", "host_gb", "plan"}  # of minitune's records only


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "model", vocab=512)


def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(table.BENCH), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd)


def results(done: subprocess.CompletedProcess) -> list[dict]:
    marked = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in marked]


# ---- records


@pytest.mark.slow
def test_a_step_and_a_peers_step_give_records_of_the_same_keys_from_the_same_loss(folder, tmp_path):
    for name in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(name)
    size = ("--batch", 2, "--tokens", 32, "--r", 4, "--steps", 2, "--warmup", 1)
    json_file = tmp_path / "records.jsonl"
    done = run("--model", folder, *size, "--peer", "hf", "--json", json_file)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs, ours = results(done)
    assert set(ours) - PLAN_KEYS == set(theirs) == STEP_KEYS and set(ours) > PLAN_KEYS
    assert (theirs["peer"], ours["peer"]) == ("hf", "minitune")
    assert ours["trainable"] == theirs["trainable"]
    assert ours["min_ms"] <= ours["ms"] <= ours["max_ms"] and len(ours["warmup_steps_s"]) == 1
    if ours["gpu"] is None:  # on the CPU both draw their tokens from the same generator
        assert ours["loss0"] == pytest.approx(theirs["loss0"], rel=5e-3)
    assert [json.loads(line) for line in json_file.read_text().splitlines()] == [theirs, ours]
    assert f"{theirs['ms'] / ours['ms']:.2f}x" in done.stdout


def test_short_samples_run_through_the_trainer_and_give_a_record(folder):
    size = ("--batch", 1, "--tokens", 200, "--r", 4, "--steps", 4, "--warmup", 2)
    done = run("--model", folder, "--short", *size)
    assert done.returncode == 0, done.stderr
    (record,) = results(done)
    assert set(record) == SHORT_KEYS | PLAN_KEYS
    assert record["warmup_s"] == pytest.approx(sum(record["warmup_steps_s"]), abs=0.002)
    assert record["samples_s"] == pytest.approx(4 / record["s_per_step"], rel=0.01)
    mean_step = (record["train_s"] - record["warmup_s"]) / 2
    assert record["samples_s_all"] == pytest.approx(4 / mean_step, rel=0.05)
    # The median of two steps is their mean.
    assert record["s_per_step"] == pytest.approx(mean_step, rel=0.05)


def test_short_samples_have_the_lengths_that_were_drawn(tmp_path):
    texts = [{"text": text} for text in records.short_texts(300)]
    assert [record["text"] for record in texts] == records.short_texts(300)
    tiny = {
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
    }
    write_random_checkpoint(tmp_path / "m", SHAPES["135m"] | tiny)
    samples = tokenize_dataset(texts, Tokenizer.from_folder(tmp_path / "m"), 2048).samples
    lengths = [len(sample.input_ids) for sample in samples]
    # A letter is a token; the end token follows.
    assert lengths == [len(record["text"]) + 1 for record in texts]
    assert min(lengths) >= 24 and max(lengths) <= 1024 and 110 < sum(lengths) / len(lengths) < 125


@pytest.mark.gpu
def test_every_part_of_a_step_shows_up_in_its_profile(tmp_path):
    # A matmul with a dimension of the vocabulary, 512, counts as the loss: no other size is 512.
    wide = make_tiny_model(tmp_path / "model", hidden=128, ffn=192)
    size = ("--batch", 2, "--tokens", 200, "--steps", 3, "--warmup", 3)
    done = run("--model", wide, *size, "--profile")
    assert done.returncode == 0, done.stderr
    (record,) = results(done)
    profile = record.pop("profile")
    assert set(record) == STEP_KEYS | PLAN_KEYS
    assert set(profile) == set(GROUPS)
    assert all(profile[name] > 0 for name in profile if name != "idle"), profile


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --model --all --make --kernels is required"),
        (["--model", "nowhere"], "model folder nowhere does not exist"),
        (["--model", "MODEL", "--batch", "0"], "--batch is 0; expected at least 1"),
        (["--model", "MODEL", "--targets", "q"], "--targets is q; choose from all, qkvo"),
        (["--model", "MODEL", "--tokens", "512"], "--tokens 512 is more than the 256 positions"),
        (["--model", "MODEL", "--rows", "1"], "--rows does not go with --model"),
        (["--model", "MODEL", "--short", "--profile"], "--profile measures single steps"),
        (
            ["--model", "MODEL", "--short", "--tokens", "64", "--steps", "5"],
            "--steps 5 of --short are all in the 5 of --warmup",
        ),
        (["--model", "MODEL", "--host-memory", "1GiB"], "--host-memory needs --checkpointing auto"),
        (["--all", "DIR", "--r", "8"], "--r does not go with --all"),
        (["--all", "DIR", "--rows", "2,99"], "there is no row 99; the rows are 1 to 17"),
        (["--all", "DIR", "--rows", "two"], "expected numbers with commas between them"),
        (["--kernels", "--steps", "3"], "--steps does not go with --kernels"),
        (["--make", "3b", "DIR"], "--make 3b: no such shape; choose from 8b, 1b, 135m, qwen3-8b"),
        (["--make", "135m", "MODEL"], "holds a model already"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, message, folder, capsys):
    assert bench.main([str(folder) if part == "MODEL" else part for part in arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert printed.startswith("bench.py: error: ")


# ---- the table


def test_a_process_without_a_result_becomes_one_line_that_says_why():
    code = "print('noise'); print('RESULT {\"ms\": 2}'); 1 / 0"
    assert table.child_record(["-c", code], 60) == {"ms": 2}
    failed = table.child_record(["-c", "1 / 0"], 60)
    assert failed == {"error": "exit code 1: ZeroDivisionError: division by zero"}
    assert table.child_record(["-c", "pass"], 60) == {"error": "exit code 0: no output"}
    endless = table.child_record(["-c", "import time; time.sleep(60)"], 0.2)
    assert endless == {"error": "no result within 0.2 s"}


def test_the_table_has_a_line_for_every_row_and_attention_with_ratios_and_failures(
    capsys, monkeypatch, tmp_path
):
    commands = []

    def child_record(command, timeout, **options):
        command = [str(part) for part in command]
        commands.append(command)
        if "--make" in command or "triton" in command:
            return {"error": "exit code 1: boom"}
        theirs, short = str(table.PEERS) in command, "--short" in command
        if theirs:
            return {"samples_s": 5.0, "peak_gb": 6} if short else {"ms": 412.0, "peak_gb": 7.03}
        place = {"host_gb": 1.5, "date": "2026-11-25", "gpu": "a card"}
        return place | ({"samples_s": 90.0, "peak_gb": 9} if short else {"ms": 206.0, "peak_gb": 8})

    monkeypatch.setattr(table, "child_record", child_record)
    with pytest.raises(ValueError, match="8b could not be made: exit code 1: boom"):
        table.run_cases(tmp_path, [2], ["auto"], ["unsloth"], [], 9, None)
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").touch()
    peers, counts, json_file = ["unsloth", "hf"], ["--steps", "4"], tmp_path / "records.jsonl"
    assert not table.run_cases(tmp_path, [4, 7], ["triton", "auto"], peers, counts, 9, json_file)
    lines = capsys.readouterr().out.splitlines()
    failed, steps, short = (re.split(r"\s{2,}", line) for line in lines[-3:])
    assert failed[:5] == [
        *("4", "8B, all, 1 x 8192", "recomputed", "triton", "failed (exit code 1: boom)"),
    ]
    assert failed[10] == "-"
    assert steps == [
        *("4", "8B, all, 1 x 8192", "recomputed", "auto", "206", "8", "1.5"),
        *("unsloth; hf", "412; 412", "7.03; 7.03", "2.00x", "2026-11-25", "a card"),
    ]
    # Short samples run once, and Unsloth is the only peer with their recipe.
    assert short == [
        *("7", "8B, all, short samples", "recomputed", "auto", "90", "9", "1.5"),
        *("unsloth", "5", "6", "18.00x", "2026-11-25", "a card"),
    ]
    emitted = [json.loads(line) for line in json_file.read_text().splitlines()]
    assert [record["row"] for record in emitted] == [4, 4, 4, 4, 7, 7]
    assert all("--steps" in command for command in commands[1:])


def test_every_row_of_the_table_is_a_command_line_that_the_benchmark_takes(folder, monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    for case in bench.CASES.values():
        flags = [*case.flags(), *case.own_flags("triton")]
        flags[flags.index("--tokens") + 1] = "256"  # the positions of the tiny model
        a = bench.parse(["--model", str(folder), *flags])
        assert (a.batch, a.targets, a.r, a.short) == (case.batch, case.targets, case.r, case.short)
        assert (a.memory_budget, a.host_memory) == (case.memory_budget, case.host_memory)
        assert a.memory_limit == case.memory_limit
        assert a.offload_embedding == (case.mode == "offloaded") == bool(case.host_memory)
        assert (a.optim == "adamw_8bit") == (case.eight_bit or case.short)


# ---- peers


def test_the_peers_script_imports_no_peer_until_one_is_chosen():
    path = str(ROOT / "tests")
    code = f"import sys; sys.path.insert(0, {path!r}); import referees.peers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    libraries = {"transformers", "peft", "trl", "bitsandbytes", "unsloth", "liger_kernel"}
    assert not loaded & {"torch", "datasets", *libraries}


def test_a_peer_without_such_a_recipe_is_named_in_the_error(folder, monkeypatch):
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(ROOT))
    record = table.peer_record("liger", folder, ["--short"], 60)
    assert record["peer"] == "liger"
    assert "--short is Unsloth's recipe; liger has none here" in record["error"]

"""scripts/bench.py and what belongs to it: the records, the table, the profile's groups, random checkpoints, peers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_tiny_model
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

BOTH = {
    "peer",
    "model",
    "gc",
    "targets",
    "bs",
    "seq",
    "r",
    "attention",
    "optim",
    "graphs",
    "load_s",
    "loaded_gb",
    "trainable",
}
BOTH |= {
    "peak_gb",
    "reserved_gb",
    "pinned_gb",
    "gpu",
    "versions",
    "date",
    "warmup_s",
    "warmup_steps_s",
    "tok_s",
}
BOTH |= {"loss0", "lossN"}
STEP = BOTH | {"ms", "min_ms", "max_ms"}
SHORT = BOTH | {"ga", "steps", "s_per_step", "samples_s", "samples_s_all", "mean_len", "train_s"}

PLANNED = {"planned_gb", "planned_ms", "host_gb", "plan"}  # of our own records

TINY = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "model", vocab=512)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "bench.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd)


def results(done: subprocess.CompletedProcess) -> list[dict]:
    marked = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in marked]


# ---- records


def test_a_step_and_a_peers_step_give_records_of_the_same_keys_from_the_same_loss(folder, tmp_path):
    for name in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(name)
    size = ("--batch", 2, "--tokens", 32, "--r", 4, "--steps", 2, "--warmup", 1)
    done = run("--model", folder, *size, "--peer", "hf", "--json", tmp_path / "records.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    theirs, ours = results(done)
    assert set(ours) - PLANNED == set(theirs) == STEP and set(ours) > PLANNED
    assert (theirs["peer"], ours["peer"]) == ("hf", "minitune")
    assert ours["trainable"] == theirs["trainable"]
    assert ours["min_ms"] <= ours["ms"] <= ours["max_ms"] and len(ours["warmup_steps_s"]) == 1
    if ours["gpu"] is None:  # where both draw their tokens from the same generator
        assert ours["loss0"] == pytest.approx(theirs["loss0"], rel=5e-3)
    assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [
        theirs,
        ours,
    ]
    assert f"{theirs['ms'] / ours['ms']:.2f}x" in done.stdout


def test_short_samples_run_through_the_trainer_and_give_a_record(folder):
    size = ("--batch", 1, "--tokens", 200, "--samples", 40, "--r", 4, "--steps", 4, "--warmup", 2)
    done = run("--model", folder, "--short", *size)
    assert done.returncode == 0, done.stderr
    (record,) = results(done)
    assert set(record) == SHORT | PLANNED
    assert record["warmup_s"] == pytest.approx(sum(record["warmup_steps_s"]), abs=0.002)
    assert record["samples_s"] == pytest.approx(4 / record["s_per_step"], rel=0.01)
    overall = (record["train_s"] - record["warmup_s"]) / 2
    assert record["samples_s_all"] == pytest.approx(4 / overall, rel=0.05)
    assert record["s_per_step"] == pytest.approx(
        overall, rel=0.05
    )  # the median of two steps is their mean


def test_short_samples_have_the_lengths_they_are_drawn_with(scripts, tmp_path):
    from benchmark import random_checkpoints, records

    from minitune.data.tokenize_dataset import prepare
    from minitune.data.tokenizer import Tokenizer

    texts = [{"text": text} for text in records.short_texts(300)]
    assert [record["text"] for record in texts] == records.short_texts(300)
    random_checkpoints.write_random_llama(
        tmp_path / "m", random_checkpoints.SHAPES["135m"] | TINY | {"num_hidden_layers": 1}
    )
    samples = prepare(texts, Tokenizer.from_folder(tmp_path / "m"), 2048).samples
    lengths = [len(sample.input_ids) for sample in samples]
    assert lengths == [
        len(record["text"]) + 1 for record in texts
    ]  # a token a letter, and the end token
    assert min(lengths) >= 24 and max(lengths) <= 1024 and 110 < sum(lengths) / len(lengths) < 125


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --model --all --make is required"),
        (["--model", "nowhere"], "model folder nowhere does not exist"),
        (["--model", "MODEL", "--batch", "0"], "--batch is 0; expected at least 1"),
        (["--model", "MODEL", "--targets", "q"], "invalid choice: 'q'"),
        (["--model", "MODEL", "--tokens", "512"], "--tokens 512 is more than the 256 positions"),
        (["--model", "MODEL", "--rows", "1"], "--rows does not go with --model"),
        (["--model", "MODEL", "--short", "--profile"], "--profile looks at single steps"),
        (
            ["--model", "MODEL", "--short", "--tokens", "64", "--steps", "5"],
            "leaves none after the 5 of --warmup",
        ),
        (["--all", "DIR", "--r", "8"], "--r does not go with --all"),
        (["--all", "DIR", "--rows", "2,99"], "there is no row 99; the rows are 1 to 17"),
        (["--all", "DIR", "--rows", "two"], "expected numbers with commas between them"),
        (["--make", "3b", "DIR"], "--make 3b: no such shape; choose from 8b, 1b, 135m"),
        (["--make", "135m", "MODEL"], "holds a model already"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_one_line_and_exit_code_2(
    arguments, message, scripts, folder, capsys
):
    import bench

    assert bench.main([str(folder) if part == "MODEL" else part for part in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("bench.py: error: ")


# ---- the table


def test_a_process_without_a_result_becomes_one_line_that_says_why(scripts):
    from benchmark import table

    assert table.child(["-c", "print('noise'); print('RESULT {\"ms\": 2}'); 1 / 0"], 60) == {
        "ms": 2
    }
    failed = table.child(["-c", "1 / 0"], 60)
    assert failed == {"error": "exit code 1: ZeroDivisionError: division by zero"}
    assert table.child(["-c", "pass"], 60) == {"error": "exit code 0: nothing was said"}
    assert table.child(["-c", "import time; time.sleep(60)"], 0.2) == {
        "error": "no result within 0.2 s"
    }


def test_the_table_has_a_line_for_every_row_and_attention_with_ratios_and_failures(
    scripts, capsys, monkeypatch, tmp_path
):
    from benchmark import table

    commands, emitted = [], []

    def child(command, timeout, **options):
        command = [str(part) for part in command]
        commands.append(command)
        if "--make" in command or "triton" in command:
            return {"error": "exit code 1: boom"}
        if str(table.PEERS) in command:
            return (
                {"samples_s": 5.0, "peak_gb": 6}
                if "--short" in command
                else {"ms": 412.0, "peak_gb": 7.03}
            )
        return (
            {"samples_s": 90.0, "peak_gb": 9}
            if "--short" in command
            else {"ms": 206.0, "peak_gb": 8.1}
        )

    monkeypatch.setattr(table, "child", child)
    with pytest.raises(ValueError, match="8b could not be made: exit code 1: boom"):
        table.run_table(tmp_path, [2], ["auto"], ["unsloth"], [], 9, emitted.append)
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").touch()
    peers = ["unsloth", "hf"]
    assert not table.run_table(
        tmp_path, [4, 7], ["triton", "auto"], peers, ["--steps", "4"], 9, emitted.append
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == [
        "4",
        "4",
        "7",
    ]  # short samples: one attention is as the other
    assert "failed (exit code 1: boom)" in lines[-3]
    assert lines[-2].split()[-8:] == ["412;", "hf", "412", "2.00x", "715", "8.1", "7.03", "10.5"]
    assert lines[-1].split()[-7:] == ["unsloth", "5", "18.00x", "90", "9", "6", "10"]
    assert [record["row"] for record in emitted] == [
        4,
        4,
        4,
        4,
        7,
        7,
    ]  # short samples are Unsloth's alone
    assert all("--steps" in command for command in commands[1:])


# ---- the profile


def test_kernels_are_grouped_by_file_by_operation_and_by_the_sizes_they_multiply(scripts):
    from benchmark import step_profile

    own = step_profile.own_kernels()
    assert set(own.values()) >= {"attention", "dequantisation", "loss", "elementwise"}
    assert own["_rope"] == "elementwise" and set(own.values()) <= set(step_profile.GROUPS)

    def group(kernel, operation="", shapes=()):
        return step_profile.group_of(kernel, operation, shapes, own, vocab=128256, thin=64)

    gemm = "sm90_xmma_gemm_bf16bf16_tilesize128x128"
    assert group(gemm, "aten::mm", [[4096, 4096], [4096, 16]]) == "LoRA"
    assert group(gemm, "aten::addmm", [[4096], [4096, 48], [48, 6144], [], []]) == "LoRA"
    assert group(gemm, "aten::mm", [[4096, 4096], [4096, 14336]]) == "base matmuls"
    assert (
        group("splitKreduce_kernel", "aten::bmm", [[1, 4096, 4096], [1, 4096, 4096]])
        == "base matmuls"
    )
    assert group(gemm, "aten::mm", [[1024, 4096], [4096, 128256]]) == "loss"
    assert group("vectorized_elementwise", "aten::index", [[128256, 4096], [4096]]) == "elementwise"
    assert (
        group(
            "cudnn_generated_sdpa_sm90_bprop", "aten::_scaled_dot_product_cudnn_attention_backward"
        )
        == "attention"
    )
    assert group(gemm) == "base matmuls"
    assert group("Memcpy HtoD (Pageable -> Device)") == "elementwise"


def test_every_kernel_counts_once_whether_an_operation_launched_it_or_nothing_did(scripts):
    from benchmark import step_profile

    def device(name, microseconds, annotation=False):
        time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(
            device_type=DeviceType.CUDA,
            name=name,
            is_user_annotation=annotation,
            time_range=time_range,
        )

    def operation(name, shapes, *kernels):
        launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
        return SimpleNamespace(
            device_type=DeviceType.CPU, name=name, input_shapes=shapes, kernels=launched
        )

    events = [
        operation("aten::mm", [[4096, 4096], [4096, 4096]], ("gemm", 70)),
        operation("aten::mm", [[4096, 4096], [4096, 16]], ("gemm", 5)),
        operation("aten::empty", []),
        device("gemm", 70),
        device("gemm", 5),
        device("_attention_fwd", 20),
        device("a step", 95, annotation=True),
    ]
    times = step_profile.group_times(events, {"_attention_fwd": "attention"}, 128256, 64)
    assert {name: t for name, t in times.items() if t} == {
        "base matmuls": 70,
        "LoRA": 5,
        "attention": 20,
    }


def test_the_profiler_tells_the_sizes_of_a_matmul_that_writes_into_spare_columns(scripts):
    import torch
    from benchmark import step_profile

    x, thin = torch.zeros(256, 128 + 16), torch.zeros(16, 128)
    with torch.profiler.profile(record_shapes=True) as profiler:
        x[:, 128:].addmm_(x[:, :128], thin.t(), beta=0)
        torch.mm(x[:, :128], torch.zeros(128, 512), out=torch.zeros(256, 512))
    matmuls = [event for event in profiler.events() if event.name in step_profile.MATMULS]
    groups = [
        step_profile.group_of("gemm", event.name, event.input_shapes, {}, 9, 64)
        for event in matmuls
    ]
    assert groups == ["LoRA", "base matmuls"]
    assert not step_profile.group_times(profiler.events(), {}, 9, 64)  # no kernel of a GPU was seen


@pytest.mark.gpu
def test_every_part_of_a_step_shows_up_in_its_profile(tmp_path):
    wide = make_tiny_model(tmp_path / "model", hidden=128, ffn=256)
    done = run(
        "--model", wide, "--batch", 2, "--tokens", 256, "--steps", 3, "--warmup", 3, "--profile"
    )
    assert done.returncode == 0, done.stderr
    (record,) = results(done)
    profile = record.pop("profile")
    assert set(record) == STEP
    assert all(profile[name] > 0 for name in profile if name != "idle"), profile


# ---- random checkpoints


def test_the_shapes_have_as_many_parameters_as_the_models_they_are_named_after(scripts):
    from benchmark.random_checkpoints import SHAPES, tensor_shapes

    counts = {
        name: sum(map(math.prod, tensor_shapes(config).values())) for name, config in SHAPES.items()
    }
    assert counts == {"8b": 8_030_261_248, "1b": 1_235_814_400, "135m": 134_515_008}


def test_a_random_checkpoint_loads_here_and_in_transformers_with_one_token_a_letter(
    scripts, tmp_path
):
    transformers = pytest.importorskip("transformers")
    import torch
    from benchmark.random_checkpoints import SHAPES, write_random_llama

    from minitune import FastLanguageModel

    config = SHAPES["8b"] | TINY | {"num_hidden_layers": 2, "vocab_size": 300}
    folder = write_random_llama(tmp_path / "model", config, shard_bytes=1e5)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, tokenizer = FastLanguageModel.from_pretrained(folder, load_in_4bit=False, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.encode("letters")
    assert (
        ids == transformers.AutoTokenizer.from_pretrained(folder)("letters")["input_ids"]
        and len(ids) == 7
    )
    batch = torch.tensor([ids])
    torch.testing.assert_close(
        model(input_ids=batch).logits, theirs(input_ids=batch).logits, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="holds a model already"):
        write_random_llama(folder, config)


# ---- peers


def test_the_peers_script_imports_no_peer_until_one_is_chosen():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import referees.peers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "torch",
        "transformers",
        "peft",
        "trl",
        "bitsandbytes",
        "unsloth",
        "liger_kernel",
        "datasets",
    }


def test_a_peer_that_is_not_there_or_has_no_such_recipe_is_named_in_the_error(
    scripts, folder, monkeypatch
):
    from benchmark import table

    monkeypatch.setitem(os.environ, "PYTHONPATH", str(ROOT))
    record = table.peer_record("liger", folder, ["--short"], 60)
    assert (
        record["peer"] == "liger"
        and "--short is Unsloth's recipe; liger has none here" in record["error"]
    )


# ---- plans


def test_the_shapes_that_plans_are_checked_on_are_models_with_a_budget_for_each(scripts):
    import bench
    from benchmark import check_planner

    from minitune.config.model_config import ModelConfig
    from minitune.config.training_config import parse_bytes

    for seed in range(50):
        config, arguments = check_planner.drawn(seed)
        assert ModelConfig.from_dict(config).hidden_size == config["hidden_size"]
        assert (config, arguments) == check_planner.drawn(seed)
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert parse_bytes(given["--memory-budget"]) > 10**8
        assert given.keys() <= {
            f"--{name.replace('_', '-')}" for name in vars(bench.parse(["--make", "8b", "m"]))
        }


def test_a_plot_has_a_line_for_each_system_and_a_point_for_each_length(scripts, tmp_path, capsys):
    from benchmark import plots

    common = {"bs": 2, "host_gb": 0.0, "model": "8b"}
    records = [
        common | {"peer": "unsloth", "seq": 4096, "peak_gb": 8.0},
        common | {"peer": "unsloth", "seq": 1024, "peak_gb": 6.5},
        common | {"peer": "minitune", "seq": 1024, "peak_gb": 6.0, "host_gb": 4.0},
        common | {"peer": "minitune", "seq": 1024, "peak_gb": 7.0},
        common | {"peer": "minitune", "seq": 2048, "peak_gb": 9.0, "samples_s": 90.0},
        common | {"peer": "minitune", "seq": 2048, "peak_gb": None},
        {"peer": "hf", "error": "exit code 1"},
    ]
    found = plots.points(records)
    assert found == {
        "8b, unsloth": [(2048, 6.5), (8192, 8.0)],
        "8b, minitune, with host memory": [(2048, 6.0)],
        "8b, minitune": [(2048, 7.0)],
    }
    (tmp_path / "nothing.jsonl").write_text(json.dumps(records[-1]) + "\n")
    assert plots.main([str(tmp_path / "nothing.jsonl"), "--output", str(tmp_path / "x.png")]) == 2
    assert "there is no record of a run that went well" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    plots.plot(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

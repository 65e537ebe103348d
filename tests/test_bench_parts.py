"""Tests of scripts/benchmark: the profile's groups, random checkpoints, plan checks, plots."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench
from benchmark import check_planner, plots, step_profile
from benchmark.model_shapes import SHAPES
from benchmark.random_checkpoints import write_random_checkpoint

from minitune import FastLanguageModel
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import parse_bytes

TINY = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}

# ---- the profile


def test_kernels_are_grouped_by_file_by_operation_and_by_the_sizes_they_multiply():
    own = step_profile.own_kernels()
    assert set(own.values()) == set(step_profile.GROUPS) - {"idle"}
    assert own["_rope"] == "elementwise" and own["_few_row_products"] == "base matmuls"

    def group(kernel, operation="", shapes=()):
        return step_profile.group_of(kernel, operation, shapes, own, vocab=128256, max_rank=64)

    gemm = "sm90_xmma_gemm_bf16bf16_tilesize128x128"
    square = [[1, 4096, 4096], [1, 4096, 4096]]
    backward = "aten::_scaled_dot_product_cudnn_attention_backward"
    assert group(gemm, "aten::mm", [[4096, 4096], [4096, 16]]) == "LoRA"
    assert group(gemm, "aten::addmm", [[4096], [4096, 48], [48, 6144], [], []]) == "LoRA"
    assert group(gemm, "aten::mm", [[4096, 4096], [4096, 14336]]) == "base matmuls"
    assert group("splitKreduce_kernel", "aten::bmm", square) == "base matmuls"
    assert group(gemm, "aten::mm", [[1024, 4096], [4096, 128256]]) == "loss"
    assert group("vectorized_elementwise", "aten::index", [[128256, 4096], [4096]]) == "elementwise"
    assert group("cudnn_generated_sdpa_sm90_bprop", backward) == "attention"
    assert group(gemm) == "base matmuls"
    assert group("Memcpy HtoD (Pageable -> Device)") == "elementwise"


def test_every_kernel_counts_once_whether_or_not_an_operation_launched_it():
    def device(name, microseconds, annotation=False):
        return SimpleNamespace(
            device_type=DeviceType.CUDA,
            name=name,
            is_user_annotation=annotation,
            time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
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
    nonzero = {name: t for name, t in times.items() if t}
    assert nonzero == {"base matmuls": 70, "LoRA": 5, "attention": 20}


def test_the_profiler_tells_the_sizes_of_a_matmul_that_writes_into_lora_columns():
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
    assert not step_profile.group_times(profiler.events(), {}, 9, 64)  # no kernel of a GPU ran


# ---- random checkpoints


def test_the_shapes_have_as_many_parameters_as_the_models_they_are_named_after():
    counts = {
        name: sum(map(math.prod, ModelConfig.from_dict(config).tensor_shapes().values()))
        for name, config in SHAPES.items()
    }
    assert counts == {
        "8b": 8_030_261_248,
        "1b": 1_235_814_400,
        "135m": 134_515_008,
        "qwen3-8b": 8_190_735_360,
        "qwen2.5-7b": 7_615_616_512,
        "mistral-7b": 7_241_732_096,
        "ministral3-8b": 8_489_553_920,
        "smollm3-3b": 3_075_098_624,
        "granite-8b": 8_170_864_640,
        "phi-4": 14_659_507_200,
        "phi-4-mini": 3_836_021_760,
        "olmo3-7b": 7_298_011_136,
        "gemma2-9b": 9_241_705_984,
        "gemma3-4b": 3_880_263_168,
    }


def test_a_random_checkpoint_loads_here_and_in_transformers_with_one_token_a_letter(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = SHAPES["8b"] | TINY
    folder = write_random_checkpoint(tmp_path / "model", config, shard_bytes=1e5)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, tokenizer = FastLanguageModel.from_pretrained(folder, load_in_4bit=False, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.encode("letters")
    assert ids == transformers.AutoTokenizer.from_pretrained(folder)("letters")["input_ids"]
    assert len(ids) == 7
    batch = torch.tensor([ids])
    torch.testing.assert_close(
        model(input_ids=batch).logits, theirs(input_ids=batch).logits, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="holds a model already"):
        write_random_checkpoint(folder, config)


# ---- plans and plots


def test_the_shapes_that_plans_are_checked_on_are_models_with_a_budget_for_each():
    known = {f"--{name.replace('_', '-')}" for name in vars(bench.parse(["--make", "8b", "m"]))}
    for seed in range(50):
        config, flags = check_planner.random_case(seed)
        assert ModelConfig.from_dict(config).hidden_size == config["hidden_size"]
        assert (config, flags) == check_planner.random_case(seed)
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        assert parse_bytes(given["--memory-budget"]) > 10**8
        assert given.keys() <= known


def test_a_plot_has_a_line_for_each_system_and_a_point_for_each_length(tmp_path, capsys):
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
    failures, image = tmp_path / "failures.jsonl", tmp_path / "x.png"
    failures.write_text(json.dumps(records[-1]) + "\n")
    assert plots.main([str(failures), "--output", str(image)]) == 2
    assert "there is no record of a successful run of steps" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    plots.plot(found, image)
    assert image.read_bytes().startswith(b"\x89PNG")

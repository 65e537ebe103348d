"""Tests of the memory model: it agrees with a real model, and with measurements."""

import math
from dataclasses import replace

import pytest
import torch
from family_configs import FAMILIES
from gguf_files import make_tiny_gguf
from plan_cases import GIB, LONG, SHORT, STATIC
from tiny import make_tiny_model
from tiny_families import make_tiny_family

from minitune import FastLanguageModel
from minitune.commands.plan import find_planned_model
from minitune.config.architectures import LORA_TARGETS
from minitune.gguf.base.load import file_bytes, open_base
from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel, Storage, static_parts
from minitune.memory.model_shape import ModelShape
from minitune.memory.plan import Candidate, Plan, Workload
from minitune.memory.planner import Planner
from minitune.memory.search import evaluate, uniform_plan
from minitune.memory.stored_weights import StoredWeights
from minitune.model.activations import LayerPlan, SaveLevel
from minitune.model.layers import new_residual
from minitune.model.packed_sequences import PackedSequences

LEVELS = (SaveLevel.INPUT, SaveLevel.ATTENTION, SaveLevel.QKV, SaveLevel.ALL)
# The last case of each family, and the one with biases.
LAST_CASES = {model_type: case for case, (model_type, _) in FAMILIES.items()}
ONE_CASE_PER_FAMILY = [*LAST_CASES.values(), "qwen3 with biases"]


def test_the_workspace_of_attention_is_free_when_the_mlp_runs():
    for level in (SaveLevel.INPUT, SaveLevel.QKV, SaveLevel.ALL):
        for peak in (LONG.forward_peak, LONG.backward_peak):
            assert peak(level, None, True) == peak(level, None, False)  # all rows at once
    for peak in (LONG.forward_peak, LONG.backward_peak):
        assert peak(SaveLevel.INPUT, 256, True) > peak(SaveLevel.INPUT, 256, False)


@pytest.mark.parametrize(
    ("level", "gib", "ms"), [(SaveLevel.INPUT, 8.02, 316), (SaveLevel.ALL, 18.42, 242)]
)
def test_the_plan_agrees_with_measurements_on_an_h200(level, gib, ms):
    """scripts/bench.py on one H200, November 2026: peak within 5%, time within 15%."""
    candidate = Candidate(level, LayerPlan(level), 32, None)
    plan = evaluate(SHORT, candidate, STATIC, DeviceRates())
    assert plan.peak / GIB == pytest.approx(gib, rel=0.05)
    assert 1e3 * plan.seconds == pytest.approx(ms, rel=0.15)


def bytes_of(tensors) -> int:
    """Return the bytes of tensors or quantised weights."""
    return sum(t.nbytes for t in tensors)


def bytes_of_weights(model) -> int:
    """Return the bytes of a model's frozen weights; tied weights count once."""
    modules = [module for module in model.modules() if getattr(module, "quantized", None)]
    quantized = {id(module.quantized): module.quantized for module in modules}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return bytes_of(frozen) + bytes_of(quantized.values())


@pytest.mark.parametrize("case", ONE_CASE_PER_FAMILY)
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_static_bytes_are_those_of_a_loaded_model_of_each_family(tmp_path, case, load_in_4bit):
    folder = make_tiny_family(tmp_path / "m", case)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=200, dtype=torch.float32, load_in_4bit=load_in_4bit, device="cpu"
    )
    weights = StoredWeights.of_folder(model.config, 4, load_in_4bit)
    assert StoredWeights.of_model(model).formats == weights.formats
    ropes = [t for rope in model.layer_context.ropes for t in vars(rope).values() if t is not None]
    FastLanguageModel.get_peft_model(model, r=8)
    adapter = [p for _, p in model.trainable_parameters()]
    sizes = ModelShape.of(model.config, model.lora, 4, model.max_seq_length, "cpu", weights)
    planned = dict(static_parts(model.config, sizes, model.max_seq_length))
    # small weights fill their last block of scales in part
    exactly = {"rel": 0.01 if load_in_4bit else 0}
    assert planned["weights"] == pytest.approx(bytes_of_weights(model), **exactly)
    assert planned["adapter and its gradient"] == 2 * bytes_of(adapter)
    assert planned["RoPE tables"] == bytes_of(ropes)
    buffers = model.layer_context.weight_buffers.allocate(
        model.model.layers[0].fused_linears, model.dtype, model.device
    )
    assert planned["dequantisation buffer"] == bytes_of(buffers.values())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_plan_for_any_dtype_has_the_weights_of_the_loaded_model(tmp_path, dtype, tie):
    folder = make_tiny_model(tmp_path / "m", dtype=torch.bfloat16, tie=tie)
    model, _ = FastLanguageModel.from_pretrained(
        folder, dtype=dtype, load_in_4bit=False, device="cpu"
    )
    planned = find_planned_model(str(folder), load_in_4bit=False, dtype=dtype)
    assert planned.dtype == dtype
    assert planned.weights == StoredWeights.of_model(model)
    assert planned.weights.converts_head == (dtype != torch.bfloat16)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("method", "dtype", "formats", "converts_head"),
    [
        ("q4_k_m", torch.float32, ("Q4_K", "Q6_K"), True),
        ("q8_0", torch.float16, ("Q8_0",), True),
        ("f16", torch.float16, ("F16",), False),
        ("f16", torch.float32, ("F16",), True),
    ],
)
def test_the_bytes_of_a_gguf_file_are_those_of_the_loaded_model(
    tmp_path, method, dtype, formats, converts_head, tie
):
    file = make_tiny_gguf(tmp_path, method, tie=tie)
    model, _ = FastLanguageModel.from_pretrained(file, dtype=dtype, device="cpu")
    weights = file_bytes(open_base(file)[1], dtype)
    assert weights.formats == formats
    assert weights.converts_head == converts_head
    loaded = StoredWeights.of_model(model)
    assert replace(loaded, formats=formats) == weights
    for offload_embedding in (False, True):
        sizes = ModelShape.of(model.config, None, dtype.itemsize, 256, "cpu", weights)
        storage = Storage(offload_embedding=offload_embedding)
        planned = dict(static_parts(model.config, sizes, 256, storage))["weights"]
        on_host = weights.embedding if offload_embedding and not tie else 0
        assert planned == bytes_of_weights(model) - on_host


def test_a_planner_counts_the_types_of_a_gguf_file(tmp_path):
    file = make_tiny_gguf(tmp_path, "q4_k_m", tie=False, vocab=4096)
    model, _ = FastLanguageModel.from_pretrained(file, dtype=torch.float16, device="cpu")
    plan = Planner(SaveLevel.INPUT).plan_for_tokens(model, 100)

    def planned(weights: StoredWeights) -> Plan:
        sizes = ModelShape.of(model.config, None, 2, 256, "cpu", weights)
        static = (("allocated", sizes.weight_buffer_bytes),)
        return uniform_plan(MemoryModel(sizes, Workload(100, 100)), SaveLevel.INPUT, static)

    weights = file_bytes(open_base(file)[1], torch.float16)
    assert plan == planned(weights)
    room_of_the_head = 4096 * 256 * 2  # the loss takes the most memory of this model
    assert plan.peak == planned(replace(weights, converts_head=False)).peak + room_of_the_head


@pytest.mark.parametrize("targets", [LORA_TARGETS, LORA_TARGETS[:4], ("v_proj",)])
def test_sizes_from_the_configuration_are_those_of_the_model(tmp_path, targets):
    shape = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 160}
    folder = make_tiny_model(tmp_path / "m", **shape)
    model, _ = FastLanguageModel.from_pretrained(folder, dtype=torch.float32)
    FastLanguageModel.get_peft_model(model, r=8, target_modules=targets)
    sizes = ModelShape.of(model.config, model.lora, 4, 256, model.device.type)
    layer = model.model.layers[0]
    for fused, linear in zip(sizes.fused, layer.fused_linears, strict=True):
        assert fused.lora_columns == linear.lora_columns
        assert fused.adapters == len(linear.adapted)
        assert fused.weight_elements == math.prod(linear.weight_shape)
    assert sizes.lora_parameters == sum(p.numel() for _, p in model.trainable_parameters())
    linears = [linear for _, linear in model.linears()]
    parameters = sum(linear.in_features * linear.out_features for linear in linears)
    assert sizes.layers * sizes.layer_parameters == parameters

    memory = MemoryModel(sizes, Workload(40, max_seqlen=40))
    s = new_residual(torch.randn(40, 64, device=model.device))
    packed = PackedSequences.from_positions(torch.arange(40)).to(model.device)
    for level in LEVELS:
        saved = layer.forward_saving_(s, packed, model.layer_context, level)
        nbytes = sum(t.nbytes for t in saved.tensors().values())
        assert nbytes == memory.saved_bytes(level)

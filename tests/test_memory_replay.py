"""Tests that hold the memory model and the time model to the code of the decoder layer.

A replay runs one layer forward and backward on meta tensors, which have shapes and no data, and
adds up the bytes of the live ones. Triton's launches do nothing there, but they are counted.
cuDNN's attention has no meta tensors, so its workspace is not replayed.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from benchmark.model_shapes import SHAPES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitune.config.architectures import LORA_TARGETS
from minitune.config.layer_kinds import LayerKind
from minitune.config.model_config import ModelConfig
from minitune.config.rope_config import RopeConfig
from minitune.config.training_config import LoraConfig
from minitune.kernels import backend, cross_entropy, lora_linear
from minitune.memory.device_rates import DeviceRates
from minitune.memory.memory_model import MemoryModel
from minitune.memory.model_shape import ModelShape
from minitune.memory.plan import Workload
from minitune.memory.stored_weights import StoredWeights
from minitune.memory.time_model import LORA_GRADIENT_LAUNCHES, TimeModel
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.ggml_weight import GgmlWeight
from minitune.model.layers import LayerContext
from minitune.model.linear import FusedLinear, Linear
from minitune.model.loss import LossRows
from minitune.model.norms import RMSNorm
from minitune.model.packed_sequences import PackedSequences
from minitune.model.quantized_weight import set_frozen_weight
from minitune.model.rope import RopeTables

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

MAX_ERROR = (
    0.002  # of a peak: rstd and the bounds of the samples, one number a row, are not counted
)
META = torch.device("meta")
DTYPE = torch.bfloat16
LEVELS = (SaveLevel.INPUT, SaveLevel.ATTENTION, SaveLevel.QKV, SaveLevel.ALL)
ADAPTERS = {
    "all, r 16": LoraConfig(r=16, target_modules=LORA_TARGETS),
    "all, r 64": LoraConfig(r=64, target_modules=LORA_TARGETS),
    "attention, r 16": LoraConfig(r=16, target_modules=LORA_TARGETS[:4]),
}
# Models whose layer has another kernel or another tensor than Llama's.
FAMILIES = {
    name: SHAPES[name]
    for name in (
        "qwen3-8b",
        "qwen2.5-7b",
        "mistral-7b",
        "ministral3-8b",
        "smollm3-3b",
        "granite-8b",
        "phi-4",
        "phi-4-mini",
        "olmo3-7b",
        "gemma2-9b",
        "gemma3-4b",
    )
} | {"granite-8b with biases": SHAPES["granite-8b"] | {"attention_bias": True, "mlp_bias": True}}
# Operations that launch no kernel: they allocate, or return a view.
VIEWS = (
    "empty",
    "new_empty",
    "empty_like",
    "view",
    "slice",
    "transpose",
    "split",
    "split_with_sizes",
    "t",
)
VIEWS += ("unsqueeze", "unbind", "select", "detach", "alias", "as_strided", "_unsafe_view")


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors that operations return, while these tensors live, and the launches.

    peak: the most bytes that were live at a time.
    launches: kernels that a GPU would run.
    """

    def __init__(self, ignored: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = self.launches = 0
        self._known = {t.untyped_storage()._cdata for t in ignored}

    def hold(self, t: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and count its results and its launch."""
        result = func(*args, **(kwargs or {}))
        self.launches += func.overloadpacket.__name__ not in VIEWS
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return result


@dataclass
class Replay:
    """The passes of one layer, and the bytes that forward saved."""

    forward: LiveBytes
    backward: LiveBytes
    saved: int


class Recorder:
    """Stand-ins for the functions that meta tensors cannot run; they count their launches."""

    mode: LiveBytes | None = None  # the running pass

    def launch(self, count: int = 1) -> None:
        """Count launches of the running pass."""
        self.mode.launches += count

    def matmul_accumulated(self, a: Tensor, b: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return a float32 result, as cuBLAS does for the gradients of A and B."""
        self.launch(LORA_GRADIENT_LAUNCHES)
        return a.new_empty((len(a), b.shape[1]), dtype=torch.float32)

    def add_matmul_(self, total: Tensor, a: Tensor, b: Tensor, multiplier: float = 1.0) -> Tensor:
        """Return `total`, which cuBLAS adds to in place."""
        self.launch()
        return total


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Make the layer run on meta tensors with the allocations of a GPU."""
    recorder = Recorder()
    for kernel in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kernel, "run", lambda *_, **__: recorder.launch())
    monkeypatch.setattr(backend, "use_triton", lambda x: True)
    monkeypatch.setattr(backend, "shared_memory_limit", lambda device: 227 << 10)
    monkeypatch.setattr(backend, "has_tensor_core_kernels", lambda device: True)
    monkeypatch.setattr(lora_linear, "add_matmul_", recorder.add_matmul_)
    for module in (lora_linear, cross_entropy):
        monkeypatch.setattr(module, "matmul_accumulated", recorder.matmul_accumulated)
    monkeypatch.setattr(FusedLinear, "needs_no_buffer", False)  # as of NF4 weights
    monkeypatch.setattr(FusedLinear, "dequantize_into_", lambda *_: recorder.launch())
    return recorder


def meta_layer(config: ModelConfig, kind: LayerKind, lora: LoraConfig) -> DecoderLayer:
    """Return a layer of meta tensors with adapters."""
    layer = DecoderLayer(config, kind)
    generator = torch.Generator()
    for name, module in layer.named_modules():
        if isinstance(module, Linear):
            module.weight = empty(module.out_features, module.in_features)
            module.bias = empty(module.out_features) if module.has_bias else None
            if name.rpartition(".")[2] in lora.target_modules:
                module.add_lora(lora, META, generator)
    for module in layer.modules():
        if isinstance(module, RMSNorm):
            module.weight = empty(*module.shape)
    return layer


def empty(*shape: int) -> nn.Parameter:
    """Return a frozen parameter."""
    return nn.Parameter(torch.empty(shape, dtype=DTYPE, device=META), requires_grad=False)


def meta_tables(rope: RopeConfig, rows: int) -> RopeTables:
    """Return the tables of a rotation for `rows` positions, without their values."""
    angles = torch.empty(rows, rope.rotary_dim // 2, device=META)
    query_scale = torch.empty(rows, device=META) if rope.query_growth else None
    return RopeTables(angles, angles, query_scale)


def replay(
    recorder: Recorder,
    layer: DecoderLayer,
    config: ModelConfig,
    rows: int,
    tile_rows: int | None,
    level: SaveLevel,
) -> Replay:
    """Run a layer forward and backward over one sample of `rows` rows."""
    index = torch.empty(rows, dtype=torch.int32, device=META)
    packed = PackedSequences(index, index, index, max_seqlen=rows)
    windows = {kind.window: packed for kind in config.layer_kinds if kind.window is not None}
    packed = replace(packed, windows=windows)
    ropes = tuple(meta_tables(rope, rows) for rope in config.ropes)
    context = LayerContext(ropes, DTYPE, "triton")
    buffers = context.weight_buffers.allocate(layer.fused_linears, DTYPE, META)
    static = [index, *buffers.values(), *layer.parameters()]

    s = torch.empty(rows, config.hidden_size, device=META)
    with LiveBytes(static) as forward:
        recorder.mode = forward
        forward.hold(s)
        saved = layer.forward_saving_(s, packed, context, level, tile_rows)
    nbytes = sum(t.nbytes for t in saved.tensors().values())

    dx = layer.new_residual_gradient(rows, DTYPE, META)
    with LiveBytes([*static, dx]) as backward:
        recorder.mode = backward
        for t in saved.tensors().values():
            backward.hold(t)
        layer.backward_(dx, saved, packed, context, tile_rows)
    return Replay(forward, backward, nbytes)


def check_the_plans_of_a_layer(recorder, config, lora, cases) -> None:
    """Compare planned bytes and launches of each kind of layer with those of its replay.

    cases: (rows, tile_rows) of each micro-step.
    """
    sizes = ModelShape.of(config, lora, DTYPE.itemsize, config.max_position_embeddings)
    for kind in dict.fromkeys(sizes.kinds):
        layer = meta_layer(config, kind, lora)
        for rows, tile_rows in cases:
            memory = MemoryModel(sizes, Workload(rows, max_seqlen=rows))
            time_model = TimeModel(memory, DeviceRates())
            for level in LEVELS:
                found = replay(recorder, layer, config, rows, tile_rows, level)
                case = f"{kind}, {rows} rows in tiles of {tile_rows}, {level.name}"
                planned = memory.layer_bytes(level, tile_rows, cudnn=False)
                peaks = planned.forward_peak, planned.backward_peak
                assert planned.saved == found.saved, case
                assert peaks == pytest.approx(
                    (found.forward.peak, found.backward.peak), rel=MAX_ERROR
                ), case
                # gradients are added to .grad after the layer's backward
                launches = (
                    time_model.forward_launches(kind, tile_rows),
                    time_model.backward_launches(kind, level, tile_rows) - 1,
                )
                assert launches == (found.forward.launches, found.backward.launches), case


@pytest.mark.parametrize(
    ("shape", "adapters"), [*(("8b", name) for name in ADAPTERS), ("135m", "all, r 64")]
)
def test_the_planned_bytes_and_launches_are_those_of_the_layer(recorder, shape, adapters):
    cases = ((1000, None), (2048, 256), (4096, 1024), (8192, None), (9000, 2048))
    config = ModelConfig.from_dict(SHAPES[shape])
    check_the_plans_of_a_layer(recorder, config, ADAPTERS[adapters], cases)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_bytes_and_launches_are_those_of_each_familys_layer(recorder, family):
    config = ModelConfig.from_dict(FAMILIES[family])
    lora = LoraConfig(r=16, target_modules=config.adapted_linears(LORA_TARGETS))
    check_the_plans_of_a_layer(recorder, config, lora, ((3000, 1024), (8192, None)))


@pytest.mark.parametrize("rows", [100, 2048, 8192])
@pytest.mark.parametrize("head_type", [None, "Q6_K"])
def test_the_planned_peak_of_the_loss_is_that_of_the_code(recorder, rows, head_type):
    config = ModelConfig.from_dict(SHAPES["8b"])
    options = {"dtype": DTYPE, "device": META, "max_seq_length": rows, "planner": None}
    model = CausalLM(config, **options)
    D, V = config.hidden_size, config.vocab_size
    head = empty(V, D) if head_type is None else GgmlWeight.empty((V, D), META, head_type)
    set_frozen_weight(model.lm_head, head)
    model.model.norm.weight = empty(D)
    weights = replace(StoredWeights.of_folder(config, 2), converts_head=model.converts_head)
    assert weights.converts_head == (head_type is not None)
    lora = ADAPTERS["all, r 16"]
    sizes = ModelShape.of(config, lora, DTYPE.itemsize, max_seq_length=rows, weights=weights)
    stored = head if head_type is None else head.blocks
    index = torch.empty(rows, dtype=torch.int64, device=META)
    loss_rows = LossRows(index, index, index[:0])
    dresidual = torch.empty(rows, D, dtype=DTYPE, device=META)
    s = torch.empty(rows, D, device=META)
    with LiveBytes([model.model.norm.weight, stored, index, dresidual]) as found:
        recorder.mode = found
        found.hold(s)
        model.rows_loss(s, loss_rows, 1.0, dresidual, model.new_loss_buffers(rows))
    planned = MemoryModel(sizes, Workload(rows, max_seqlen=rows)).loss_peak
    assert planned == pytest.approx(found.peak, rel=0.01)  # the last tile has fewer rows

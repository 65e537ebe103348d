"""The rehearsal of a training step, which compiles its kernels while the weights load.

The rehearsal runs the code of a step on tensors of the meta device, which have shapes and no data:
one layer of each kind forward and backward, the loss and the update. Its launches hand their
kernels to threads (kernels/compile_ahead.py). PyTorch's operations give their result a shape only.

A kernel depends on more than the model: on the adapter's rank, on lengths and on settings. The
rehearsal takes the usual ones. Other kernels compile at their launch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minitune.config.training_config import LoraConfig
from minitune.kernels.attention_common import SHORT_SEQUENCE_ROWS
from minitune.kernels.compile_ahead import compile_ahead
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.layers import new_residual
from minitune.model.linear import Linear
from minitune.model.loss import LossRows
from minitune.model.nf4 import NF4
from minitune.model.packed_sequences import PackedSequences
from minitune.model.quantized_weight import (
    QuantizedWeight,
    set_frozen_weight,
    share_frozen_weight,
)
from minitune.progress import warn
from minitune.training.optimizer import FlatAdamW

aten = torch.ops.aten
# Operation -> the shape of its result, from its arguments.
RESULT_SHAPES = {
    aten.empty_like.default: lambda x: x.shape,
    aten.index.Tensor: lambda x, rows: (len(rows[0]), *x.shape[1:]),
    aten.stack.default: lambda tensors: (len(tensors), *tensors[0].shape),
    aten.sum.default: lambda x: (),
}
META = torch.device("meta")
ROWS = (2048, 8192)  # of a small and a large micro-step, which split attention differently
LENGTHS = (SHORT_SEQUENCE_ROWS, 2 * SHORT_SEQUENCE_ROWS)  # tokens of a short and a long sample
LEVELS = (SaveLevel.INPUT, SaveLevel.ALL)  # backward recomputes the most, and nothing


class ShapesOnly(TorchDispatchMode):
    """A mode in which operations compute nothing, so that they cost little.

    PyTorch computes the shapes of many meta tensors in Python. The first of these operations
    imports its compiler, which takes as long as the rest of the start. The operations of a step
    are therefore answered here. Any other operation runs as usual.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: hiding this mode from PyTorch's compiler would import the compiler."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Return the result of an operation, with any values."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            return kwargs.get("out", args[0]) if func._schema.returns else None
        if torch.Tag.pointwise in func.tags:
            largest = max((x for x in args if isinstance(x, Tensor)), key=Tensor.numel)
            return largest.new_empty(largest.shape)
        if func in RESULT_SHAPES:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            return first.new_empty(RESULT_SHAPES[func](*args), dtype=kwargs.get("dtype"))
        return func(*args, **kwargs)


# Function that returns the weight of a tensor's name and shape as a model stores it, on META.
StoredWeight = Callable[[str, tuple[int, ...]], Tensor | QuantizedWeight]


def weights_of_folder(dtype: torch.dtype, is_nf4: bool) -> StoredWeight:
    """Return the weights of a model that is loaded from a folder.

    dtype: of the weights that are not quantised.
    is_nf4: True if the linears of the layers are stored in NF4.
    """

    def stored_weight(name: str, shape: tuple[int, ...]) -> Tensor | QuantizedWeight:
        if is_nf4 and len(shape) == 2 and name.startswith("model.layers."):
            return NF4.empty(shape, META)
        return torch.empty(shape, dtype=dtype, device=META)

    return stored_weight


def weights_of_model(model: CausalLM) -> StoredWeight:
    """Return the weights of a model that is loaded."""

    def stored_weight(name: str, shape: tuple[int, ...]) -> Tensor | QuantizedWeight:
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        if kind == "weight" and getattr(module, "quantized", None) is not None:
            return module.quantized.empty_like(META)
        return torch.empty(shape, dtype=getattr(module, kind).dtype, device=META)

    return stored_weight


def compile_step_ahead(model: CausalLM, lora: LoraConfig, stored_weight: StoredWeight) -> None:
    """Begin to compile the kernels of a training step of `model`, which may have no weights yet.

    Do nothing without a GPU. The arguments are those of `rehearse_step`.
    """
    if model.device.type == "cuda":
        compile_ahead(lambda: rehearse_step(model, lora, stored_weight), model.device, warn)


def rehearse_step(model: CausalLM, lora: LoraConfig, stored_weight: StoredWeight) -> None:
    """Launch the kernels of a training step on meta tensors. The model itself stays as it is.

    stored_weight: returns a weight with the name and shape of a tensor as the model stores it, on
        the meta device.
    """
    lengths = [length for length in LENGTHS if length <= max(model.max_seq_length, LENGTHS[0])]
    twin, layers = _meta_twin(model, lora, stored_weight)
    with torch.no_grad(), ShapesOnly():
        for rows, length, level in product(ROWS, lengths, LEVELS):
            _run_passes(twin, layers, rows, length, level)
        parameters = [p for layer in layers for p in layer.lora_parameters()]
        FlatAdamW(parameters, max_grad_norm=1.0).step(1e-4)


def _run_passes(
    model: CausalLM, layers: Sequence[DecoderLayer], rows: int, length: int, level: SaveLevel
) -> None:
    """Run forward, loss and backward of so many rows, in samples of `length` tokens."""
    index = torch.empty(rows, dtype=torch.int32, device=META)
    whole = PackedSequences(index, index, index, max_seqlen=length)
    packed = replace(whole, windows=dict.fromkeys(model.windows, whole))
    s = new_residual(model.model.embed_tokens(index, model.dtype))
    saved = [layer.forward_saving_(s, packed, model.layer_context, level) for layer in layers]
    dresidual = layers[-1].new_residual_gradient(rows, model.dtype, META)
    labels = torch.empty(rows, dtype=torch.int64, device=META)
    ds = dresidual[:, : model.config.hidden_size]
    model.rows_loss(s, LossRows(labels, labels, labels[:0]), 1.0, ds)
    for layer, activations in zip(layers, saved, strict=True):
        layer.backward_(dresidual, activations, packed, model.layer_context)


def _meta_twin(
    model: CausalLM, lora: LoraConfig, stored_weight: StoredWeight
) -> tuple[CausalLM, list[DecoderLayer]]:
    """Return a model of meta tensors, and one of its layers of each kind, with adapters.

    Layers whose linears are stored in different formats are of different kinds.
    """
    config, generator = model.config, torch.Generator()
    twin = CausalLM(
        config,
        dtype=model.dtype,
        device=META,
        max_seq_length=model.max_seq_length,
        planner=model.planner,
        attention="triton",
    )
    for name, shape in config.tensor_shapes().items():
        module_name, _, kind = name.rpartition(".")
        module, weight = twin.get_submodule(module_name), stored_weight(name, shape)
        if kind == "weight":
            set_frozen_weight(module, weight)
        else:
            setattr(module, kind, nn.Parameter(weight, requires_grad=False))
    if config.tie_word_embeddings:
        share_frozen_weight(twin.lm_head, twin.model.embed_tokens)
    kinds = config.kinds_up_to(model.max_seq_length)
    layers = {}
    for kind, layer in zip(kinds, twin.model.layers, strict=True):
        linears = [linear for fused in layer.fused_linears for linear in fused.linears]
        formats = tuple(linear.quantized and linear.quantized.format for linear in linears)
        layers.setdefault((kind, formats), layer)
    targets = config.adapted_linears(lora.target_modules)
    for layer in layers.values():
        for name, module in layer.named_modules():
            if isinstance(module, Linear) and name.rpartition(".")[2] in targets:
                module.add_lora(lora, META, generator)
    return twin, list(layers.values())

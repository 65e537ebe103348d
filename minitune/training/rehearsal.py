"""The rehearsal of a training step, which compiles its kernels while the weights load.

The rehearsal runs the code of a step on tensors of the meta device, which have shapes and no data:
one layer of each kind forward and backward, the loss and the update. Its launches hand their
kernels to threads (kernels/compile_ahead.py). PyTorch's operations give their result a shape only.

A kernel depends on more than the model: on the adapter's rank, on lengths and on settings. The
rehearsal takes the usual ones. Other kernels compile at their launch.
"""

from collections.abc import Sequence
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


def compile_step_ahead(
    model: CausalLM, lora: LoraConfig, weight_dtype: torch.dtype, quantized: bool
) -> None:
    """Begin to compile the kernels of a training step of `model`, which may have no weights yet.

    Do nothing without a GPU. The arguments are those of `rehearse_step`.
    """
    if model.device.type == "cuda":
        compile_ahead(lambda: rehearse_step(model, lora, weight_dtype, quantized), model.device)


def rehearse_step(
    model: CausalLM, lora: LoraConfig, weight_dtype: torch.dtype, quantized: bool
) -> None:
    """Launch the kernels of a training step on meta tensors. The model itself stays as it is.

    weight_dtype: dtype of the weights that are not quantised.
    quantized: True if the linears of the layers are stored in NF4.
    """
    lengths = [length for length in LENGTHS if length <= max(model.max_seq_length, LENGTHS[0])]
    twin, layers = _meta_twin(model, lora, weight_dtype, quantized)
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
    model: CausalLM, lora: LoraConfig, weight_dtype: torch.dtype, quantized: bool
) -> tuple[CausalLM, list[DecoderLayer]]:
    """Return a model of meta tensors, and one of its layers of each kind, with adapters.

    Only these layers, the embedding, the final norm and the head have weights.
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
    kinds = config.kinds_up_to(model.max_seq_length)
    layers = list(dict(zip(kinds, twin.model.layers, strict=True)).values())
    needed = {twin.model.embed_tokens, twin.model.norm, twin.lm_head}
    needed.update(module for layer in layers for module in layer.modules())
    targets = config.adapted_linears(lora.target_modules)
    for name, shape in config.tensor_shapes().items():
        module_name, _, kind = name.rpartition(".")
        module = twin.get_submodule(module_name)
        if module not in needed:
            continue
        is_linear = isinstance(module, Linear) and module is not twin.lm_head and kind == "weight"
        if is_linear and quantized:
            module.nf4 = NF4.empty(shape, META)
        else:
            weight = torch.empty(shape, dtype=weight_dtype, device=META)
            setattr(module, kind, nn.Parameter(weight, requires_grad=False))
        if is_linear and module_name.rpartition(".")[2] in targets:
            module.add_lora(lora, META, generator)
    if config.tie_word_embeddings:
        twin.lm_head.weight = twin.model.embed_tokens.weight
    return twin, layers

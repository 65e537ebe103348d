"""Systems that train the same adapter on the same NF4 weights: minitune, and those it is held against.

    minitune, minitune-triton   bf16 through the kernels on a GPU, float32 without one; "triton": own attention only
    minitune-cpu                float32 on the CPU, every operation its PyTorch reference
    hf                          transformers + PEFT + bitsandbytes under bf16 autocast
    unsloth                     Unsloth, which wants a GPU
    reference                   transformers + PEFT in float32, on the NF4 weights as bitsandbytes dequantises them: to
                                bf16, as the others use them, or without a GPU to float32
    plain-bf16, plain-float64   PlainLlama: the same model in plain autograd operations

Each loads the same 16-bit folder and quantises it in its own way; quantisers pick the neighbouring code of a scale now
and then. So `quantise` writes one set of NF4 tensors to a file, and `load` copies these over what each system has, in
place: from there on all of them have the same weights to the bit, and `digest` shows it. Likewise the adapter: r = 16,
alpha = 32, on all seven linears of every layer, its values drawn from a seed of each tensor's own.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_llama import PlainLlama
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune import FastLanguageModel
from minitune.config.architectures import LORA_TARGETS
from minitune.data.batching import collate
from minitune.data.tokenize_dataset import Sample
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW
from referees.peers import OFFLINE, load_nf4

R, ALPHA = 16, 32
NF4_PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")


@dataclass
class System:
    """A model with its adapter. Names are those of the checkpoint: model.layers.0.self_attn.q_proj.lora_A.weight."""

    model: Any
    parameters: dict[str, Tensor]
    nf4: dict[
        str, Tensor
    ]  # what the model computes with, under model.layers.0.self_attn.q_proj.packed and so on
    loss: Callable[[Tensor], Tensor]  # ids (B, T) -> mean loss, every token a label, under autograd
    backward: Callable[[Tensor], Tensor] | None = None  # the same, detached; adds to .grad
    optimizer: Callable[[], Any] | None = None  # with zero_grad() and step(lr)
    working: Callable[[], contextlib.AbstractContextManager] = (
        contextlib.nullcontext
    )  # around many steps

    def __post_init__(self):
        self.backward = self.backward or self._autograd
        self.optimizer = self.optimizer or (lambda: TorchAdamW(self.parameters.values()))

    def _autograd(self, ids: Tensor) -> Tensor:
        loss = self.loss(ids)
        loss.backward()
        return loss.detach()

    def set_adapter(self, values: dict[str, Tensor]) -> None:
        if values.keys() != self.parameters.keys():
            raise ValueError(
                f"the adapters differ in {sorted(values.keys() ^ self.parameters.keys())[:3]}"
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(values[name])

    def shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.parameters.items()}


class TorchAdamW:
    def __init__(self, parameters):
        self._optimizer = torch.optim.AdamW(
            parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
        self.zero_grad = self._optimizer.zero_grad

    def step(self, lr: float) -> None:
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()


def drawn_adapter(shapes: dict[str, torch.Size], seed: int, trained: bool) -> dict[str, Tensor]:
    """An adapter from a seed: as it begins, or with `trained` as if it had been trained, B not zero."""
    values = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        generator = torch.Generator().manual_seed(100_003 * seed + i)
        if "lora_A" in name and not trained:
            bound = shape[1] ** -0.5  # as PEFT begins: Kaiming uniform with a = sqrt 5
            values[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        elif "lora_A" in name:
            values[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        else:
            values[name] = (
                0.02 * torch.randn(shape, generator=generator) if trained else torch.zeros(shape)
            )
    return values


def digest(tensors: dict[str, Tensor]) -> str:
    """Equal for equal names and bits."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(name.encode())
        found.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def quantise(folder: str | Path, path: Path, device: str) -> None:
    """Write the NF4 tensors that minitune's quantiser makes of a 16-bit folder on `device`."""
    model, _ = FastLanguageModel.from_pretrained(folder, device=device)
    save_file({name: t.cpu().contiguous() for name, t in _nf4_of_minitune(model).items()}, path)


def load(name: str, folder: str | Path, nf4: Path, max_tokens: int) -> System:
    """One of the systems, in this process, on the GPU where there is one. Its adapter is still to be set."""
    tensors = load_file(nf4)
    if name.startswith("plain"):
        return _plain(name, folder, tensors, max_tokens)
    if name.startswith("minitune"):
        system = _minitune(name, folder, max_tokens)
    elif name == "unsloth":
        system = _unsloth(folder, max_tokens)
    else:
        system = _hf(folder, tensors, exact=name == "reference")
    _overwrite(system.nf4, tensors)
    return system


def _overwrite(nf4: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if nf4.keys() != tensors.keys():
        raise ValueError(
            f"the quantised linears differ in {sorted(nf4.keys() ^ tensors.keys())[:3]}"
        )
    with torch.no_grad():
        for name, t in nf4.items():
            t.copy_(tensors[name].view_as(t))


# ---- minitune


def _minitune(name: str, folder: str | Path, max_tokens: int) -> System:
    model, _ = FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=max_tokens,
        attention="triton" if name == "minitune-triton" else "auto",
        device="cpu" if name == "minitune-cpu" else None,
    )
    FastLanguageModel.get_peft_model(model, r=R, lora_alpha=ALPHA, use_gradient_checkpointing=False)
    parameters, micro = dict(model.trainable_parameters()), MicroStep(model)

    def backward(ids: Tensor) -> Tensor:
        batch = collate([Sample(row, row) for row in ids.tolist()])
        return micro(batch, batch.targets)

    return System(
        model,
        parameters,
        _nf4_of_minitune(model),
        lambda ids: model(input_ids=ids, labels=ids).loss,
        backward,
        lambda: FlatAdamW(list(parameters.values())),
        model.resident_weights_where_they_fit
        if model.device.type == "cpu"
        else contextlib.nullcontext,
    )


def _nf4_of_minitune(model) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(linear.nf4, part)
        for name, linear in model.linears()
        for part in NF4_PARTS
    }


def _plain(name: str, folder: str | Path, tensors: dict[str, Tensor], max_tokens: int) -> System:
    system = _minitune("minitune", folder, max_tokens)
    _overwrite(system.nf4, tensors)
    plain = PlainLlama(system.model, torch.float64 if name == "plain-float64" else torch.bfloat16)
    device = system.model.device

    def backward(ids: Tensor) -> Tensor:
        """A sample at a time: the scores of all heads and layers are kept, and in float64."""
        total = 0
        for row in ids.to(device):
            loss = plain.loss([(row, row)]) / len(ids)
            loss.backward()
            total = total + loss.detach()
        return total

    def loss(ids: Tensor) -> Tensor:
        return plain.loss([(row, row) for row in ids.to(device)])

    return System(system.model, plain.adapter, system.nf4, loss, backward)


# ---- the others


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _hf(folder: str | Path, tensors: dict[str, Tensor], exact: bool) -> System:
    """transformers + PEFT: on bitsandbytes' linears under bf16 autocast, or `exact`, dense and in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = load_nf4(folder)
    nf4 = _nf4_of_bitsandbytes(model)
    if exact:
        _overwrite(nf4, tensors)
        torch.set_float32_matmul_precision("highest")
        quantised = dict(model.named_modules())
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        model.to(_device())
        for name, linear in model.named_modules():
            if name.rsplit(".", 1)[-1] in LORA_TARGETS:
                w = quantised[name].weight
                w.quant_state.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
                linear.weight.data = dequantize_4bit(w.data, w.quant_state).float()
        del quantised
    lora = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(LORA_TARGETS),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return _with_peft(get_peft_model(model, lora), nf4, autocast=not exact)


def _unsloth(folder: str | Path, max_tokens: int) -> System:
    from unsloth import FastLanguageModel as Unsloth

    model, _ = Unsloth.from_pretrained(
        model_name=str(folder), max_seq_length=max_tokens, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = Unsloth.get_peft_model(
        model,
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(LORA_TARGETS),
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    return _with_peft(model, _nf4_of_bitsandbytes(model), autocast=True)


def _with_peft(model: Any, nf4: dict[str, Tensor], autocast: bool) -> System:
    model.train()
    model.config.use_cache = False
    parameters = {_plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    for p in parameters.values():
        p.data = p.data.float()

    def loss(ids: Tensor) -> Tensor:
        ids = ids.to(_device())
        with torch.autocast(_device(), dtype=torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids).loss

    return System(model, parameters, nf4, loss)


def _nf4_of_bitsandbytes(model: Any) -> dict[str, Tensor]:
    from bitsandbytes.nn import Linear4bit

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            parts = (module.weight.data, state.absmax, state.state2.absmax, state.offset)
            found |= {
                f"{_plain_name(name)}.{part}": t for part, t in zip(NF4_PARTS, parts, strict=True)
            }
    return found


def _plain_name(name: str) -> str:
    """Of PEFT's names, those of the checkpoint."""
    return (
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default.", ".")
    )


def stay_offline() -> None:
    """To be called before a system is loaded: it is then that the other libraries are imported, and read this."""
    os.environ.update(OFFLINE)

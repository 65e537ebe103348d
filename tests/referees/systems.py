"""Systems that train the same adapter on the same NF4 weights: minitune and its referees.

    minitune         bf16 through the kernels on a GPU, float32 without one
    minitune-triton  the same with our own attention only
    minitune-cpu     float32 on the CPU, every operation its PyTorch reference
    hf               transformers + PEFT + bitsandbytes under bf16 autocast
    unsloth          Unsloth, which needs a GPU
    reference        transformers + PEFT in float32, on NF4 weights that bitsandbytes dequantised to
                     bf16, as the others use them, or to float32 without a GPU
    plain-bf16, plain-float64   PlainLlama: the same model in plain autograd operations

Each system loads the same 16-bit folder and quantises it itself. Quantisers now and then choose a
neighbouring code of a scale. So `write_nf4` writes one set of NF4 tensors to a file, and `load`
copies it into each system in place. From then on all have the same weights to the bit; `digest`
shows it. The adapter has r = 16 and alpha = 32, on all seven linears of every layer. A seed of each
tensor's own draws its values.
"""

import contextlib
import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_llama import PlainLlama
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune import FastLanguageModel, LanguageModel
from minitune.data.batching import collate
from minitune.data.samples import Sample
from minitune.training.micro_step import MicroStep
from minitune.training.optimizer import FlatAdamW
from referees.peers import OFFLINE

R, ALPHA = 16, 32
NF4_PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")


class TorchAdamW:
    """PyTorch's AdamW with the interface of FlatAdamW."""

    def __init__(self, parameters):
        self._optimizer = torch.optim.AdamW(
            parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
        self.zero_grad = self._optimizer.zero_grad

    def step(self, lr: float) -> None:
        """Update the parameters."""
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()


@dataclass
class System:
    """A model with its adapter, under the names of the checkpoint.

    parameters: model.layers.0.self_attn.q_proj.lora_A.weight and so on.
    nf4: the tensors that the model computes with, model.layers.0.self_attn.q_proj.packed and so on.
    loss: ids (B, T) -> mean loss under autograd, every token a label.
    backward: ids -> the same loss, detached; adds to .grad. Default: autograd's.
    optimizer: returns an optimizer with zero_grad() and step(lr). Default: torch's AdamW.
    many_steps: returns a context manager for many steps.
    """

    model: Any
    parameters: dict[str, Tensor]
    nf4: dict[str, Tensor]
    loss: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor] | None = None
    optimizer: Callable[[], Any] | None = None
    many_steps: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __post_init__(self):
        self.backward = self.backward or self._autograd
        self.optimizer = self.optimizer or (lambda: TorchAdamW(self.parameters.values()))

    def _autograd(self, ids: Tensor) -> Tensor:
        loss = self.loss(ids)
        loss.backward()
        return loss.detach()

    def set_adapter(self, values: dict[str, Tensor]) -> None:
        """Copy these values into the adapter.

        Raises: ValueError if the names are not those of the adapter.
        """
        if values.keys() != self.parameters.keys():
            differing = sorted(values.keys() ^ self.parameters.keys())[:3]
            raise ValueError(f"the adapters differ in {differing}")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(values[name])

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the adapter by name."""
        return {name: p.shape for name, p in self.parameters.items()}


def random_adapter(shapes: dict[str, torch.Size], seed: int, trained: bool) -> dict[str, Tensor]:
    """Return an adapter drawn from a seed.

    trained: False for PEFT's initial values, where B is zero; True for a B that is not.
    """
    values = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        generator = torch.Generator().manual_seed(100_003 * seed + i)
        if "lora_A" in name and not trained:
            bound = shape[1] ** -0.5  # Kaiming uniform with a = sqrt 5, as PEFT draws it
            values[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        elif "lora_A" in name:
            values[name] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        elif trained:
            values[name] = 0.02 * torch.randn(shape, generator=generator)
        else:
            values[name] = torch.zeros(shape)
    return values


def digest(tensors: dict[str, Tensor]) -> str:
    """Return a digest that is equal for equal names and bits."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(name.encode())
        found.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def write_nf4(folder: str | Path, path: Path, device: str) -> None:
    """Quantise a 16-bit folder with minitune on `device`, and write the NF4 tensors."""
    model, _ = FastLanguageModel.from_pretrained(folder, device=device)
    save_file({name: t.cpu().contiguous() for name, t in _nf4_of_minitune(model).items()}, path)


def load(name: str, folder: str | Path, nf4: Path, max_tokens: int) -> System:
    """Return a system with the NF4 tensors of a file, on the GPU if there is one.

    Its adapter is still to be set.

    Raises: ValueError if the system's library is not installed.
    """
    tensors = load_file(nf4)
    if name.startswith("plain"):
        return _plain(name, folder, tensors, max_tokens)
    if name.startswith("minitune"):
        system = _minitune(name, folder, max_tokens)
        overwrite_nf4(system.nf4, tensors)
        return system
    try:
        library = importlib.import_module(f"referees.system_{'hf' if name != 'unsloth' else name}")
    except ImportError as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from None
    return library.load(name, folder, tensors, max_tokens)


def overwrite_nf4(nf4: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into `nf4` in place.

    Raises: ValueError if the names differ.
    """
    if nf4.keys() != tensors.keys():
        differing = sorted(nf4.keys() ^ tensors.keys())[:3]
        raise ValueError(f"the quantised linears differ in {differing}")
    with torch.no_grad():
        for name, t in nf4.items():
            t.copy_(tensors[name].view_as(t))


def _minitune(name: str, folder: str | Path, max_tokens: int) -> System:
    model, _ = FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=max_tokens,
        attention="triton" if name == "minitune-triton" else "auto",
        device="cpu" if name == "minitune-cpu" else None,
    )
    FastLanguageModel.get_peft_model(model, r=R, lora_alpha=ALPHA, use_gradient_checkpointing=False)
    parameters, micro = dict(model.trainable_parameters()), MicroStep(model)
    on_cpu = model.device.type == "cpu"

    def backward(ids: Tensor) -> Tensor:
        batch = collate([Sample(row, row) for row in ids.tolist()])
        return micro(batch, batch.targets)

    return System(
        model,
        parameters,
        _nf4_of_minitune(model),
        loss=lambda ids: model(input_ids=ids, labels=ids).loss,
        backward=backward,
        optimizer=lambda: FlatAdamW(list(parameters.values())),
        many_steps=model.resident_weights_if_they_fit if on_cpu else contextlib.nullcontext,
    )


def _nf4_of_minitune(model: LanguageModel) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(linear.quantized, part)
        for name, linear in model.linears()
        for part in NF4_PARTS
    }


def _plain(name: str, folder: str | Path, tensors: dict[str, Tensor], max_tokens: int) -> System:
    system = _minitune("minitune", folder, max_tokens)
    overwrite_nf4(system.nf4, tensors)
    plain = PlainLlama(system.model, torch.float64 if name == "plain-float64" else torch.bfloat16)
    device = system.model.device

    def backward(ids: Tensor) -> Tensor:
        # One sample at a time: the scores of all heads and layers are saved, in float64 too.
        total = 0
        for row in ids.to(device):
            loss = plain.loss([(row, row)]) / len(ids)
            loss.backward()
            total = total + loss.detach()
        return total

    def loss(ids: Tensor) -> Tensor:
        return plain.loss([(row, row) for row in ids.to(device)])

    return System(system.model, plain.adapter, system.nf4, loss, backward)


def stay_offline() -> None:
    """Forbid the libraries any download. They read the environment when they are imported."""
    os.environ.update(OFFLINE)

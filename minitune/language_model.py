"""The model that a user holds: CausalLM with the methods of PEFT's and Unsloth's models.

An argument that exists there means the same here or is refused with a reason
(config/loading_arguments.py).
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoints.adapter import load_adapter, read_adapter, save_adapter
from minitune.checkpoints.find_model import find_adapter
from minitune.checkpoints.merge import merge_text, merge_to_folder
from minitune.checkpoints.save_4bit import save_4bit
from minitune.config.foreign_arguments import foreign_arguments
from minitune.config.loading_arguments import (
    ADAPTER_SAVING,
    GGUF_SAVING,
    LOADING_ADAPTER,
    SAVING,
)
from minitune.config.training_config import parse_bytes
from minitune.data.samples import Sample
from minitune.data.templates.adapter_template import load_template, read_adapter_templates
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.device import choose_device
from minitune.gguf.export import export_gguf
from minitune.gguf.importance.imatrix_files import read_imatrix
from minitune.gguf.importance.importance import ImportanceMatrix
from minitune.gguf.lora_adapter import save_gguf_adapter
from minitune.model.adapter_switch import Adapter, without_lora
from minitune.model.causal_lm import CausalLM
from minitune.progress import labelled, print_line, print_result, warn
from minitune.training.check_base import BaseCheck, check_base

# Names of transformers, PEFT and Unsloth that a model lacks -> the way to the same end
ABSENT = {
    "merge_and_unload": "write the merged model with save_pretrained_merged, and load that folder",
    "merge_adapter": "write the merged model with save_pretrained_merged, and load that folder",
    "unload": "use `with model.disable_adapter():`, or load the base again",
    "add_adapter": "use FastLanguageModel.get_peft_model(model, ...)",
    "delete_adapter": "use `with model.disable_adapter():`, or load the base again",
    "generation_config": "pass the settings to generate, such as generate(temperature=0.7)",
    "resize_token_embeddings": "embeddings are frozen; use tokens of the vocabulary",
    "base_model": "the layers are model.model.layers",
    "peft_config": "model.lora holds the settings of the adapter",
    "can_generate": "call model.generate(**tokenizer(prompt, return_tensors='pt')) itself",
    "fast_generate": "there is no vLLM; use model.generate",
    "save_lora": "use model.save_pretrained(folder)",
    "load_lora": "use model.generate(prompts, adapter=model.read_adapter(folder))",
    "save_pretrained_ggml": "use save_pretrained_gguf(folder, tokenizer, save_method='lora')",
    "push_to_hub": "nothing is uploaded; save, and use `hf upload` on the folder",
    "push_to_hub_merged": "nothing is uploaded; use save_pretrained_merged and `hf upload`",
    "push_to_hub_gguf": "nothing is uploaded; use save_pretrained_gguf and `hf upload`",
    "push_to_hub_ggml": "nothing is uploaded; use save_pretrained_gguf and `hf upload`",
}


class LanguageModel(CausalLM):
    """A model with the methods that load and save it."""

    def __getattr__(self, name: str) -> Any:
        """Return a module or parameter; name the replacement of a name that other models have."""
        if name in ABSENT:
            raise AttributeError(f"a minitune model has no {name}: {ABSENT[name]}")
        return super().__getattr__(name)

    # ---- generation

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens at which `generate` stops: those of the tokenizer, or as assigned."""
        ends = self._ends
        return ends.eos_token_ids if isinstance(ends, Tokenizer) else ends

    @eos_token_ids.setter
    def eos_token_ids(self, value: Sequence[int]) -> None:
        self._ends: Tokenizer | tuple[int, ...] = tuple(value)

    def follow_ends(self, tokenizer: Tokenizer) -> None:
        """Stop `generate` at the end tokens of a tokenizer, also after it gets a new template."""
        self._ends = tokenizer

    # ---- adapter

    @foreign_arguments(**LOADING_ADAPTER)
    def load_adapter(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Attach the adapter of a folder in PEFT's format, instead of the present one.

        folder: an adapter's folder, or a run's folder, which stands for its adapter.
        tokenizer: gets the chat template that the adapter was trained with.

        Raises: ValueError if the adapter does not fit the model or is not supported.
        """
        adapter, removed = find_adapter(folder), self.adapters_removed
        load_adapter(self, adapter)
        if self.adapters_removed != removed:
            self.planner.largest = None
        if tokenizer is not None:
            load_template(tokenizer, adapter)
        else:
            self._warn_of_templates(adapter, "pass tokenizer= to use it", stacklevel=4)

    def read_adapter(self, folder: str | Path) -> Adapter:
        """Return the adapter of a folder for `generate(adapter=...)`; the model keeps its own.

        folder: as in `load_adapter`.

        Raises: ValueError if the adapter does not fit the model or is not supported.
        """
        adapter = find_adapter(folder)
        self._warn_of_templates(adapter, "render prompts with its tokenizer", stacklevel=3)
        return read_adapter(self, adapter)

    def _warn_of_templates(self, adapter: Path, remedy: str, stacklevel: int) -> None:
        """Warn if an adapter was trained with another chat template than the base's."""
        if read_adapter_templates(adapter) not in (None, read_adapter_templates(self.folder)):
            warn(
                f"{adapter} was trained with a chat template of its own; {remedy}",
                stacklevel=stacklevel,
            )

    def set_adapter(self, adapter_name: str) -> None:
        """Do nothing: the only adapter, "default", is active.

        Raises: ValueError for another name.
        """
        if adapter_name != "default":
            raise ValueError(
                f"adapter {adapter_name!r} does not exist: a model has one adapter, 'default'; "
                "load another one in its place with model.load_adapter(folder)"
            )

    def disable_adapter(self) -> contextlib.AbstractContextManager:
        """Return a context in which the model computes as its base, without the adapter."""
        return without_lora(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable parameters and of all, as PEFT counts them."""
        trainable = sum(p.numel() for _, p in self.trainable_parameters())
        adapter = sum(p.numel() for _, p in self.adapter_parameters())
        return trainable, self.num_parameters() + adapter

    def print_trainable_parameters(self) -> None:
        """Print both numbers of `get_nb_trainable_parameters` on stdout, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print_result(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
        )

    # ---- mode and device

    def for_inference(self) -> "LanguageModel":
        """Return the model in evaluation mode. No number depends on the mode."""
        return self.eval()

    def for_training(self) -> "LanguageModel":
        """Return the model in training mode. No number depends on the mode."""
        return self.train()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Do nothing: use_gradient_checkpointing decides, and no number depends on it."""

    def gradient_checkpointing_disable(self) -> None:
        """Do nothing, as `gradient_checkpointing_enable`."""

    def enable_input_require_grads(self) -> None:
        """Do nothing: adapters get their gradients without it."""

    def to(self, *args: Any, **kwargs: Any) -> "LanguageModel":
        """Return the model if it is on this device and computes in this dtype already.

        Raises: ValueError for another device or dtype.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        same_device = device is None or choose_device(device) == self.device
        if same_device and dtype in (None, self.dtype):
            return self
        return super().to(*args, **kwargs)  # refuses

    def cuda(self, device: int | str | torch.device | None = None) -> "LanguageModel":
        """Return the model if it is on this GPU, as `to`."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> "LanguageModel":
        """Return the model if it is on the CPU, as `to`."""
        return self.to("cpu")

    # ---- base

    def check_base(self, samples: Sequence[Sample]) -> BaseCheck:
        """Return the difference that NF4 makes to the base, on samples of `trainer.data.train`.

        Raises: ValueError if the model or its folder lacks the NF4 or the 16-bit weights.
        """
        return check_base(self, samples)

    def save_4bit(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
        """Write the NF4 base in bitsandbytes' layout and return the folder.

        The folder loads at the speed of the disk, here and in transformers. It holds no adapter;
        `save_pretrained` writes that.

        tokenizer: the tokenizer to write; None takes that of the model's folder.

        Raises: ValueError if the model has no NF4 weights or the folder is not empty.
        """
        return save_4bit(self, folder, tokenizer)

    # ---- saving

    @foreign_arguments(**ADAPTER_SAVING)
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

        Raises: ValueError if the model has no adapter or the folder cannot be written.
        """
        save_adapter(self, folder)

    @foreign_arguments(**SAVING)
    def save_pretrained_merged(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        save_method: str = "merged_16bit",
        merge_base: str = "auto",
        max_shard_size: str | int = "5GB",
        progress: bool | None = None,
    ) -> None:
        """Write the model with the adapter merged in, and print its base on stderr.

        tokenizer: the tokenizer to write; None takes that of the model's folder.
        save_method: "merged_16bit" writes a new folder of 16-bit safetensors, "lora" only the
            adapter and the tokenizer.
        merge_base: weights to merge onto: "original" (16-bit), "nf4" (as trained) or "auto".
        max_shard_size: limit of a file, in bytes or as a size such as "5GB".
        progress: show a bar, as in `from_pretrained`.

        Raises: ValueError if the folder is not empty or `merge_base` is not available.
        """
        tokenizer = tokenizer or Tokenizer.from_folder(self.folder)
        if save_method == "lora":
            save_adapter(self, folder)
            tokenizer.save_pretrained(folder)
            return
        _check_save_method(save_method)
        size = parse_bytes(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
        print_line(labelled("merging", merge_text(self, merge_base)))
        merge_to_folder(self, folder, tokenizer, merge_base, size, progress)

    @foreign_arguments(**GGUF_SAVING)
    def save_pretrained_gguf(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        quantization_method: str | Sequence[str] | None = None,
        merge_base: str = "auto",
        progress: bool | None = None,
        imatrix: str | Path | ImportanceMatrix | None = None,
        ollama: bool = False,
        verify: bool = True,
        save_method: str | None = None,
    ) -> Path | list[Path]:
        """Write the merged model into a folder as GGUF files of one or several types, in one pass.

        tokenizer: the tokenizer to write; None takes that of the model's folder.
        quantization_method: a type such as "q4_k_m", or a list of types, in upper or lower case;
            None takes "q8_0". config/training_config.py lists the types and their aliases.
        merge_base: as in `save_pretrained_merged`, which prints the base too.
        progress: show bars, and say what was verified; as in `from_pretrained`.
        imatrix: the importance matrix that the quantisers use: a file in one of llama.cpp's forms,
            or the result of `minitune.gguf.importance.importance_collection.importance_from_data`.
        ollama: write a Modelfile beside each file, for `ollama create`.
        verify: check each file before it gets its name (gguf/verify.py).
        save_method: "lora" writes the adapter alone, in float32, as gguf/lora_adapter.py does. It
            takes no merge_base, no imatrix and no quantization_method but "f32".

        Returns: the path of the file, or a list of paths if `quantization_method` is a list.

        Raises: ValueError if a file exists or fails a check, if GGUF cannot express the model or
            tokenizer, if the importance matrix is damaged or another model's, or if Ollama's
            templates cannot express the chat template.
        """
        if save_method == "lora":
            _check_unmerged(quantization_method, merge_base, imatrix)
            return save_gguf_adapter(
                self, folder, tokenizer, progress=progress, verify=verify, ollama=ollama
            )
        if save_method is not None:
            _check_save_method(save_method)
        if isinstance(imatrix, str | Path):
            imatrix = read_imatrix(imatrix)
        print_line(labelled("merging", merge_text(self, merge_base)))
        return export_gguf(
            self,
            folder,
            tokenizer or Tokenizer.from_folder(self.folder),
            "q8_0" if quantization_method is None else quantization_method,
            merge_base,
            importance=imatrix,
            progress=progress,
            verify=verify,
            ollama=ollama,
        )


def _check_unmerged(
    quantization_method: str | Sequence[str] | None,
    merge_base: str,
    imatrix: str | Path | ImportanceMatrix | None,
) -> None:
    """Raise ValueError if an argument of a merge is set for an adapter that is written alone."""
    if quantization_method not in (None, "f32", ["f32"]):
        raise ValueError(
            f"quantization_method {quantization_method!r}: an adapter is written in float32, as it "
            "was trained; leave quantization_method out with save_method='lora'"
        )
    if merge_base != "auto" or imatrix is not None:
        name = "imatrix" if imatrix is not None else "merge_base"
        raise ValueError(
            f"{name} belongs to a merged model; leave it out with save_method='lora', which writes "
            "the adapter alone"
        )


def _check_save_method(save_method: str) -> None:
    """Raise ValueError unless a merge writes 16-bit weights."""
    if save_method in ("merged_4bit", "merged_4bit_forced"):
        raise ValueError(
            f"save_method {save_method!r} is not supported, because 4 bit would round the merged "
            "weights in silence; use 'merged_16bit', load that folder in 4 bit, and write it with "
            "model.save_4bit(folder)"
        )
    if save_method != "merged_16bit":
        raise ValueError(
            f"save_method {save_method!r} does not exist; choose 'merged_16bit' or 'lora'"
        )

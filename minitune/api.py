"""The public door: load a base model, attach an adapter, save the result.

The names and arguments are those of Unsloth and PEFT. An argument that exists there means the same
here or is refused with a reason.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from minitune.checkpoints.adapter import load_adapter, save_adapter
from minitune.checkpoints.load_weights import EMBEDDING, load_weights, open_model_folder
from minitune.checkpoints.merge import merge_to_folder
from minitune.checkpoints.safetensors_folder import resolve_model
from minitune.checkpoints.save_4bit import save_4bit
from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.data.samples import Sample
from minitune.data.tokenization.tokenizer import Tokenizer, check_vocabulary
from minitune.device import choose_device, choose_dtype
from minitune.gguf.export import export_gguf
from minitune.gguf.imatrix_files import read_imatrix
from minitune.gguf.importance import ImportanceMatrix
from minitune.memory.planner import Planner, parse_gradient_checkpointing
from minitune.model.causal_lm import CausalLM
from minitune.model.generation_arguments import read_generation_defaults
from minitune.training.check_base import BaseCheck, check_base
from minitune.training.rehearsal import compile_step_ahead


class LanguageModel(CausalLM):
    """A model with the methods that load and save it."""

    def load_adapter(self, folder: str | Path) -> None:
        """Attach the adapter of a folder in PEFT's format, or copy its values into the present one.

        Raises: ValueError if the adapter does not fit the model or is not supported.
        """
        load_adapter(self, folder)

    def check_base(self, samples: Sequence[Sample]) -> BaseCheck:
        """Return the difference that NF4 makes to the base, on samples of `trainer.data.train`.

        Raises: ValueError if the model or its folder lacks the NF4 or the 16-bit weights.
        """
        return check_base(self, samples)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

        Raises: ValueError if the model has no adapter or the folder cannot be written.
        """
        save_adapter(self, folder)

    def save_pretrained_merged(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        save_method: str = "merged_16bit",
        merge_base: str = "auto",
    ) -> None:
        """Write the model with the adapter merged in, as a folder of 16-bit safetensors.

        merge_base: weights to merge onto: "original" (16-bit), "nf4" (as trained) or "auto".

        Raises: ValueError if the folder is not empty or `merge_base` is not available.
        """
        if save_method != "merged_16bit":
            raise ValueError(f"save_method {save_method!r} is not supported; choose 'merged_16bit'")
        merge_to_folder(self, folder, tokenizer, merge_base=merge_base)

    def save_4bit(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
        """Write the NF4 base in bitsandbytes' layout and return the folder.

        The folder loads at the speed of the disk, here and in transformers. It holds no adapter;
        `save_pretrained` writes that.

        tokenizer: the tokenizer to write; None takes that of the model's folder.

        Raises: ValueError if the model has no NF4 weights or the folder is not empty.
        """
        return save_4bit(self, folder, tokenizer)

    def save_pretrained_gguf(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        quantization_method: str | Sequence[str] = "q8_0",
        merge_base: str = "auto",
        progress: bool | None = None,
        imatrix: str | Path | ImportanceMatrix | None = None,
        ollama: bool = False,
        verify: bool = True,
    ) -> Path | list[Path]:
        """Write the merged model into a folder as GGUF files of one or several types, in one pass.

        quantization_method: a type such as "q4_k_m", or a list of types, in upper or lower case.
            config/training_config.py lists the types and their aliases.
        merge_base: as in `save_pretrained_merged`.
        progress: show bars, and say what was verified; as in `from_pretrained`.
        imatrix: the importance matrix that the quantisers use: a file in one of llama.cpp's forms,
            or the result of `minitune.gguf.importance_collection.importance_from_data`.
        ollama: write a Modelfile beside each file, for `ollama create`.
        verify: check each file before it gets its name (gguf/verify.py).

        Returns: the path of the file, or a list of paths if `quantization_method` is a list.

        Raises: ValueError if a file exists or fails a check, if GGUF cannot express the model or
            tokenizer, if the importance matrix is damaged or another model's, or if Ollama's
            templates cannot express the chat template.
        """
        if isinstance(imatrix, str | Path):
            imatrix = read_imatrix(imatrix)
        return export_gguf(
            self,
            folder,
            tokenizer,
            quantization_method,
            merge_base,
            importance=imatrix,
            progress=progress,
            verify=verify,
            ollama=ollama,
        )


class FastLanguageModel:
    """The functions that load a base model and attach an adapter, under Unsloth's names."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        device: str | torch.device | None = None,
        attention: str = "auto",
        offload_embedding: bool = False,
        progress: bool | None = None,
    ) -> tuple[LanguageModel, Tokenizer]:
        """Load a model and its tokenizer from a folder.

        model_name: the folder, or `org/name` in the local Hugging Face cache.
        max_seq_length: length of the longest sample in tokens; by default 2048, or the model's
            number of positions if that is smaller.
        dtype: compute dtype; by default bfloat16 on a GPU and float32 on a CPU.
        load_in_4bit: quantise the linears to NF4 while they are read; False keeps them as stored.
            A folder of NF4 weights is read as it is either way.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        attention: "triton" uses the project's kernels; "auto" uses cuDNN's if all samples have one
            length of 4096 tokens or more, because it is faster there. Without a GPU both use
            PyTorch.
        offload_embedding: keep the embedding in pinned host memory, from which the GPU reads the
            rows that it needs. Not available if the head shares the embedding.
        progress: show a bar: None on a terminal or in a notebook, True also as lines in a pipe.

        Raises: ValueError that names the argument, file or tensor at fault.
        """
        folder = resolve_model(model_name)
        config, stored = open_model_folder(folder)
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        _check_loading(config, max_seq_length, attention, offload_embedding)
        stored.read_ahead()
        tokenizer = Tokenizer.from_folder(folder)
        check_vocabulary(tokenizer, config.vocab_size)
        model = LanguageModel(
            config,
            dtype=dtype,
            device=device,
            max_seq_length=max_seq_length or config.default_seq_length,
            planner=Planner(),
            attention=attention,
        )
        model.name = str(model_name)
        model.folder = folder
        model.eos_token_ids = tokenizer.eos_token_ids
        model.generation_defaults = read_generation_defaults(folder)
        weight_dtype, quantized = stored.dtype(EMBEDDING), load_in_4bit or stored.prequantized
        compile_step_ahead(model, LoraConfig(), weight_dtype, quantized)
        load_weights(model, stored, device, load_in_4bit, progress)
        if offload_embedding and device.type == "cuda":
            try:
                model.model.embed_tokens.to_host()
            except MemoryError as error:
                raise ValueError(f"offload_embedding: {error}") from error
            torch.cuda.empty_cache()
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: Sequence[str] | str = LORA_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
    ) -> LanguageModel:
        """Attach LoRA to the named linears of every layer of `model`, and return the model.

        r: rank of the adapter.
        target_modules: names of linears, such as "q_proj", or "all-linear". Llama's names of q, k
            and v mean a family's linear for all three, and those of gate and up likewise.
        lora_alpha: the branch is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with rsLoRA.
        use_gradient_checkpointing: True recomputes activations in backward, False saves them all,
            "unsloth" or "auto" saves as many as the memory has room for.
        random_state: seed of A's initial values.
        use_rslora: use rsLoRA's scaling.

        Raises: ValueError if a module does not exist, or for dropout and trained biases, which are
            not supported.
        """
        if lora_dropout:
            raise ValueError(
                f"lora_dropout {lora_dropout} is not supported, because recomputation would need "
                "the same mask; use 0"
            )
        if bias != "none":
            raise ValueError(f"bias {bias!r} is not supported; biases stay frozen ('none')")
        level = parse_gradient_checkpointing(use_gradient_checkpointing)
        names = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
        targets = LORA_TARGETS if names == ("all-linear",) else names
        model.add_lora(LoraConfig(r, lora_alpha, targets, use_rslora), random_state)
        lora, all_linear = model.lora, model.config.adapted_linears(LORA_TARGETS)
        if (r, lora.target_modules) != (LoraConfig.r, all_linear):
            quantized = any(linear.is_quantized for _, linear in model.linears())
            compile_step_ahead(model, lora, model.model.embed_tokens.weight.dtype, quantized)
        model.planner = Planner(level)
        return model


def _check_loading(
    config: ModelConfig, max_seq_length: int | None, attention: str, offload_embedding: bool
) -> None:
    """Raise ValueError if an argument of `from_pretrained` is invalid for this model."""
    if attention not in ("auto", "triton"):
        raise ValueError(f"attention is {attention!r}; choose 'auto' or 'triton'")
    if max_seq_length is not None:
        config.check_seq_length(max_seq_length)
    if offload_embedding and config.tie_word_embeddings:
        raise ValueError(
            "offload_embedding is not available: the head of this model is the embedding, "
            "and the GPU needs it whole"
        )

"""The names people already type: load a base model, attach an adapter to it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from minitune.checkpoints.adapter import load_adapter, save_adapter
from minitune.checkpoints.load_weights import load_weights
from minitune.checkpoints.merge import merge_to_folder
from minitune.checkpoints.safetensors_folder import SafetensorsFolder, resolve_model
from minitune.config.architectures import LORA_TARGETS
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.data.tokenizer import Tokenizer, check_vocabulary
from minitune.gguf.export import export_gguf
from minitune.memory.planner import Planner, parse_gradient_checkpointing
from minitune.model.causal_lm import CausalLM


class LanguageModel(CausalLM):
    """A model with the methods that load and save it."""

    def load_adapter(self, folder: str | Path) -> None:
        """Attach and fill the adapter saved in a folder, in PEFT's file format."""
        load_adapter(self, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's file format: adapter_config.json and adapter_model.safetensors."""
        save_adapter(self, folder)

    def save_pretrained_merged(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        save_method: str = "merged_16bit",
        merge_base: str = "auto",
    ) -> None:
        """Write the model with the adapter merged in, as 16-bit safetensors (checkpoints/merge.py has `merge_base`)."""
        if save_method != "merged_16bit":
            raise ValueError(f"save_method {save_method!r} is not supported; choose 'merged_16bit'")
        merge_to_folder(self, folder, tokenizer, merge_base=merge_base)

    def save_pretrained_gguf(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        quantization_method: str = "q8_0",
        merge_base: str = "auto",
    ) -> Path:
        """Write the merged model as one GGUF file into a folder and return the file's path."""
        return export_gguf(
            self, folder, tokenizer, quantization_method=quantization_method, merge_base=merge_base
        )


class FastLanguageModel:
    """Loading a base model and attaching an adapter, under the names that people already type."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        device: str | torch.device | None = None,
        attention: str = "auto",
        offload_embedding: bool = False,
        progress: bool = False,
    ) -> tuple[LanguageModel, Tokenizer]:
        """Load a model folder, or `org/name` from the local Hugging Face cache, and its tokenizer.

        max_seq_length: the longest sample; by default 2048, or all that the model knows where that is less.
        dtype: what is computed in; by default bfloat16 on a GPU and float32 on a CPU.
        device: cpu, cuda, cuda:1 and so on; by default a GPU where there is one.
        load_in_4bit: quantise the linears to NF4 as they are read; False keeps them as stored. A folder that is
            already NF4 is taken as it stands either way.
        attention: "triton" is the project's own kernels; "auto" takes cuDNN's where all samples have one length of 4096
            tokens or more, which is when it can be used and is faster. Without a GPU both are PyTorch.
        offload_embedding: keep the embedding in pinned host memory, from where a GPU reads the rows that it needs. Not
            for models whose head is the same tensor.

        Raises ValueError that names the file or tensor at fault.
        """
        folder = resolve_model(model_name)
        config = ModelConfig.from_folder(folder)
        device, dtype = _device_and_dtype(device, dtype)
        if attention not in ("auto", "triton"):
            raise ValueError(f"attention is {attention!r}; choose 'auto' or 'triton'")
        known = config.max_position_embeddings
        if max_seq_length is not None and not 0 < max_seq_length <= known:
            raise ValueError(
                f"max_seq_length {max_seq_length} is not within the {known} positions the model knows"
            )
        if offload_embedding and config.tie_word_embeddings:
            raise ValueError(
                "offload_embedding: the head is the embedding in this model, and is needed on the GPU"
            )
        tokenizer = Tokenizer.from_folder(folder)
        check_vocabulary(tokenizer, config.vocab_size)
        longest = max_seq_length or min(2048, known)
        model = LanguageModel(
            config,
            dtype=dtype,
            device=device,
            max_seq_length=longest,
            planner=Planner(),
            attention=attention,
        )
        model.name, model.folder, model.eos_token_ids = (
            str(model_name),
            folder,
            tokenizer.eos_token_ids,
        )
        load_weights(model, SafetensorsFolder(folder), device, load_in_4bit, progress)
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
        """Attach LoRA to the named linears of every layer of `model`, and return it.

        target_modules: names out of LINEARS, or "all-linear".
        use_gradient_checkpointing: True computes activations again in backward, False keeps them, and "unsloth" or
            "auto" keeps those of as many layers as memory has room for.

        Raises ValueError for a module that does not exist and for what is not supported (dropout, trained biases).
        """
        if lora_dropout:
            raise ValueError(
                f"lora_dropout {lora_dropout} is not supported: recomputation would need the same mask"
            )
        if bias != "none":
            raise ValueError(f"bias {bias!r} is not supported; biases stay frozen ('none')")
        if isinstance(target_modules, str):
            target_modules = LORA_TARGETS if target_modules == "all-linear" else (target_modules,)
        named = tuple(n for n in LORA_TARGETS if n in target_modules) + tuple(
            n for n in target_modules if n not in LORA_TARGETS
        )
        level = parse_gradient_checkpointing(use_gradient_checkpointing)
        model.add_lora(LoraConfig(r, lora_alpha, named, use_rslora), random_state)
        model.planner = Planner(level)
        return model


def _device_and_dtype(
    device: str | torch.device | None, dtype: torch.dtype | str | None
) -> tuple[torch.device, torch.dtype]:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(
            f"device {device!r} does not exist; choose cpu, cuda, or a numbered GPU as cuda:1"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device.type!r} is not supported; choose cpu or cuda")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype {dtype} is not supported; choose torch.float32, torch.bfloat16 or torch.float16"
        )
    if device.type == "cuda":
        if (count := torch.cuda.device_count()) <= (device.index or 0):
            raise ValueError(f"device {device} was asked for, but torch sees {count} CUDA GPUs")
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                f"{name} has no bfloat16 (it needs compute capability 8.0); pass dtype=torch.float32"
            )
        device = torch.device(
            "cuda", device.index if device.index is not None else torch.cuda.current_device()
        )
    return device, dtype

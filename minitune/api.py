"""The public door: load a base model, attach an adapter.

The names and arguments are those of Unsloth and PEFT. An argument that exists there means the same
here or is refused with a reason (config/loading_arguments.py).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoints.adapter import check_adapter
from minitune.checkpoints.find_model import ModelSource, find_model
from minitune.checkpoints.load_weights import load_weights
from minitune.checkpoints.resolve_model import is_gguf
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.architectures import LORA_TARGETS
from minitune.config.foreign_arguments import foreign_arguments
from minitune.config.loading_arguments import ATTACHING, ATTACHING_CONFIG, LOADING, PREPARING
from minitune.config.model_config import EMBEDDING, ModelConfig
from minitune.config.numbers import check_number
from minitune.config.training_config import SEEDS, LoraConfig
from minitune.data.tokenization.tokenizer import Tokenizer, check_vocabulary
from minitune.device import check_torch_defaults, choose_device, choose_dtype
from minitune.gguf.base.load import embedding_dtype, load_file_weights, open_base, stored_weight
from minitune.gguf.base.model_files import model_files
from minitune.gguf.file_weights import FileWeights
from minitune.language_model import LanguageModel
from minitune.memory.planner import Planner, parse_gradient_checkpointing
from minitune.model.generation_arguments import read_generation_defaults
from minitune.progress import warn
from minitune.training.rehearsal import (
    compile_step_ahead,
    weights_of_folder,
    weights_of_model,
)

# Values of transformers' device_map that leave the choice of the device open
ANY_DEVICE = (None, "auto", "sequential", "balanced", "balanced_low_0")
DEFAULT_SEED = 3407  # of A's initial values


class FastLanguageModel:
    """The functions that load a base model and attach an adapter, under Unsloth's names."""

    @staticmethod
    @foreign_arguments(**LOADING)
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        *,
        load_in_16bit: bool = False,
        device: str | torch.device | None = None,
        device_map: str | int | torch.device | Mapping | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        attention: str = "auto",
        offload_embedding: bool = False,
        adapter: str | Path | None = None,
        progress: bool | None = None,
    ) -> tuple[LanguageModel, Tokenizer]:
        """Load a model, its adapter if there is one, and its tokenizer.

        model_name: a model's folder, a GGUF file, or `org/name` in the local Hugging Face cache; or
            the folder of an adapter or a run, which stands for the base model with that adapter.
        max_seq_length: tokens of the longest sample; by default 2048, or the model's limit if less.
        dtype: compute dtype; by default float32 on a CPU, bfloat16 on a GPU, and float16 on a GPU
            without bfloat16. "auto" is the dtype of the weights.
        load_in_4bit: quantise the linears to NF4 while they are read; False keeps them as stored.
            NF4 weights and GGUF files are read as they are either way.
        load_in_16bit: the same as load_in_4bit=False, which has to be given too.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        device_map: the same in transformers' form: "auto", a device, or {"": device}.
        use_gradient_checkpointing: as in `get_peft_model`, for an adapter that is loaded here.
        attention: "triton" uses the project's kernels. "auto" uses cuDNN's, which is faster, if all
            samples have one length of 4096 tokens or more. Without a GPU both use PyTorch.
        offload_embedding: keep the embedding in pinned host memory, from which the GPU reads the
            rows that it needs. Not available if the head shares the embedding.
        adapter: folder of an adapter or a run, whose adapter is attached to the model.
        progress: show a bar: None on a terminal or in a notebook, True also as lines in a pipe.

        Raises: ValueError that names the argument, file or tensor at fault.
        """
        check_torch_defaults()
        source = find_model(model_name, adapter)
        config, stored = open_base(source.base)
        device = choose_device(_mapped_device(device, device_map))
        dtype = choose_dtype(embedding_dtype(stored) if dtype == "auto" else dtype, device)
        level = parse_gradient_checkpointing(use_gradient_checkpointing)
        _check_loading(config, max_seq_length, attention, offload_embedding)
        _check_bits(load_in_16bit, load_in_4bit, source.base)
        _check_adapter(config, source)
        stored.read_ahead()
        tokenizer = _read_tokenizer(source.base, config)
        model = _new_model(
            source,
            config,
            dtype=dtype,
            device=device,
            max_seq_length=max_seq_length or config.default_seq_length,
            planner=Planner(level),
            attention=attention,
        )
        _fill(model, stored, load_in_4bit, offload_embedding, progress)
        _attach_saved(model, source, tokenizer)
        return model, tokenizer

    @staticmethod
    @foreign_arguments(**ATTACHING)
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: Sequence[str] | str | None = LORA_TARGETS,
        lora_alpha: float = 16,
        *,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = DEFAULT_SEED,
        use_rslora: bool = False,
        max_seq_length: int | None = None,
    ) -> LanguageModel:
        """Attach LoRA to the named linears of every layer of `model`, and return the model.

        A model that has an adapter with the same settings is returned with a warning.

        r: rank of the adapter.
        target_modules: names of linears, such as "q_proj", or "all-linear". Llama's names of q, k
            and v mean a family's linear for all three, and those of gate and up likewise.
        lora_alpha: the branch is scaled by lora_alpha / r, or by lora_alpha / sqrt(r) with rsLoRA.
        use_gradient_checkpointing: True recomputes activations in backward, False saves them all,
            "unsloth" or "auto" saves as many as the memory has room for.
        random_state: seed of A's initial values.
        use_rslora: use rsLoRA's scaling.
        max_seq_length: the model's, as `from_pretrained` took it.

        Raises: ValueError if a module does not exist, if the model has an adapter with other
            settings, or if the model was loaded with another max_seq_length.
        """
        level = parse_gradient_checkpointing(use_gradient_checkpointing)
        if max_seq_length not in (None, model.max_seq_length):
            raise ValueError(
                f"max_seq_length is {max_seq_length}, but the model was loaded for "
                f"{model.max_seq_length}; pass it to from_pretrained"
            )
        lora = LoraConfig(r, lora_alpha, target_modules, use_rslora)
        _attach(model, lora, random_state)
        model.planner = Planner(level)
        return model

    @staticmethod
    def for_inference(model: LanguageModel) -> LanguageModel:
        """Return the model in evaluation mode. `generate` is as fast without this call."""
        return model.for_inference()

    @staticmethod
    def for_training(
        model: LanguageModel, use_gradient_checkpointing: bool | str | None = None
    ) -> LanguageModel:
        """Return the model in training mode.

        use_gradient_checkpointing: as in `get_peft_model`; None leaves it as it is.
        """
        if use_gradient_checkpointing is not None:
            model.planner.level = parse_gradient_checkpointing(use_gradient_checkpointing)
        return model.for_training()


@foreign_arguments(**ATTACHING_CONFIG)
def get_peft_model(model: LanguageModel, peft_config: LoraConfig) -> LanguageModel:
    """Attach an adapter with these settings to a model and return the model, as PEFT's function.

    Raises: ValueError as `FastLanguageModel.get_peft_model`.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(
            f"peft_config is a {type(peft_config).__module__}.{type(peft_config).__name__}; "
            "build it with minitune.LoraConfig, which takes PEFT's arguments"
        )
    _attach(model, peft_config, DEFAULT_SEED)
    return model


@foreign_arguments(**PREPARING)
def prepare_model_for_kbit_training(model: LanguageModel) -> LanguageModel:
    """Return the model, which needs no preparation: its base is frozen already.

    Raises: ValueError if the model is another library's.
    """
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"model is a {type(model).__module__}.{type(model).__name__}; load it with "
            "minitune.FastLanguageModel.from_pretrained"
        )
    return model


def _attach(model: LanguageModel, lora: LoraConfig, seed: int) -> None:
    """Attach an adapter unless the model has one with the same settings.

    Raises: ValueError if a module does not exist, or if the model's adapter has other settings.
    """
    check_number("random_state", seed, SEEDS)
    if model.lora is None:
        model.add_lora(lora, seed)
        _compile_other_step(model)
        return
    wanted = (lora.r, lora.scaling, model.config.adapted_linears(lora.target_modules))
    if wanted != (model.lora.r, model.lora.scaling, model.lora.target_modules):
        raise ValueError(
            f"the model has an adapter with other settings already: {model.lora}; train that one "
            "further without get_peft_model, or load the base model again to attach a new one"
        )
    warn("the model has this adapter already, and it stays as it is", stacklevel=4)


def _read_tokenizer(base: Path, config: ModelConfig) -> Tokenizer:
    """Return the tokenizer of a folder or a GGUF file, after a check against the embedding.

    Raises: ValueError if the tokenizer is missing, or has more tokens than the embedding has rows.
    """
    tokenizer = Tokenizer.from_folder(model_files(base))
    tokenizer.name_or_path = str(base)  # not the temporary folder of a GGUF file
    check_vocabulary(tokenizer, config.vocab_size)
    return tokenizer


def _new_model(source: ModelSource, config: ModelConfig, **options: Any) -> LanguageModel:
    """Return a model without weights, which knows its folder.

    options: arguments of LanguageModel.
    """
    model = LanguageModel(config, **options)
    model.name, model.folder = source.name, model_files(source.base)
    model.gguf = source.base if is_gguf(source.base) else None
    model.generation_defaults = read_generation_defaults(model.folder)
    return model


def _fill(
    model: LanguageModel,
    stored: SafetensorsFolder | FileWeights,
    load_in_4bit: bool,
    offload_embedding: bool,
    progress: bool | None,
) -> None:
    """Read the weights of a model, and meanwhile compile the kernels of a step.

    Raises: ValueError if a tensor does not fit, or the host has no room for the embedding.
    """
    if isinstance(stored, FileWeights):
        compile_step_ahead(model, LoraConfig(), partial(stored_weight, stored))
        load_file_weights(model, stored, model.device, progress)
    else:
        is_nf4 = load_in_4bit or stored.prequantized
        weights = weights_of_folder(stored.dtype(EMBEDDING), is_nf4)
        compile_step_ahead(model, LoraConfig(), weights)
        load_weights(model, stored, model.device, load_in_4bit, progress)
    if offload_embedding and model.device.type == "cuda":
        try:
            model.model.embed_tokens.to_host()
        except MemoryError as error:
            raise ValueError(f"offload_embedding: {error}") from error
        torch.cuda.empty_cache()


def _attach_saved(model: LanguageModel, source: ModelSource, tokenizer: Tokenizer) -> None:
    """Attach the adapter of the source, if there is one, with its chat template.

    A warning says if generation stops at a token that the files do not name.
    """
    if source.adapter is not None:
        model.load_adapter(source.adapter, tokenizer)
        _compile_other_step(model)
    model.follow_ends(tokenizer)
    # A template that was assigned was the user's choice.
    if not tokenizer.template_was_assigned and (text := tokenizer.unnamed_end()):
        warn(text, stacklevel=5)


def _compile_other_step(model: LanguageModel) -> None:
    """Compile the kernels of a step ahead, unless `from_pretrained` did that for this adapter."""
    all_linear = model.config.adapted_linears(LORA_TARGETS)
    if (model.lora.r, model.lora.target_modules) != (LoraConfig.r, all_linear):
        compile_step_ahead(model, model.lora, weights_of_model(model))


def _mapped_device(
    device: str | torch.device | None, device_map: str | int | torch.device | Mapping | None
) -> str | torch.device | None:
    """Return the device that the two arguments name, or None.

    Raises: ValueError if they name several.
    """
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if len(set(places)) != 1 or (device is not None and places[0] not in ANY_DEVICE):
        raise ValueError(
            f"device_map={device_map!r} with device={device!r}: one device holds the whole model; "
            'name it once, as device="cuda:1"'
        )
    if device is not None or places[0] in ANY_DEVICE:
        return device
    return torch.device("cuda", places[0]) if isinstance(places[0], int) else places[0]


def _check_bits(load_in_16bit: bool, load_in_4bit: bool, base: Path) -> None:
    """Raise ValueError if the linears should be in 16 bit and are in few bits."""
    if load_in_16bit and is_gguf(base):
        raise ValueError(
            f"load_in_16bit=True: a GGUF file is read in the types that it has; load {base}, write "
            "it with save_pretrained_merged, and load that folder"
        )
    if load_in_16bit and load_in_4bit:
        raise ValueError("load_in_16bit=True needs load_in_4bit=False; 4 bit is the default")


def _check_adapter(config: ModelConfig, source: ModelSource) -> None:
    """Raise ValueError if there is an adapter that does not fit, before weights are read."""
    if source.adapter is None:
        return
    try:
        check_adapter(config, source.adapter)
    except ValueError as error:
        base = f"does not fit the model {source.base.name}"
        raise ValueError(f"{source.adapter}: {base}: {error}") from None


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

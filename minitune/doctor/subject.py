"""The model under examination: its first layers with a new adapter, and random samples for it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitune.api import FastLanguageModel
from minitune.checkpoints.adapter import check_adapter
from minitune.checkpoints.find_model import ModelSource, find_model
from minitune.config.model_config import EMBEDDING, ModelConfig
from minitune.config.training_config import LoraConfig
from minitune.data.batching import Batch, collate
from minitune.data.samples import Sample
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.doctor.first_layers import layers_to_check, write_first_layers
from minitune.doctor.random_model import write_random_model
from minitune.gguf.base.load import file_bytes, open_base
from minitune.gguf.file_weights import FileWeights
from minitune.language_model import LanguageModel
from minitune.memory.stored_weights import StoredWeights

MAX_SEQ_LENGTH = 2048
# Standard deviation of B: the adapter changes each linear by a good part, as after long training.
B_DEVIATION = 0.2
# Tokens of the samples. On a GPU they fill a size that is captured, so nothing is padded.
LENGTHS = {"cpu": (40, 9, 30, 17), "cuda": (200, 9, 181, 122)}
FIRST_TOKEN = 3  # ids below are special in many vocabularies


@dataclass(frozen=True)
class Request:
    """The wishes of the user; a model of None is a small random one.

    model, adapter: as in `find_model`.
    dtype: compute dtype.
    lora: settings of the new adapter, unless `model` or `adapter` names an adapter.
    """

    model: str | None
    adapter: str | None
    device: torch.device
    dtype: torch.dtype
    load_in_4bit: bool
    lora: LoraConfig


@dataclass
class Subject:
    """A loaded model with an adapter, as if the adapter were trained.

    config: shape of the whole model, of which `model` has the first layers.
    stored_weights: bytes of the whole model's frozen weights.
    folder: for the files of checks.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: ModelConfig
    stored_weights: StoredWeights
    folder: Path

    @property
    def layers_text(self) -> str:
        """Return the checked layers in words."""
        checked, layers = self.model.config.num_hidden_layers, self.config.num_hidden_layers
        return (
            f"all {layers} layers" if checked == layers else f"first {checked} of {layers} layers"
        )

    @property
    def bytes_to_write(self) -> int:
        """Return an upper bound on the bytes that the checks write.

        They are a merged model in 16 bit, a GGUF file, and a few copies of adapter and moments.
        """
        trainable, total = self.model.get_nb_trainable_parameters()
        return 4 * total + 64 * trainable

    @property
    def samples(self) -> list[Sample]:
        """Return samples of random tokens; the first third of each has no labels."""
        return self.random_samples(LENGTHS[self.model.device.type])

    @property
    def batch(self) -> Batch:
        """Return all samples side by side."""
        return collate(self.samples)

    def random_samples(self, lengths: tuple[int, ...], seed: int = 1) -> list[Sample]:
        """Return samples of random tokens of these lengths; a third of each has no labels."""
        generator, samples = torch.Generator().manual_seed(seed), []
        for length in lengths:
            top = min(len(self.tokenizer), self.model.config.vocab_size)
            ids = torch.randint(FIRST_TOKEN, top, (length,), generator=generator).tolist()
            samples.append(Sample(ids, [-100] * (length // 3) + ids[length // 3 :]))
        return samples

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers on the model's device, by default in its dtype."""
        generator = torch.Generator().manual_seed(seed + sum(shape))
        numbers = torch.randn(shape, generator=generator)
        return numbers.to(self.model.device, dtype or self.model.dtype)

    def draw_adapter_(self) -> None:
        """Give the adapter random values, always the same."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.model.trainable_parameters():
                deviation = B_DEVIATION if "lora_B" in name else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * deviation)
                p.grad = None


def find_source(request: Request, folder: Path) -> ModelSource:
    """Return the model of a request; without one, write a random model into `folder`."""
    if request.model is None:
        return find_model(write_random_model(folder / "random"))
    return find_model(request.model, request.adapter)


def load_subject(request: Request, source: ModelSource, folder: Path) -> Subject:
    """Return the loaded first layers of a model, with an adapter.

    folder: for the files of checks.

    Raises: ValueError that names the file at fault.
    """
    config, stored = open_base(source.base)
    lora = request.lora
    if source.adapter is not None:
        lora = check_adapter(config, source.adapter)
    count, base = layers_to_check(config, request.device.type), source.base
    if count < config.num_hidden_layers:
        base = write_first_layers(base, count, folder)
    model, tokenizer = FastLanguageModel.from_pretrained(
        base,
        max_seq_length=min(MAX_SEQ_LENGTH, config.max_position_embeddings),
        dtype=request.dtype,
        load_in_4bit=request.load_in_4bit,
        device=request.device,
        progress=False,
    )
    FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
    )
    if isinstance(stored, FileWeights):
        weights = file_bytes(stored, request.dtype)
    else:
        is_nf4 = request.load_in_4bit or stored.prequantized
        dtype = stored.dtype(EMBEDDING)
        weights = StoredWeights.of_folder(
            config, dtype.itemsize, is_nf4, converts_head=dtype != request.dtype
        )
    subject = Subject(model, tokenizer, config, weights, folder)
    subject.draw_adapter_()
    return subject

"""LoRA and QLoRA training of Llama, Qwen, Gemma and others, on model folders and GGUF files.

Usage: from minitune import FastLanguageModel, SFTTrainer, SFTConfig
"""

import gc
import sys

if "torch" not in sys.modules:
    import torch  # noqa: F401

    # A collection among torch's 170,000 objects takes 0.2 s, a third of this import. The objects
    # are permanent. If the caller imported torch, the caller's own objects may not be.
    gc.freeze()

from minitune.api import FastLanguageModel, get_peft_model, prepare_model_for_kbit_training
from minitune.config.foreign_names import missing_name
from minitune.config.model_config import ModelConfig
from minitune.config.sft_config import SFTConfig, TrainingArguments
from minitune.config.training_config import LoraConfig
from minitune.data.collator import DataCollatorForSeq2Seq
from minitune.data.sharegpt import standardize_data_formats, standardize_sharegpt
from minitune.data.templates.named_template import get_chat_template
from minitune.data.text_streamer import TextIteratorStreamer, TextStreamer
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.device import is_bfloat16_supported
from minitune.language_model import LanguageModel
from minitune.progress import quiet
from minitune.report.write_report import write_report
from minitune.sft_trainer import SFTTrainer, train_on_responses_only
from minitune.training.callbacks import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

FastModel = FastLanguageModel  # Unsloth's name for models of every kind

__all__ = [
    "DataCollatorForSeq2Seq",
    "EarlyStoppingCallback",
    "FastLanguageModel",
    "FastModel",
    "LanguageModel",
    "LoraConfig",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "TextIteratorStreamer",
    "TextStreamer",
    "Tokenizer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "get_chat_template",
    "get_peft_model",
    "is_bfloat16_supported",
    "prepare_model_for_kbit_training",
    "quiet",
    "standardize_data_formats",
    "standardize_sharegpt",
    "train_on_responses_only",
    "write_report",
]


def __getattr__(name: str) -> None:
    """Raise the error for a name that the package lacks, with what to use instead."""
    raise missing_name(name, __all__)

"""LoRA and QLoRA training of Llama, Mistral and Qwen, from a checkpoint folder to a GGUF file.

Usage: from minitune import FastLanguageModel, SFTTrainer, SFTConfig
"""

from minitune.api import FastLanguageModel, LanguageModel
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import LoraConfig, SFTConfig
from minitune.data.templates.builtin_templates import get_chat_template
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.training.trainer import SFTTrainer

__all__ = [
    "FastLanguageModel",
    "LanguageModel",
    "LoraConfig",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "Tokenizer",
    "get_chat_template",
]

"""LoRA and QLoRA training of Llama-family models, from a checkpoint folder to a GGUF file, on its own kernels.

from minitune import FastLanguageModel, SFTTrainer, SFTConfig
"""

from minitune.config import LoraConfig, ModelConfig, SFTConfig
from minitune.loading import FastLanguageModel
from minitune.model import LlamaForCausalLM
from minitune.tokenizer import Tokenizer
from minitune.trainer import SFTTrainer

__all__ = [
    "FastLanguageModel",
    "LlamaForCausalLM",
    "LoraConfig",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "Tokenizer",
]

"""Tokenizers of a few hundred tokens, trained on the spot, as the files of a model folder.

write_json_tokenizer(folder)     a byte-level BPE in tokenizer.json with a BOS, as Llama 3's
sentencepiece_bytes()            a sentencepiece BPE with byte fallback, for tokenizer.model
write_chat_tokenizer(folder)     a byte-level BPE whose pad token is its EOS token
"""

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today?",
    "{'role': 'user'} what is two plus two? it is 4",
    "naïve café costs 12 euros",
] * 5
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|start|>"]
HEAD = "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n"
FOOT = "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CHATML = HEAD + "{{ m['content'] }}<|end|>\n" + FOOT
TAGGED = (
    HEAD
    + "{% if m['role'] == 'assistant' %}"
    + "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    + "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}"
    + FOOT
)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON in UTF-8."""
    path.write_text(json.dumps(value), encoding="utf-8")


def _train_byte_level_bpe(
    lines: list[str], special: list[str], vocab_size: int, bos_id: int
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines, trainer)
    add_bos = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos_id)]
    )
    trim = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([trim, add_bos])
    return tokenizer


def write_json_tokenizer(folder: Path, template: Any = CHATML, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `folder` and return it.

    config: more keys of tokenizer_config.json.
    """
    tokenizer = _train_byte_level_bpe(LINES, SPECIAL, vocab_size=330, bos_id=1)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    write_json(folder / "tokenizer_config.json", {"chat_template": template, **named, **config})
    return folder


@functools.cache
def sentencepiece_bytes() -> bytes:
    """Return the content of a tokenizer.model."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=file,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return file.getvalue()


@functools.cache
def _chat_tokenizer() -> Tokenizer:
    lines = ["How many? Four. And now? user assistant system Count."] * 3
    special = ["<|bos|>", "<|end|>", "<|start|>"]
    return _train_byte_level_bpe(lines, special, vocab_size=300, bos_id=0)


def write_chat_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """Write a tokenizer that adds a BOS and whose pad token is its EOS token; return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _chat_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    write_json(folder / "tokenizer_config.json", {"chat_template": template, **config})
    return folder

"""The tokenizer of a model folder: text to ids and back, special tokens, the chat template.

The library that owns a file format reads it:

- `tokenizers` reads tokenizer.json, exactly as the file says. The class names in
  tokenizer_config.json are ignored: code that rebuilds a tokenizer from such a name can lose parts
  of it, such as a pre-tokenizer's rule for digits.
- `sentencepiece` reads tokenizer.model (Llama 1 and 2, Mistral) if there is no tokenizer.json.

Special tokens are never added twice. A rendered conversation brings its own BOS and is encoded as
it is. Plain text gets the special tokens that the tokenizer puts around a sequence (`prefix`,
`suffix`). Samples are packed and not padded, so a pad token that equals the EOS token is harmless.
"""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from minitune.atomic_files import read_json
from minitune.data.chat_template import ChatTemplate
from minitune.data.samples import Span
from minitune.data.sentencepiece_backend import SentencePieceBackend

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
JSON_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
)
SPECIAL_NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")

Encoding = tuple[list[int], list[Span]]  # token ids, and the characters that each stands for


class JsonBackend:
    """tokenizer.json.

    The post-processor is removed and its effect is kept as `prefix` and `suffix`. It would trim
    spaces off the character offsets, and a token of white space would then have an empty span.
    """

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{path}: tokenizers {tokenizers.__version__} cannot read it: {error}"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.named: dict[str, int] = {}  # tokenizer.json does not name its special tokens
        self.prefix, self.suffix = self._special_tokens_around(vocabulary)
        self._tokenizer.post_processor = None

    def _special_tokens_around(self, vocabulary: dict[str, int]) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor adds before and after a text."""
        for text in ("a", *vocabulary):  # the first text that has a token: almost always "a"
            bare = self._tokenizer.encode(text, add_special_tokens=False).ids
            if bare:
                break
        full = self._tokenizer.encode(text).ids
        begin = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:begin], full[begin + len(bare) :]

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        """Return the encodings of many texts, without special tokens, on all cores."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token's text, or None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """Return the text of a token id, or None if the vocabulary lacks it."""
        return self._tokenizer.id_to_token(index)


class Tokenizer:
    """The tokenizer of a model folder; `Tokenizer.from_folder` makes one."""

    def __init__(
        self, folder: Path, backend: JsonBackend | SentencePieceBackend, files: dict[str, dict]
    ):
        self.folder, self._backend = folder, backend
        self._config, self._map = files["tokenizer_config.json"], files["special_tokens_map.json"]
        self._model_config, self._generation = files["config.json"], files["generation_config.json"]
        self.vocab_size: int = backend.vocab_size  # highest id + 1, added tokens included
        self.special: dict[str, int] = {}  # "bos" -> id; names without a token are missing
        for name in SPECIAL_NAMES:
            index = self._special_id(name)
            if index is not None:
                self.special[name] = index
        self.chat_template: str | None = _chat_template(folder, self._config)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model folder.

        Raises: ValueError that names the folder or file that is missing or wrong.
        """
        folder = Path(folder)
        files = {name: read_json(folder / name, default={}) for name in JSON_FILES}
        path = folder / "tokenizer.json"
        if path.is_file():
            return cls(folder, JsonBackend(path), files)
        path = folder / "tokenizer.model"
        if path.is_file():
            config, added = files["tokenizer_config.json"], files["added_tokens.json"]
            return cls(folder, SentencePieceBackend(path, config, added), files)
        raise ValueError(
            f"{folder}: no tokenizer.json and no tokenizer.model; a model folder holds one of them"
        )

    def _special_id(self, name: str) -> int | None:
        """Return the id of a special token, from the first file that says something about it.

        The order is tokenizer_config.json, special_tokens_map.json, the sentencepiece model,
        config.json, generation_config.json. A null in the first two means that there is none.
        """
        key = f"{name}_token"
        for file, content in (
            ("tokenizer_config.json", self._config),
            ("special_tokens_map.json", self._map),
        ):
            if key in content:
                return self._token_id(content[key], key, file)
        if name in self._backend.named:
            return self._backend.named[name]
        for content in (self._model_config, self._generation):
            ids = _id_list(content.get(f"{key}_id"), self.vocab_size)
            if ids:
                return ids[0]
        return None

    def _token_id(self, token: Any, key: str, file: str) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return None
        if not isinstance(text, str):
            raise ValueError(f"{self.folder / file}: {key} is {text!r}, expected a token's text")
        index = self._backend.token_to_id(text)
        if index is None:
            raise ValueError(
                f"{self.folder}: {key} is {text!r}, which is not in the tokenizer's vocabulary"
            )
        return index

    @property
    def eos_token(self) -> str | None:
        """Return the text of the EOS token."""
        return self._backend.id_to_token(self.special["eos"]) if "eos" in self.special else None

    @property
    def bos_token_id(self) -> int | None:
        """Return the id of the BOS token."""
        return self.special.get("bos")

    @property
    def eos_token_id(self) -> int | None:
        """Return the id of the EOS token."""
        return self.special.get("eos")

    @property
    def pad_token_id(self) -> int | None:
        """Return the id of the pad token."""
        return self.special.get("pad")

    @property
    def unk_token_id(self) -> int | None:
        """Return the id of the unknown token."""
        return self.special.get("unk")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return every id that ends a generation.

        The order is eos_token, generation_config.json, config.json.
        """
        ids = [] if self.eos_token_id is None else [self.eos_token_id]
        for content in (self._generation, self._model_config):
            ids += _id_list(content.get("eos_token_id"), self.vocab_size)
        return tuple(dict.fromkeys(ids))

    @cached_property
    def template(self) -> ChatTemplate:
        """Compile the chat template.

        Raises: ValueError if the model folder has none.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.folder}: this tokenizer has no chat template; use the instruction-tuned "
                "model of the same family, put a chat_template.jinja there, or train on plain "
                "text or prompt and completion"
            )
        special = {
            f"{name}_token": self._backend.id_to_token(index)
            for name, index in self.special.items()
        }
        stops = tuple(map(self._backend.id_to_token, self.eos_token_ids))
        return ChatTemplate(self.chat_template, special, stops)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text.

        add_special_tokens: add the special tokens that this tokenizer puts around a text, such as
            the BOS, unless the text begins or ends with them.
        """
        ids, _ = self.encode_with_offsets(text)
        if not add_special_tokens:
            return ids
        prefix, suffix = self.special_tokens_around(ids)
        return [*prefix, *ids, *suffix]

    def special_tokens_around(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the special tokens that are missing before and after the ids of a plain text."""
        prefix, suffix = self._backend.prefix, self._backend.suffix
        return (
            [] if ids[: len(prefix)] == prefix else prefix,
            [] if ids[len(ids) - len(suffix) :] == suffix else suffix,
        )

    def encode_with_offsets(self, text: str) -> Encoding:
        """Return (ids, spans) of a text, without special tokens; spans count characters."""
        return self._backend.encode_batch([text])[0]

    def encode_batch_with_offsets(self, texts: list[str]) -> list[Encoding]:
        """Return `encode_with_offsets` of many texts, on all cores if the library can."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._backend.decode(list(ids), skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        tools: list | None = None,
    ) -> list[int] | str:
        """Return a conversation as the model sees it: its ids, or its text if not `tokenize`."""
        text = self.template.render(messages, add_generation_prompt, tools)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, byte for byte."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raise ValueError if the tokenizer has ids beyond the `rows` of the embedding.

    More rows than tokens is normal: vocabularies are padded to a round number.
    """
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{tokenizer.folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the "
            f"model's embedding has only {rows} rows; use the tokenizer that belongs to this model"
        )


def _chat_template(folder: Path, config: dict) -> str | None:
    """Return chat_template.jinja, otherwise the chat_template of tokenizer_config.json.

    The latter is a text, or a list of named texts of which "default" is taken.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        if template and "default" not in named:
            raise ValueError(
                f"{folder}/tokenizer_config.json: no chat template is named 'default' "
                f"among {list(named)}"
            )
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ValueError(
            f"{folder}/tokenizer_config.json: chat_template is a {type(template).__name__}, "
            "not a text"
        )
    return template


def _id_list(value: Any, vocab_size: int) -> list[int]:
    """Return the valid ids in a field of a config: a number, a list of numbers, or neither."""
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and 0 <= index < vocab_size]

"""The tokenizer of a model folder: text to ids and back, special tokens, the chat template.

The library that owns a file format reads it:

- `tokenizers` reads tokenizer.json (json_backend.py).
- `sentencepiece` reads tokenizer.model (Llama 1 and 2, Mistral) if there is no tokenizer.json
  (sentencepiece_backend.py).

The JSON files beside them add tokens (added_tokens.py) and chat templates (folder_templates.py).
Other files, such as vocab.json and merges.txt, are not read.

Special tokens are never added twice. A rendered conversation brings its own BOS and is encoded as
it is. Plain text gets the special tokens that the tokenizer puts around a sequence (`prefix`,
`suffix`). Samples are packed and not padded, so a pad token that equals the EOS token is harmless.
"""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from minitune.atomic_files import write_json
from minitune.data.templates.chat_template import ChatTemplate
from minitune.data.templates.end_of_turn import text_behind_answer
from minitune.data.templates.folder_templates import (
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    Templates,
    checked_templates,
    read_templates,
    write_templates,
)
from minitune.data.tokenization.added_tokens import (
    SPECIAL_NAMES,
    TOKENS_MAP,
    DeclaredTokens,
    read_declared_tokens,
)
from minitune.data.tokenization.json_backend import Encoding, JsonBackend
from minitune.data.tokenization.sentencepiece_backend import SentencePieceBackend
from minitune.data.tokenization.tokenizer_calls import TokenizerCalls
from minitune.data.tokenization.tokenizer_config import (
    check_config,
    check_prefix_space,
    ignored_keys,
)
from minitune.read_files import file_exists, read_json

CONFIG = "tokenizer_config.json"
JSON_FILES = (CONFIG, "special_tokens_map.json", "added_tokens.json", "generation_config.json")
FILES = ("tokenizer.json", "tokenizer.model", *JSON_FILES)  # that belong to the tokenizer
READ_JSON_FILES = (*JSON_FILES, "config.json")
OTHER_VOCABULARIES = ("vocab.json", "merges.txt", "tekken.json", "tiktoken.model", "vocab.txt")


class Tokenizer(TokenizerCalls):
    """The tokenizer of a model folder; `Tokenizer.from_folder` makes one.

    name_or_path: the model's folder or GGUF file as text.
    declared_ids: ids that the files beside the vocabulary name.
    adds_prefix_space: True if a text gets a space before it.
    prefixes_each_stretch: True if the text behind a special token gets one too.
    """

    def __init__(
        self,
        folder: Path,
        backend: JsonBackend | SentencePieceBackend,
        files: dict[str, dict],
        declared: DeclaredTokens,
    ):
        self.folder, self._backend, self._declared = folder, backend, declared
        self.name_or_path = str(folder)
        self._files = files
        self.id_count: int = backend.id_count  # highest id + 1, added tokens included
        self.vocab_size: int = backend.vocab_size  # tokens without added ones, as in transformers
        self.added_tokens: dict[int, AddedToken] = backend.added
        self.declared_ids = {index for _, _, index in declared.claims if index is not None}
        self.adds_prefix_space: bool = backend.adds_prefix_space
        self.prefixes_each_stretch: bool = backend.prefixes_each_stretch
        self._chat_template = read_templates(folder, files[CONFIG])
        self.template_was_assigned = False
        self.special: dict[str, int] = {}  # "bos" -> id; names without a token are missing
        for name in SPECIAL_NAMES:
            if (index := self._special_id(name)) is not None:
                self.special[name] = index
        self._read_settings(files[CONFIG], backend.is_byte_level)
        # Facts about the files that the user should know.
        self.notes: tuple[str, ...] = tuple(dict.fromkeys(declared.notes))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model folder.

        Raises: ValueError that names the folder or file that is missing or wrong.
        """
        folder = Path(folder)
        files = {
            name: read_json(folder / name, default={}) for name in (*JSON_FILES, "config.json")
        }
        config = files[CONFIG]
        check_config(folder / CONFIG, config)
        declared = read_declared_tokens(folder, files)
        path = folder / "tokenizer.json"
        if file_exists(path):
            backend = JsonBackend(path, declared)
            check_prefix_space(path, backend.adds_prefix_space, config)
            declared.notes += ignored_keys(path, config, backend)
            return cls(folder, backend, files, declared)
        path = folder / "tokenizer.model"
        if file_exists(path):
            return cls(folder, SentencePieceBackend(path, config, declared), files, declared)
        others = [name for name in OTHER_VOCABULARIES if (folder / name).is_file()]
        remedy = f"; convert {' and '.join(others)} to tokenizer.json first" if others else ""
        raise ValueError(
            f"{folder}: no tokenizer.json and no tokenizer.model; a model folder holds one of them"
            f"{remedy}"
        )

    def _special_id(self, name: str) -> int | None:
        """Return the id of a special token, from the first file that says something about it.

        The order is tokenizer_config.json and special_tokens_map.json (added_tokens.py), the
        sentencepiece model, config.json, generation_config.json. A null in the first two means that
        there is none.
        """
        key = f"{name}_token"
        if key in self._declared.named:
            token = self._declared.named[key]
            return None if token is None else self._backend.token_to_id(token.content)
        if name in self._backend.named:
            return self._backend.named[name]
        for file in ("config.json", "generation_config.json"):
            ids = _id_list(self._files[file].get(f"{key}_id"), self.id_count)
            if ids:
                if key in str(self._chat_template):
                    self._declared.notes.append(
                        f"{self.folder}: no tokenizer file names the {key} that the chat template "
                        f"writes; the {key}_id {ids[0]} of {file} counts, as in llama.cpp"
                    )
                return ids[0]
        return None

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return every id that ends a generation.

        The order is eos_token, generation_config.json, config.json, the token in which the answers
        of the chat template end.
        """
        ids = self._named_ends()
        if self._template_end is not None:
            ids.append(self._template_end)
        return tuple(dict.fromkeys(ids))

    def _named_ends(self) -> list[int]:
        """Return the ids that the files name as EOS: those at which other programs stop."""
        ids = [] if self.eos_token_id is None else [self.eos_token_id]
        for file in ("generation_config.json", "config.json"):
            ids += _id_list(self._files[file].get("eos_token_id"), self.id_count)
        return ids

    @cached_property
    def _text_behind_answer(self) -> str:
        """Return the text behind an answer in the chat template, "" if there is none."""
        if self.chat_template is None:
            return ""
        return text_behind_answer(self._compiled(self.chat_template, ()).render).lstrip()

    @cached_property
    def _template_end(self) -> int | None:
        """Return the added token behind an answer in the chat template, or None.

        A base model may be trained on a template whose turns end in another token than eos_token.
        """
        ends = [
            i
            for i, token in self.added_tokens.items()
            if self._text_behind_answer.startswith(token.content) and i != self.bos_token_id
        ]
        return max(ends, key=lambda i: len(self.added_tokens[i].content), default=None)

    def unnamed_end(self) -> str | None:
        """Return a warning if answers end otherwise than the files say, or None.

        An end of turn that is no token of the vocabulary stops nothing.
        """
        named = [self.id_to_token(index) for index in dict.fromkeys(self._named_ends())]
        files = f"the files name {' and '.join(named) or 'no token'} as the end of a generation"
        if self._template_end is None:
            text = self._text_behind_answer.strip()
            if not text or text.startswith(tuple(filter(None, named))):
                return None
            return (
                f"{self.name_or_path}: answers of the chat template end in {text!r:.60}, which is "
                f"no token of the vocabulary, and {files}; generation stops at that text only if "
                "it is a stop string"
            )
        if self._template_end in self._named_ends():
            return None
        return (
            f"{self.name_or_path}: answers of the chat template end in "
            f"{self.id_to_token(self._template_end)}, but {files}; generation stops at all of "
            "them here, and other programs do if eos_token_id in generation_config.json lists them"
        )

    @property
    def chat_template(self) -> Templates:
        """Return the chat template: a text, several texts by name, or None.

        Assigning takes effect in every method, in training and in what is saved and exported.

        Raises: ValueError, on assignment, if it is no template.
        """
        return self._chat_template

    @chat_template.setter
    def chat_template(self, value: Templates) -> None:
        value = checked_templates(value, "tokenizer")
        if value is not None:
            self._compiled(value, ())
        self._chat_template, self.template_was_assigned = value, True
        for name in ("template", "eos_token_ids", "_template_end", "_text_behind_answer"):
            self.__dict__.pop(name, None)  # they are computed from the template

    @cached_property
    def template(self) -> ChatTemplate:
        """Compile the chat template.

        Raises: ValueError if the model folder has none.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.name_or_path}: this tokenizer has no chat template; use the "
                f"instruction-tuned model of the same family, put a {TEMPLATE_FILE} into the model "
                "folder (the template of a chat_template.json is a processor's), set one with "
                "get_chat_template, or train on plain text or prompt and completion"
            )
        stops = tuple(map(self._backend.id_to_token, self.eos_token_ids))
        return self._compiled(self.chat_template, stops)

    def _compiled(self, templates: str | dict[str, str], stops: tuple[str, ...]) -> ChatTemplate:
        named = {key: str(token) for key, token in self._declared.named.items() if token}
        standard = {
            f"{name}_token": self._backend.id_to_token(index)
            for name, index in self.special.items()
        }
        special = tuple(str(token) for token in self.added_tokens.values() if token.special)
        return ChatTemplate(templates, named | standard, stops, special)

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

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of many texts, without special tokens, on all cores if possible."""
        return self._backend.encode_batch_ids(texts)

    def definition(self) -> dict[str, Any] | None:
        """Return the content of tokenizer.json, as it is used; None for tokenizer.model."""
        return self._backend.definition() if isinstance(self._backend, JsonBackend) else None

    def id_to_token(self, index: int) -> str | None:
        """Return the text of a token id as the vocabulary spells it, or None."""
        return self._backend.id_to_token(index)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token's text, or None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def __len__(self) -> int:
        """Return the number of tokens, added tokens included."""
        return self._backend.size

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, byte for byte.

        A chat template or a setting that was assigned, such as pad_token, is written instead of
        the original one.

        Raises: ValueError if the files were removed since they were read.
        """
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: was removed meanwhile; load the model again")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        assigned, config = self.assigned_settings(), self._files[CONFIG]
        if self.template_was_assigned:
            config = {key: value for key, value in config.items() if key != "chat_template"}
            write_templates(folder, self.chat_template)
        else:
            for path in (self.folder / TEMPLATE_FILE, *self.folder.glob(f"{TEMPLATE_FOLDER}/*")):
                if path.is_file():
                    target = folder / path.relative_to(self.folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)
        if config | assigned != self._files[CONFIG]:
            write_json(folder / CONFIG, config | assigned)
        tokens_map = self._files[TOKENS_MAP]
        if "pad_token" in assigned and "pad_token" in tokens_map:
            write_json(folder / TOKENS_MAP, tokens_map | {"pad_token": assigned["pad_token"]})


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raise ValueError if the tokenizer has ids beyond the `rows` of the embedding.

    More rows than tokens is normal: vocabularies are padded to a round number.
    """
    if tokenizer.id_count > rows:
        highest = tokenizer.id_count - 1
        raise ValueError(
            f"{tokenizer.folder}: the tokenizer has ids up to {highest}, but the model's embedding "
            f"has only {rows} rows; use the tokenizer that belongs to this model. The last token "
            f"is {tokenizer.id_to_token(highest)!r}"
        )


def _id_list(value: Any, id_count: int) -> list[int]:
    """Return the valid ids in a field of a config: a number, a list of numbers, or neither."""
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and 0 <= index < id_count]

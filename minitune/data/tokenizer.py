"""The tokenizer of a checkpoint folder: text to ids and back, special tokens, the chat template.

Two file formats, read by the libraries that own them:
- `tokenizer.json` through `tokenizers`, exactly as the file says. No class name of tokenizer_config.json is consulted,
  so nothing is rebuilt from what a name suggests (that is how a pre-tokenizer's digit rule gets lost elsewhere).
- only `tokenizer.model` (Llama 1 and 2, Mistral) through `sentencepiece`. That library treats special tokens as plain
  text, so the text is cut at them first and the pieces between are encoded one by one.

Special tokens are never added twice: a rendered conversation brings its own BOS and is encoded as it stands, and
plain text gets what the tokenizer puts around a sequence (`prefix`, `suffix`). Padding is never needed here, so a
pad token that equals the EOS token changes nothing.
"""

import json
import shutil
from functools import cached_property
from pathlib import Path

import tokenizers

from minitune.data.chat_template import ChatTemplate
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
NAMED = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")

Encoding = tuple[
    list[int], list[tuple[int, int]]
]  # ids, and the characters [begin, end) that each stands for


class JsonBackend:
    """tokenizer.json. The post-processor is replaced by its effect (prefix, suffix), because it would also trim
    spaces off the character offsets, and then a token of white space would stand for no character at all."""

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
        self.named: dict[str, int] = {}
        for probe in ("a", *vocabulary):  # the first text that has a token; almost always "a"
            if bare := self._tokenizer.encode(probe, add_special_tokens=False).ids:
                break
        full = self._tokenizer.encode(probe).ids
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self.prefix, self.suffix = full[:at], full[at + len(bare) :]
        self._tokenizer.post_processor = None

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        return [
            (e.ids, e.offsets)
            for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        return self._tokenizer.id_to_token(index)


class Tokenizer:
    """Text to ids and back. Made by `Tokenizer.from_folder`."""

    def __init__(
        self, folder: Path, backend: JsonBackend | SentencePieceBackend, files: dict[str, dict]
    ):
        self.folder, self._backend = folder, backend
        self._config, self._map = files["tokenizer_config.json"], files["special_tokens_map.json"]
        self._model_config, self._generation = files["config.json"], files["generation_config.json"]
        self.vocab_size: int = backend.vocab_size  # highest id + 1, added tokens included
        self.special: dict[str, int] = {}  # "bos" -> id, for those that there are
        for name in NAMED:
            if (index := self._named_id(name)) is not None:
                self.special[name] = index
        self.chat_template: str | None = _chat_template(folder, self._config)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model folder. ValueError names the folder or the file that is missing or wrong."""
        folder = Path(folder)
        names = (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "generation_config.json",
        )
        files = {name: _read_json(folder / name) for name in (*names, "config.json")}
        if (path := folder / "tokenizer.json").is_file():
            return cls(folder, JsonBackend(path), files)
        if (path := folder / "tokenizer.model").is_file():
            backend = SentencePieceBackend(
                path, files["tokenizer_config.json"], files["added_tokens.json"]
            )
            return cls(folder, backend, files)
        raise ValueError(
            f"{folder}: no tokenizer.json and no tokenizer.model; a model folder holds one of them"
        )

    def _named_id(self, name: str) -> int | None:
        """The id of the token called NAME_token in the tokenizer's files, else of NAME_token_id in config.json."""
        key = f"{name}_token"
        for file, source in (
            ("tokenizer_config.json", self._config),
            ("special_tokens_map.json", self._map),
        ):
            if key in source:
                token = source[key]
                token = token.get("content") if isinstance(token, dict) else token
                if token is None:
                    return None
                if not isinstance(token, str):
                    raise ValueError(
                        f"{self.folder / file}: {key} is {token!r}, expected a token's text"
                    )
                if (index := self._backend.token_to_id(token)) is None:
                    raise ValueError(
                        f"{self.folder}: {key} is {token!r}, which is not in the tokenizer's vocabulary"
                    )
                return index
        if name in self._backend.named:
            return self._backend.named[name]
        for source in (self._model_config, self._generation):
            if ids := _id_list(source.get(f"{key}_id"), self.vocab_size):
                return ids[0]
        return None

    @property
    def eos_token(self) -> str | None:
        return self._backend.id_to_token(self.special["eos"]) if "eos" in self.special else None

    @property
    def bos_token_id(self) -> int | None:
        return self.special.get("bos")

    @property
    def eos_token_id(self) -> int | None:
        return self.special.get("eos")

    @property
    def pad_token_id(self) -> int | None:
        return self.special.get("pad")

    @property
    def unk_token_id(self) -> int | None:
        return self.special.get("unk")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation: eos_token, then those of generation_config.json and config.json."""
        ids = [] if self.eos_token_id is None else [self.eos_token_id]
        for source in (self._generation, self._model_config):
            ids += _id_list(source.get("eos_token_id"), self.vocab_size)
        return tuple(dict.fromkeys(ids))

    @cached_property
    def template(self) -> ChatTemplate:
        """The compiled chat template. ValueError when the checkpoint has none."""
        if self.chat_template is None:
            raise ValueError(
                f"{self.folder}: this tokenizer has no chat template; use the checkpoint's instruction-tuned sibling, "
                "put a chat_template.jinja there, or train on plain text or prompt and completion"
            )
        special = {
            f"{name}_token": self._backend.id_to_token(index)
            for name, index in self.special.items()
        }
        return ChatTemplate(
            self.chat_template, special, tuple(map(self._backend.id_to_token, self.eos_token_ids))
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the BOS (and whatever else) that this tokenizer puts around one, unless told not."""
        ids = self.encode_with_offsets(text)[0]
        prefix, suffix = self.special_tokens_around(ids) if add_special_tokens else ([], [])
        return [*prefix, *ids, *suffix]

    def special_tokens_around(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """What this tokenizer puts before and behind a sequence, less what the text has brought itself (its BOS)."""
        prefix, suffix = self._backend.prefix, self._backend.suffix
        return (
            [] if ids[: len(prefix)] == prefix else prefix,
            [] if ids[len(ids) - len(suffix) :] == suffix else suffix,
        )

    def encode_with_offsets(self, text: str) -> Encoding:
        """(ids, [(begin, end)]): no special token is added; offsets count the characters of `text`."""
        return self._backend.encode_batch([text])[0]

    def encode_batch_with_offsets(self, texts: list[str]) -> list[Encoding]:
        """`encode_with_offsets` of many texts, on all cores where the library can."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        tools: list | None = None,
    ) -> list[int] | str:
        """The conversation as the model is to see it: ids, or the text they are made of. Nothing is added to it."""
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
    """ValueError when the tokenizer can produce an id that the embedding of `rows` rows does not have.

    More rows than tokens is normal: vocabularies are padded to a round number.
    """
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{tokenizer.folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's "
            f"embedding has only {rows} rows; use the tokenizer that belongs to this checkpoint"
        )


def _chat_template(folder: Path, config: dict) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's chat_template (a text, or named ones: "default")."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        if template and "default" not in named:
            raise ValueError(
                f"{folder}/tokenizer_config.json: no chat template is named 'default' among {list(named)}"
            )
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ValueError(
            f"{folder}/tokenizer_config.json: chat_template is a {type(template).__name__}, not a text"
        )
    return template


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _id_list(value, vocab_size: int) -> list[int]:
    """The ids in a config's field: a number, a list of numbers, or nothing."""
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and 0 <= index < vocab_size]

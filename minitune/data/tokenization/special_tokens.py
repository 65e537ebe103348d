"""The special tokens and the settings of a tokenizer as attributes, under transformers' names.

The pad token, the sides and model_max_length can be assigned: they decide about batches for
inference only, because training packs its samples. The other special tokens are those of the
folder: training, generation and export agree on them.
"""

from pathlib import Path
from typing import Any

from minitune.config.numbers import check_number, number
from minitune.data.tokenization.added_tokens import CONFIG, SPECIAL_NAMES
from minitune.data.tokenization.batch_encoding import SIDES

NO_MAX_LENGTH = int(1e30)  # transformers' number for "unknown"
LENGTH_BOUNDS = number(1, 1e31)  # of model_max_length; a float such as 1e30 is taken too
# Classes of transformers that pad on the left unless the folder says otherwise.
PAD_LEFT = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
FIXED = "is that of the model's folder; change it in tokenizer_config.json, and load again"


def _token(name: str) -> property:
    """Return the property for the text of a special token that cannot be assigned."""

    def read(self) -> str | None:
        index = self.special.get(name)
        return None if index is None else self.id_to_token(index)

    def refuse(self, value: str | None) -> None:
        if value != read(self):
            raise ValueError(f"{name}_token {read(self)!r} {FIXED}; {value!r} is not taken")

    return property(read, refuse, doc=f"Return the text of the {name.upper()} token.")


def _token_id(name: str) -> property:
    """Return the property for the id of a special token that cannot be assigned."""

    def refuse(self, value: int | None) -> None:
        if value != self.special.get(name):
            raise ValueError(f"{name}_token_id {self.special.get(name)} {FIXED}; {value} is not")

    return property(
        lambda self: self.special.get(name), refuse, doc=f"Return the id of the {name} token."
    )


def _added_token(name: str) -> property:
    """Return the property that tells if a text gets a special token, which cannot be changed."""

    def read(self) -> bool:
        prefix, suffix = self.special_tokens_around([])
        return self.special.get(name) in (prefix if name == "bos" else suffix)

    def refuse(self, value: bool) -> None:
        if value != read(self):
            raise ValueError(
                f"add_{name}_token={value} is not supported: tokenizer.json decides; write "
                f"tokenizer.{name}_token into the text. Training ends plain texts and completions "
                "with the end token"
            )

    return property(read, refuse, doc=f"Return True if a text gets the {name.upper()} token.")


class SpecialTokens:
    """Attributes of a tokenizer that its files name.

    folder: the folder of the files.
    special: ids by name, such as "bos"; names without a token are missing.
    padding_side, truncation_side: "left" or "right".
    model_max_length: length that `truncation=True` cuts to, in tokens.
    """

    folder: Path
    special: dict[str, int]
    bos_token, bos_token_id = _token("bos"), _token_id("bos")
    eos_token, eos_token_id = _token("eos"), _token_id("eos")
    add_bos_token, add_eos_token = _added_token("bos"), _added_token("eos")
    unk_token, unk_token_id = _token("unk"), _token_id("unk")

    def _read_settings(self, config: dict[str, Any], is_byte_level: bool) -> None:
        """Take the settings of tokenizer_config.json.

        is_byte_level: True if the vocabulary spells bytes as letters, which the classes that pad on
            the left do not.

        Raises: ValueError that names the file and the key if a value is wrong.
        """
        kind = str(config.get("tokenizer_class")).removesuffix("Fast")
        side = "left" if kind in PAD_LEFT and not is_byte_level else "right"
        self.padding_side: str = config.get("padding_side", side)
        self.truncation_side: str = config.get("truncation_side", "right")
        for key in ("padding_side", "truncation_side"):
            if getattr(self, key) not in SIDES:
                raise ValueError(
                    f"{self.folder / CONFIG}: {key} is {getattr(self, key)!r:.60}; expected "
                    "'left' or 'right'"
                )
        length = config.get("model_max_length") or NO_MAX_LENGTH
        name = f"{self.folder / CONFIG}: model_max_length"
        self.model_max_length = int(check_number(name, length, LENGTH_BOUNDS))
        self._settings_of_folder = self._settings()

    def _settings(self) -> dict[str, Any]:
        """Return the settings that can be assigned, under the keys of tokenizer_config.json."""
        return {
            "pad_token": self.pad_token,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_max_length": self.model_max_length,
        }

    def assigned_settings(self) -> dict[str, Any]:
        """Return the settings that differ from those of the folder.

        Raises: ValueError if a side is neither "left" nor "right".
        """
        for side in (self.padding_side, self.truncation_side):
            if side not in SIDES:
                raise ValueError(f"the side {side!r} of a tokenizer is neither 'left' nor 'right'")
        folder = self._settings_of_folder
        return {key: value for key, value in self._settings().items() if value != folder[key]}

    @property
    def pad_token(self) -> str | None:
        """Return the text of the pad token. A token of the vocabulary can be assigned."""
        return self.id_to_token(self.special["pad"]) if "pad" in self.special else None

    @pad_token.setter
    def pad_token(self, value: str | None) -> None:
        self.__dict__.pop("template", None)  # it may write the pad token
        if value is None:
            self.special.pop("pad", None)
            return
        index = self.token_to_id(str(value))
        if index is None:
            raise ValueError(
                f"the vocabulary lacks the pad token {str(value)!r}, and tokens cannot be added; "
                "set tokenizer.pad_token = tokenizer.eos_token: padding is masked"
            )
        self.special["pad"] = index

    @property
    def pad_token_id(self) -> int | None:
        """Return the id of the pad token, which can be assigned."""
        return self.special.get("pad")

    @pad_token_id.setter
    def pad_token_id(self, value: int | None) -> None:
        token = None if value is None else self.id_to_token(value)
        if value is not None and token is None:
            raise ValueError(f"the vocabulary has no id {value}; choose one below {len(self)}")
        self.pad_token = token

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Return the special tokens that have a name, such as "eos_token"."""
        names = [name for name in SPECIAL_NAMES if name in self.special]
        return {f"{name}_token": self.id_to_token(self.special[name]) for name in names}

    @property
    def all_special_tokens(self) -> list[str]:
        """Return the texts of the special tokens: those with a name, then further ones."""
        further = map(str, self._declared.extra)
        return list(dict.fromkeys([*self.special_tokens_map.values(), *further]))

    @property
    def all_special_ids(self) -> list[int]:
        """Return the ids of `all_special_tokens`."""
        return list(map(self.token_to_id, self.all_special_tokens))

    def add_special_tokens(self, special_tokens: dict[str, Any], *_: Any) -> int:
        """Assign the pad token if the vocabulary holds it; return 0, the number of new tokens.

        Raises: ValueError for any other token, because the embedding does not grow.
        """
        if set(special_tokens) != {"pad_token"}:
            return self.add_tokens(special_tokens)
        self.pad_token = special_tokens["pad_token"]
        return 0

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Return 0, the number of new tokens, if the vocabulary holds all of them.

        Raises: ValueError if it does not, because the embedding stays as it is.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str) else list(new_tokens)
        lacking = [str(token) for token in tokens if self.token_to_id(str(token)) is None]
        if lacking or isinstance(new_tokens, dict):
            raise ValueError(
                f"the tokens {', '.join(lacking) or new_tokens} cannot be added, because the "
                "embedding is not trained; use tokens that the vocabulary holds, such as its "
                "reserved ones"
            )
        return 0

"""The tokenizer files of a model folder, from the keys `tokenizer.*` of a GGUF file.

"gpt2"   becomes a tokenizer.json: byte-level BPE with the file's merges and word rule.
"llama"  becomes a tokenizer.model, not a tokenizer.json: sentencepiece and llama.cpp both merge the
         pair whose piece has the best score, and of equal scores the leftmost. So the tokens are
         equal for real scores and for scores that are minus the rank of a merge. The merges of a
         tokenizer.json would need an order among pieces of equal scores, which the file lacks.

The tokens are those of llama.cpp, also for the word rules that llama.cpp only approximates. Three
facts of the original files are lost, because a GGUF file does not hold them:

- Texts are not normalised. Qwen's own tokenizer composes accents (NFC), llama.cpp does not.
- Added tokens have no flags but those of Phi-3.
- Every control token is special, also if the original files do not call it so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, processors

from minitune.atomic_files import write_json
from minitune.data.templates.chat_template import DEFAULT
from minitune.data.tokenization.added_tokens import FLAGS
from minitune.data.tokenization.tokenizer import CONFIG
from minitune.gguf.tokenizer.file_vocabulary import FileVocabulary
from minitune.gguf.tokenizer.llama_cpp_tokenizer import SENTENCEPIECE
from minitune.gguf.tokenizer.pre_tokenizers import pre_tokenizer_of
from minitune.gguf.tokenizer.sentencepiece_writer import sentencepiece_model
from minitune.gguf.tokenizer.tokenizer_keys import (
    PREFIX,
    REMEDY,
    TEMPLATE_KEY,
    TEMPLATE_NAMES,
    check_list,
)
from minitune.gguf.tokenizer.vocabulary import BYTE_PIECE, BYTES
from minitune.progress import warn

ALWAYS_NAMED = ("bos", "eos", "unk", "pad")  # in tokenizer_config.json; null if there is none


def tokenizer_files(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json or tokenizer.model, and tokenizer_config.json.

    metadata: the keys of the file.
    folder: an existing folder.

    Raises: ValueError that names the key if a value is damaged, or of a kind that is not known.
    """
    vocabulary = FileVocabulary(metadata)
    config = _config(vocabulary) | _chat_template(metadata)
    if vocabulary.file.model == SENTENCEPIECE:
        (folder / "tokenizer.model").write_bytes(_sentencepiece(vocabulary))
        config |= _sentencepiece_config(vocabulary)
    else:
        _byte_level(vocabulary).save(str(folder / "tokenizer.json"))
    write_json(folder / CONFIG, config)


# ---- tokenizer_config.json


def _config(vocabulary: FileVocabulary) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, without the chat template."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    ids, metadata = vocabulary.ids, vocabulary.metadata
    for name in dict.fromkeys([*ALWAYS_NAMED, *ids]):
        if name not in ids:
            config[f"{name}_token"] = None
        elif ids[name] in vocabulary.added:
            config[f"{name}_token"] = vocabulary.tokens[ids[name]]
        # An ordinary token that is named here would be cut out of texts; config.json has its id.
    config["add_bos_token"] = vocabulary.file.adds_bos
    if vocabulary.file.adds_eos:
        config["add_eos_token"] = True
    config["clean_up_tokenization_spaces"] = False
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if length is not None:
        config["model_max_length"] = length
    return config


def _chat_template(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of tokenizer_config.json that holds the chat templates.

    Raises: ValueError if a template is missing or is no text.
    """
    prefix = f"{TEMPLATE_KEY}."
    keys = {key.removeprefix(prefix): key for key in metadata if key.startswith(prefix)}
    if keys or TEMPLATE_KEY in metadata:
        keys = {DEFAULT: TEMPLATE_KEY, **keys}
    if TEMPLATE_NAMES in metadata:
        check_list(metadata, TEMPLATE_NAMES, (str,))
        keys |= {name: f"{prefix}{name}" for name in metadata[TEMPLATE_NAMES]}
    for key in keys.values():
        if not isinstance(metadata.get(key), str):
            found = f"{metadata[key]!r:.60}, expected text" if key in metadata else "missing"
            raise ValueError(f"the key {key} is {found}; {REMEDY}")
    if not keys:
        return {}
    if list(keys) == [DEFAULT]:
        return {"chat_template": metadata[TEMPLATE_KEY]}
    templates = [{"name": name, "template": metadata[key]} for name, key in keys.items()]
    return {"chat_template": templates}


# ---- "gpt2"


def _byte_level(vocabulary: FileVocabulary) -> tokenizers.Tokenizer:
    """Return the tokenizer that tokenizer.json describes."""
    # of a merge that stands there twice the first rank counts
    merges = dict.fromkeys(vocabulary.metadata[f"{PREFIX}merges"])
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    pre = vocabulary.file.pre
    if not vocabulary.metadata.get(f"{PREFIX}pre"):
        warn(
            f"the key {PREFIX}pre is missing, so the file names no word rule; words are cut by the "
            f"rule {pre!r}, as in llama.cpp, which may not be the rule of the original model",
            stacklevel=2,
        )
    pre_tokenizer, ignore_merges = pre_tokenizer_of(pre)
    model = models.BPE(dict(vocabulary.ordinary_ids()), pairs, ignore_merges=ignore_merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(vocabulary.added.values()))
    before, behind = ["bos"] * vocabulary.file.adds_bos, ["eos"] * vocabulary.file.adds_eos
    if before or behind:
        named = {name: vocabulary.ids[name] for name in (*before, *behind)}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            pair=[*before, "$A", *behind, *before, "$B:1", *behind],
            special_tokens=[
                {"id": name, "ids": [index], "tokens": [vocabulary.tokens[index]]}
                for name, index in named.items()
            ],
        )
    return tokenizer


# ---- "llama"


def _sentencepiece(vocabulary: FileVocabulary) -> bytes:
    """Return the content of tokenizer.model."""
    scores, types = vocabulary.metadata[f"{PREFIX}scores"], _piece_types(vocabulary)
    pieces = list(zip(vocabulary.tokens, scores, types, strict=False))
    while pieces[-1][2] == TokenType.UNUSED:
        pieces.pop()
    # sentencepiece knows special tokens by their control pieces
    special = {name: index for name, index in vocabulary.ids.items() if index in vocabulary.added}
    return sentencepiece_model(pieces, special, _adds_prefix_space(vocabulary))


def _piece_types(vocabulary: FileVocabulary) -> list[int]:
    """Return the type of each piece.

    Raises: ValueError if the unknown token or the piece of a byte is missing.
    """
    types = [_piece_type(vocabulary, index) for index in range(len(vocabulary.tokens))]
    found = types.count(TokenType.BYTE)
    if found != BYTES:
        raise ValueError(
            f"the key {PREFIX}tokens has {found} of {BYTES} byte pieces such as <0x0A>, without "
            f"which llama.cpp fails on characters that the vocabulary lacks; {REMEDY}"
        )
    unknown = vocabulary.ids["unk"]
    if types[unknown] != TokenType.CONTROL:
        raise ValueError(
            f"the key {PREFIX}token_type gives the unknown token {unknown} "
            f"{vocabulary.tokens[unknown]!r:.60} the type of an ordinary one; {REMEDY}"
        )
    types[unknown] = TokenType.UNKNOWN
    return types


def _piece_type(vocabulary: FileVocabulary, index: int) -> int:
    """Return the type of a piece.

    Unused and user-defined pieces are normal ones, because llama.cpp lets them result from merges.
    """
    if index in vocabulary.added and vocabulary.added[index].special:
        return TokenType.CONTROL
    if BYTE_PIECE.fullmatch(vocabulary.tokens[index]):
        return TokenType.BYTE
    return TokenType.UNUSED if vocabulary.is_placeholder(index) else TokenType.NORMAL


def _sentencepiece_config(vocabulary: FileVocabulary) -> dict[str, Any]:
    """Return the keys of tokenizer_config.json that belong to a tokenizer.model."""
    decoder = {
        str(index): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
        for index, token in vocabulary.added.items()
    }
    # legacy: a space before each stretch between special tokens, as in llama.cpp
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "added_tokens_decoder": decoder}
    return config if _adds_prefix_space(vocabulary) else config | {"add_prefix_space": False}


def _adds_prefix_space(vocabulary: FileVocabulary) -> bool:
    return vocabulary.metadata.get(f"{PREFIX}add_space_prefix", True)

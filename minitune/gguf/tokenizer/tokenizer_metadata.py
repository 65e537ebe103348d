"""The tokenizer's keys of a GGUF file, from the tokenizer files of a model folder.

llama.cpp has two tokenizers for the supported models:

"gpt2"   byte-level BPE (Llama 3, SmolLM2, Mistral-Nemo): tokens, merges, and `pre`, the name of the
         rule that splits a text into words before the merges (pre_tokenizers.py).
"llama"  SentencePiece BPE (Llama 1 and 2, Mistral-7B): pieces and scores; the pair with the best
         score is merged first. If the folder has only a tokenizer.json, the scores are rebuilt from
         its merges (vocabulary.py).

The keys and values are those of llama.cpp's converter, except those that
tests/referees/converter.py lists.
"""

import re

from minitune.data.templates.chat_template import DEFAULT
from minitune.data.templates.folder_templates import Templates
from minitune.data.tokenization.tokenizer import CONFIG, Tokenizer, check_vocabulary
from minitune.gguf.tokenizer.llama_cpp_specials import (
    PHI_TOKENS,
    PHI_TOKENS_WITHOUT_RSTRIP,
    known_ends,
)
from minitune.gguf.tokenizer.pre_tokenizers import flattened
from minitune.gguf.tokenizer.vocabulary import (
    byte_fallback_metadata,
    byte_level_metadata,
    check_model,
    check_unique,
    sentencepiece_metadata,
)
from minitune.gguf.writer import MetadataValue
from minitune.progress import warn
from minitune.read_files import read_json

# A name with one of these makes llama.cpp take the white space behind added tokens with them.
PHI_NAME = re.compile(r"phi(-?)3", re.IGNORECASE)
# Names of special tokens here -> llama.cpp's; it spells the separator so.
SPECIAL_TOKEN_NAMES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
UNKNOWN_ID = 0  # llama.cpp's for SentencePiece's pieces, if no key says otherwise
# Keys of the tokens that end a text beside the EOS. llama.cpp knows further ends by their texts.
OTHER_ENDS = ("eot", "eom")


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, name: str) -> dict[str, MetadataValue]:
    """Return the `tokenizer.*` keys for an embedding of `rows` rows.

    name: general.name. If llama.cpp would misread the vocabulary of a model with that name, the
        keys hold another general.name.

    Warns if llama.cpp needs another general.name.

    Raises: ValueError if the tokenizer has more tokens than rows, has a token twice, has no end
        token or too many, or is of a kind that llama.cpp lacks.
    """
    check_vocabulary(tokenizer, rows)
    general_name = _general_name(tokenizer, name)
    path = tokenizer.folder / "tokenizer.json"
    content = read_json(path, default={})
    if content:
        check_model(path, content["model"])
    if content and not content["model"].get("byte_fallback"):
        metadata = byte_level_metadata(path, content, tokenizer, rows)
    elif content:
        metadata = byte_fallback_metadata(path, content, tokenizer, rows)
    else:
        metadata = sentencepiece_metadata(path.with_name("tokenizer.model"), tokenizer, rows)
    check_unique(metadata["tokenizer.ggml.tokens"], tokenizer.folder)
    metadata |= _space_prefix(tokenizer, metadata["tokenizer.ggml.model"])
    metadata |= _special_tokens(tokenizer, content)
    return metadata | general_name | _chat_templates(tokenizer.chat_template)


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return True if the tokenizer begins a text with the BOS."""
    return tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


def _general_name(tokenizer: Tokenizer, name: str) -> dict[str, MetadataValue]:
    """Return another general.name if llama.cpp needs it.

    GGUF has no flags of added tokens. llama.cpp knows one, by the name of the model: with "phi-3"
    or "phi3" in it, white space behind an added token belongs to the token. It refuses any other
    vocabulary with such a name.
    """
    texts = {token.content for token in tokenizer.added_tokens.values()}
    is_phi = texts.issuperset(PHI_TOKENS) and all(
        token.rstrip == (token.content not in PHI_TOKENS_WITHOUT_RSTRIP)
        for token in tokenizer.added_tokens.values()
    )
    if is_phi == bool(PHI_NAME.search(name)):
        return {}
    chosen = f"{name} Phi-3" if is_phi else PHI_NAME.sub("phi 3", name)
    reason = "applies Phi-3's white space" if is_phi else "refuses other vocabularies than Phi-3's"
    condition = "only if" if is_phi else "if"
    warn(
        f"{tokenizer.folder}: general.name is {chosen!r}, because llama.cpp {reason} {condition} "
        "the name contains phi-3 or phi3; the file's own name stays",
        stacklevel=3,
    )
    return {"general.name": chosen}


def _space_prefix(tokenizer: Tokenizer, model: str) -> dict[str, MetadataValue]:
    """Return the key of the space before a text, unless it has llama.cpp's default value.

    llama.cpp puts a space before every stretch between special tokens, or before none.

    model: the kind of llama.cpp's tokenizer; only "llama" puts spaces by default.
    """
    is_default = tokenizer.prefixes_each_stretch == (model == "llama")
    config = read_json(tokenizer.folder / CONFIG, default={})
    if is_default and config.get("add_prefix_space") is None:
        return {}
    return {"tokenizer.ggml.add_space_prefix": tokenizer.prefixes_each_stretch}


def _special_tokens(tokenizer: Tokenizer, content: dict) -> dict[str, MetadataValue]:
    """Return the ids of special tokens, and whether a BOS is added.

    content: the tokenizer.json; {} if the folder has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.folder}: names no eos_token; without one, generation in llama.cpp never "
            "ends; name it in tokenizer_config.json before training"
        )
    special = dict(tokenizer.special)
    if not content and special.get("unk") == UNKNOWN_ID:
        del special["unk"]
    ends = [id for id in tokenizer.eos_token_ids if id != tokenizer.eos_token_id]
    if len(ends) > len(OTHER_ENDS):
        known = known_ends({tokenizer.id_to_token(id) for id in range(tokenizer.id_count)})
        ends = [id for id in ends if tokenizer.id_to_token(id) not in known]
    if len(ends) > len(OTHER_ENDS):
        texts = ", ".join(repr(tokenizer.id_to_token(id)) for id in tokenizer.eos_token_ids)
        raise ValueError(
            f"{tokenizer.folder}: {len(tokenizer.eos_token_ids)} tokens end a generation "
            f"({texts}), but a GGUF file names three beside those that llama.cpp knows by their "
            "texts; remove the least important from eos_token_id in generation_config.json and "
            "config.json"
        )
    ids = {SPECIAL_TOKEN_NAMES[n]: id for n, id in special.items() if n in SPECIAL_TOKEN_NAMES}
    ids |= dict(zip(OTHER_ENDS, ends, strict=False))
    metadata: dict[str, MetadataValue] = {
        f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items()
    }
    # llama.cpp has to add the same BOS as the tokenizer. It must never add an EOS, and adds none
    # without a key: the texts that it gets are prompts, even if training texts end with one.
    metadata["tokenizer.ggml.add_bos_token"] = adds_bos(tokenizer)
    config = read_json(tokenizer.folder / CONFIG, default={})
    processors = flattened(content.get("post_processor") or {}, "processors")
    if "add_eos_token" in config or any(part["type"] == "ByteLevel" for part in processors):
        metadata["tokenizer.ggml.add_eos_token"] = False
    return metadata


def _chat_templates(templates: Templates) -> dict[str, MetadataValue]:
    """Return the keys of the chat templates; llama.cpp takes "tool_use" if there are tools."""
    if templates is None:
        return {}
    named = {DEFAULT: templates} if isinstance(templates, str) else templates
    metadata: dict[str, MetadataValue] = {"tokenizer.chat_template": named[DEFAULT]}
    others = {
        re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in named.items() if name != DEFAULT
    }
    if others:
        metadata["tokenizer.chat_templates"] = list(others)
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    return metadata

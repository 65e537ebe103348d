"""The names of GGUF types that users give, and the names that mean others of them."""

from collections.abc import Sequence

GGUF_METHODS = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
NOT_QUANTIZED = "not_quantized"
# Unsloth's and llama.cpp's names -> the type; not_quantized depends on the model's dtype
GGUF_ALIASES = {
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "quantized": "q4_k_m",
    "fast_quantized": "q8_0",
    NOT_QUANTIZED: "f16 or bf16",
}
GGUF_WORDS = (*GGUF_METHODS, *GGUF_ALIASES)


def gguf_methods(names: str | Sequence[str], is_float16: bool) -> tuple[str, ...]:
    """Return the types that a name or a list of names means, each type once.

    names: words of GGUF_WORDS in upper or lower case.
    is_float16: True if the 16-bit weights are float16: not_quantized means f16, otherwise bf16.

    Raises: ValueError that lists all names if a name is unknown or the list is empty.
    """
    listed = (names,) if isinstance(names, str) else names
    if not isinstance(listed, list | tuple) or not listed:
        raise _unknown(names)
    meanings = GGUF_ALIASES | {NOT_QUANTIZED: "f16" if is_float16 else "bf16"}
    methods = []
    for name in listed:
        word = name.lower() if isinstance(name, str) else name
        if word not in GGUF_WORDS:
            raise _unknown(name)
        methods.append(meanings.get(word, word))
    return tuple(dict.fromkeys(methods))


def lower_words(words: object) -> object:
    """Return a name or a tuple of names as a tuple in lower case, and anything else as it is."""
    if isinstance(words, str):
        return (words.lower(),)
    if isinstance(words, tuple):
        return tuple(word.lower() if isinstance(word, str) else word for word in words)
    return words


def _unknown(name: object) -> ValueError:
    aliases = ", ".join(f"{alias} ({meaning})" for alias, meaning in GGUF_ALIASES.items())
    return ValueError(
        f"quantization_method {name!r} is not supported; "
        f"choose from {', '.join(GGUF_METHODS)}, {aliases}, or a list of these"
    )

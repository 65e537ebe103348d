"""A writer of tokenizer.model, the file of SentencePiece, from pieces, types and scores.

The file is a protobuf message. A field is a varint (8 number + wire type) and a value:

    wire type 0    a varint: 7 bits a byte, the lowest first, bit 8 set if another byte follows
    wire type 2    a varint length and that many bytes: a text or an inner message
    wire type 5    4 bytes: a float32

The fields of the file:

    1  a piece, repeated: 1 text, 2 score, 3 type
    2  the trainer's settings: 3 kind of model, 4 number of pieces, 35 byte fallback, 40 to 43 ids
       of unknown, BOS, EOS and pad, 45 to 48 their texts
    3  the normaliser: 1 name, 3 space before a text, 4 removes spaces, 5 marks spaces
"""

import struct
from collections.abc import Mapping, Sequence

from minitune.data.tokenization.sentencepiece_file import BPE, VARINT_BITS

SPECIAL_FIELDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
TEXT_OFFSET = 5  # from the field of a special token's id to that of its text
NO_ID = -1


def sentencepiece_model(
    pieces: Sequence[tuple[str, float, int]], special: Mapping[str, int], adds_prefix_space: bool
) -> bytes:
    """Return the content of a tokenizer.model that merges by score and falls back to bytes.

    pieces: text, score and type of each id. The types are those of GGUF.
    special: ids of "unk", "bos", "eos" and "pad", those that exist.
    adds_prefix_space: put a space before a text.
    """
    trainer = _number(3, BPE) + _number(4, len(pieces)) + _number(35, True)
    for name, field in SPECIAL_FIELDS.items():
        trainer += _number(field, special.get(name, NO_ID))
        if name in special:
            trainer += _bytes(field + TEXT_OFFSET, pieces[special[name]][0].encode())
    normalizer = _bytes(1, b"identity") + _number(3, adds_prefix_space)
    normalizer += _number(4, False) + _number(5, True)
    parts = [_bytes(1, _piece(*piece)) for piece in pieces]
    return b"".join([*parts, _bytes(2, trainer), _bytes(3, normalizer)])


def _piece(text: str, score: float, type: int) -> bytes:
    return _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, type)


def _number(field: int, value: int) -> bytes:
    return varint(8 * field) + varint(value % 2**VARINT_BITS)


def _bytes(field: int, value: bytes) -> bytes:
    return varint(8 * field + 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Return a whole number in protobuf's groups of 7 bits."""
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    groups.append(value)
    return bytes(groups)

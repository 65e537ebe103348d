"""Change a protobuf message by its fields, as in SentencePiece's tokenizer.model.

A message is a list of (number, wire type, value): an int for a varint and for 4 or 8 bytes, bytes
otherwise. A value of bytes may be a message itself.
"""

import struct
from random import Random
from typing import Any

from minitune.gguf.tokenizer.sentencepiece_writer import varint

VARINT, LONG, BYTES, SHORT = 0, 1, 2, 5
FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -1e38, 1e38, 5e-324)
VARINTS = (0, 1, 2, 3, 4, 5, 6, 7, 127, 128, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
STRINGS = (
    b"",
    b" ",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x00",
    "▁".encode(),
    "▁▁".encode(),
    b"<unk>",
    b"<s>",
    b"<0x41>",
    b"<0xZZ>",
    b"<|im_end|>",
    b"x" * 3000,
    b"a",
    b"identity",
    b"nmt_nfkc",
)


def parse(content: bytes) -> list[list]:
    """Return the fields of a message.

    Raises: ValueError if the bytes are no message.
    """
    fields, place = [], 0
    while place < len(content):
        key, place = _readvarint(content, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _readvarint(content, place)
        elif kind in (LONG, SHORT):
            size = 8 if kind == LONG else 4
            value, place = content[place : place + size], place + size
        elif kind == BYTES:
            size, place = _readvarint(content, place)
            value, place = content[place : place + size], place + size
        else:
            raise ValueError(f"wire type {kind}")
        if place > len(content) or not number:
            raise ValueError("the message is cut short")
        fields.append([number, kind, value])
    return fields


def serialise(fields: list[list]) -> bytes:
    """Return a message with these fields."""
    parts = []
    for number, kind, value in fields:
        parts.append(varint(number << 3 | kind))
        if kind == VARINT:
            parts.append(varint(value))
        else:
            parts.append(varint(len(value)) if kind == BYTES else b"")
            parts.append(value)
    return b"".join(parts)


def mutated(content: bytes, rng: Random, depth: int = 0) -> bytes:
    """Return a message with one change, at its top or in a message inside."""
    fields = parse(content)
    if not fields:
        return content
    # Fields that repeat thousands of times, such as the pieces, count as one.
    number = rng.choice(sorted({field[0] for field in fields}))
    field = rng.choice([field for field in fields if field[0] == number])
    inner = _parsed(field)
    if inner and depth < 4 and rng.random() < 0.75:
        field[2] = mutated(field[2], rng, depth + 1)
        return serialise(fields)
    kind = rng.randrange(7)
    if kind == 0:
        fields.remove(field)
    elif kind == 1:
        fields += [list(field) for _ in range(rng.choice((1, 2, 300)))]
    elif kind == 2:
        fields = [other for other in fields if other[0] != number]
    elif kind == 3:
        rng.shuffle(fields)
    elif kind == 4:
        field[0] = rng.choice((1, 2, 3, 4, 5, 15, 35, 41, 1000))
    elif kind == 5:
        field[1], field[2] = VARINT, rng.choice(VARINTS)
    else:
        field[2] = _value(field, rng)
    return serialise(fields)


def _value(field: list, rng: Random) -> Any:
    """Return another value of the wire type of a field."""
    if field[1] == VARINT:
        return rng.choice((*VARINTS, field[2] ^ 1, field[2] + 1))
    if field[1] == SHORT:
        return struct.pack("<f", rng.choice(FLOATS))
    if field[1] == LONG:
        return struct.pack("<d", rng.choice(FLOATS))
    return rng.choice((*STRINGS, field[2][:-1], field[2] * 2, field[2][::-1]))


def _parsed(field: list) -> list:
    """Return the fields of a message inside a field, or none."""
    if field[1] != BYTES:
        return []
    try:
        return parse(field[2])
    except (ValueError, IndexError):
        return []


def _readvarint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place

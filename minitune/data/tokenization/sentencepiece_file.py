"""tokenizer.model: a protobuf message, which is checked before the library reads it.

A field is the varint 8 number + wire type, and a varint (type 0), 8 bytes (1), a varint length and
that many bytes (2), or 4 bytes (5). A varint has 7 bits a byte, the lowest first.
"""

from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from minitune.data.tokenization.json_limits import MAX_TOKEN, check_character_map
from minitune.data.tokenization.library_errors import library_errors
from minitune.read_files import require_regular_file

MAX_BYTES = 64 << 20  # that of 256,000 pieces has 5 MB
MAX_PIECES = 2_000_000
VARINT_BITS = 64
FIXED_SIZES = {1: 8, 5: 4}  # wire type -> bytes
# Fields of the file: a piece, the trainer's settings, and two specifications of normalisers.
PIECE_FIELD, TRAINER_FIELD, NORMALIZER_FIELD, DENORMALIZER_FIELD = 1, 2, 3, 5
MODEL_TYPE_FIELD = 3  # of the trainer's settings
CHARACTER_MAP_FIELD = 2  # of a normaliser
UNIGRAM, BPE = 1, 2


def open_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Return the tokenizer of a file.

    Raises: ValueError that names the file if it is damaged, or beyond the limits above.
    """
    return sentencepiece_of(path, read_sentencepiece(path))


def sentencepiece_of(path: Path, proto: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return the tokenizer of a file's content, which `read_sentencepiece` has checked.

    Raises: ValueError that names the file if the library refuses the content.
    """
    with library_errors(path, "read it", f"sentencepiece {sentencepiece.__version__}"):
        return sentencepiece.SentencePieceProcessor(model_proto=proto)


def read_sentencepiece(path: Path) -> bytes:
    """Return the content of a tokenizer.model that is within the limits.

    Raises: ValueError that names the file if it is damaged, or beyond the limits above.
    """
    require_regular_file(path)
    try:
        with path.open("rb") as file:
            proto = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: could not be read ({error.strerror or error})") from None
    try:
        _check(proto)
    except ValueError as error:
        raise ValueError(
            f"{path}: not a sentencepiece model: {error}; copy the file again, or use the "
            "tokenizer.model of the model's publisher"
        ) from None
    return proto


def model_type(proto: bytes) -> int:
    """Return the kind of model in a SentencePiece model file."""
    kind = UNIGRAM  # of a file that does not say it
    for number, trainer in protobuf_fields(proto):
        if number == TRAINER_FIELD and isinstance(trainer, bytes):
            kinds = (value for key, value in protobuf_fields(trainer) if key == MODEL_TYPE_FIELD)
            kind = next(kinds, kind)
    return kind


def _check(proto: bytes) -> None:
    """Raise ValueError if a file is too large, damaged, or has long pieces or replacements."""
    if len(proto) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES:,} bytes")
    pieces = 0
    for number, value in protobuf_fields(proto):
        if number == PIECE_FIELD:
            pieces += 1
            if not isinstance(value, bytes) or len(value) > MAX_TOKEN:
                raise ValueError(f"piece {pieces - 1} is none, or has over {MAX_TOKEN:,} bytes")
        if number in (NORMALIZER_FIELD, DENORMALIZER_FIELD) and isinstance(value, bytes):
            for key, inner in protobuf_fields(value):
                if key == CHARACTER_MAP_FIELD and isinstance(inner, bytes):
                    check_character_map(inner)
    if not 0 < pieces <= MAX_PIECES:
        raise ValueError(f"has {pieces:,} pieces, expected 1 to {MAX_PIECES:,}")


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a protobuf message.

    Raises: ValueError if the message ends inside of a field, or a wire type is not known.
    """
    place, end = 0, len(message)

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, VARINT_BITS + 1, 7):
            if place == end:
                raise ValueError("it ends inside of a number")
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"a number of over {VARINT_BITS} bits at byte {place}")

    while place < end:
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        if wire_type != 2 and wire_type not in FIXED_SIZES:
            raise ValueError(f"a field of the wire type {wire_type} at byte {place}")
        size = FIXED_SIZES[wire_type] if wire_type in FIXED_SIZES else varint()
        if size > end - place:
            raise ValueError(f"a field of {size:,} bytes at byte {place} of {end:,}")
        yield number, message[place : place + size]
        place += size

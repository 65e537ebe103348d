"""Change bytes without a view of their structure, and put special files in a file's place."""

import os
import struct
from pathlib import Path
from random import Random

EDGES = (0, 1, 0x7F, 0x80, 0xFF)
SIZES = (0, 1, 1 << 24, (1 << 32) - 1, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp037", "utf-7")
BAD_TEXT = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\r", b"\xe2\x80\xa8")


def damaged(content: bytes, rng: Random, first: int = 4096) -> bytes:
    """Return bytes with one to three changes: flips, numbers, runs, cuts and repeats.

    first: half of the changes lie in so many bytes at the beginning.
    """
    found = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if not found:
            return bytes(found)
        end = len(found) if rng.random() < 0.5 else min(first, len(found))
        place, kind = rng.randrange(end), rng.randrange(8)
        if kind < 2:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[place] = rng.choice(EDGES)
        elif kind == 3:
            found[place : place + 8] = struct.pack("<Q", rng.choice(SIZES))
        elif kind == 4:
            found[place : place + 4] = struct.pack("<I", rng.choice(SIZES) & 0xFFFFFFFF)
        elif kind == 5:
            found[place:place] = rng.randbytes(rng.randint(1, 40))
        elif kind == 6:
            del found[place : place + rng.choice((1, 3, 8, 40, 5000))]
        else:
            found[place:place] = found[place : place + rng.choice((1, 40, 400))]
    return bytes(found)


def cut(content: bytes, rng: Random) -> bytes:
    """Return the beginning of some bytes."""
    return content[: rng.choice((0, 1, 3, 7, 8, 9, len(content) // 2, max(0, len(content) - 1)))]


def reencoded(content: bytes, rng: Random) -> bytes:
    """Return a text in another encoding, or with bytes that are no UTF-8."""
    if rng.random() < 0.5:
        return content.decode("utf-8", "replace").encode(rng.choice(ENCODINGS), "replace")
    place = rng.randint(0, len(content))
    return content[:place] + rng.choice(BAD_TEXT) + content[place:]


def special_file(path: Path, rng: Random) -> None:
    """Put something that is no regular file, or nothing, in the place of `path`."""
    path.unlink(missing_ok=True)
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1 and rng.random() < 0.3:
        return  # a missing file
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("nowhere")
    elif kind == 3:
        path.symlink_to(path.name)  # a cycle
    elif kind == 4:
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to("/dev/null")

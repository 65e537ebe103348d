"""Change JSON by its structure: delete, duplicate, retype, nest, swap, and write hostile values.

A tree is the parsed value. `Raw` stands for text that is written as it is, such as a number of 400
digits. `Twice` is an object that holds a key twice.
"""

import copy
import json
from random import Random
from typing import Any

NUMBERS = [
    "0", "-0", "1", "-1", "2", "3", "-2147483649", "2147483648", "4294967296", "1" + "0" * 12,
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "1" + "0" * 18,
    "1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 5000, "0.5", "-0.5", "1.0", "1e308", "1e309",
    "-1e400", "1e-400", "5e-324", "NaN", "Infinity", "-Infinity", "1.0000000001", "65536", "127",
    "8", "16", "63", "64", "255", "256", "257", "0.1", "1e18", "1e39", "3.4e38",
]  # fmt: skip
TEXTS = [
    "", " ", "0", "1", "true", "None", "null", "..", "../x", "../canary.safetensors", "/etc/passwd",
    "/dev/zero", "a/b", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "\uffff", "\u202e", "\x1b[31m",
    "\n", "é" * 50, "x" * 5000, "ab" * 100_000, "{{", "{% for", "%s%n", "$HOME", "~", "__class__",
    "<|im_end|>", "<s>", "(a+)+$", "(?:", "[", "\\", "float32", "bfloat16", "float64", "int8",
    "nan", "auto", "default", "yarn", "llama3", "linear", "longrope", "llama", "gemma2", "silu",
    "relu", "1e999", "９", "²", "🦙", "a" * 200, "<0x41>", "\u2028", "\r", "\ufeff",
]  # fmt: skip
DEPTHS = (3, 60, 400, 990, 3000, 100_000)
LENGTHS = (2, 17, 300, 30_000)


class Raw(str):
    """Text that is written without quotes."""


class Twice(dict):
    """An object whose last key is written twice."""


def dump(value: Any) -> str:
    """Return a tree as JSON."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {dump(item)}" for key, item in value.items()]
        if isinstance(value, Twice) and items:
            items.append(items[-1])
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def values_in(tree: Any, found: list | None = None) -> list:
    """Return the (key, value) pairs of all objects in a tree, of small values."""
    found = [] if found is None else found
    for key, item in list(tree.items()) if isinstance(tree, dict) else enumerate(tree):
        if isinstance(tree, dict) and len(str(item)) < 2000:
            found.append((key, item))
        if isinstance(item, dict | list) and len(item) < 60:
            values_in(item, found)
    return found


class JsonMutator:
    """Changes of trees.

    pool: (key, value) pairs of other files, for values and keys that are foreign here.
    """

    def __init__(self, rng: Random, pool: list[tuple[str, Any]]):
        self.rng, self.pool = rng, pool

    def mutated(self, tree: Any, most: int = 3) -> Any:
        """Return a copy of a tree with one to `most` changes."""
        holder = {"": copy.deepcopy(tree)}
        for _ in range(self.rng.choice((1, 1, self.rng.randint(1, most)))):
            self._change(holder)
        return holder[""]

    def text(self, tree: Any, most: int = 3) -> str:
        """Return a changed tree as JSON."""
        return dump(self.mutated(tree, most))

    def value(self, old: Any = None) -> Any:
        """Return a hostile value.

        old: the value that it replaces.
        """
        rng, kind = self.rng, self.rng.randrange(12)
        if rng.random() < 0.5 and (same := self._same_type(old)) is not None:
            return same
        if kind < 3:
            return Raw(rng.choice(NUMBERS))
        if kind < 5:
            return rng.choice(TEXTS)
        if kind == 5:
            return rng.choice([None, True, False])
        if kind == 6:
            return rng.choice([[], {}, [[]], {"": {}}, [None], [old], [old, old], {"a": old}])
        if kind == 7:
            return self._nested(old)
        if kind == 8:
            return self._near(old)
        if kind == 9:
            return [self.value() for _ in range(rng.randrange(4))]
        return copy.deepcopy(rng.choice(self.pool)[1]) if self.pool else None

    def _same_type(self, old: Any) -> Any:
        """Return a value that passes a check of the type, or None."""
        rng = self.rng
        if isinstance(old, bool):
            return not old
        if isinstance(old, int):
            numbers = [number for number in NUMBERS if number.lstrip("-").isdigit()]
            return rng.choice([old + 1, old - 1, old * 2, old // 2, Raw(rng.choice(numbers))])
        if isinstance(old, float):
            return rng.choice([old * 1e3, -old, old / 1e3, 1 - old, Raw(rng.choice(NUMBERS))])
        if isinstance(old, str):
            return rng.choice([*TEXTS, old[:-1], old + old, old.upper(), f" {old}", old + TEXTS[0]])
        if isinstance(old, list) and old:
            return rng.choice([old[:-1], old[1:], old[::-1], old[:1] * len(old), old + old[:9]])
        return None

    def _nested(self, old: Any) -> Any:
        """Return a deep or a long value."""
        rng = self.rng
        if rng.random() < 0.4:
            length = rng.choice(LENGTHS)
            return Raw(
                "[" + ", ".join([dump(old)[:60] if self._is_leaf(old) else "1"] * length) + "]"
            )
        depth = rng.choice(DEPTHS)
        left, right = rng.choice([("[", "]"), ('{"a": ', "}"), ('[{"a": ', "}]")])
        end = rng.choice([right, "", right])
        return Raw(left * depth + "1" + end * depth)

    @staticmethod
    def _is_leaf(value: Any) -> bool:
        return not isinstance(value, dict | list | str)

    def _near(self, old: Any) -> Any:
        """Return a value of another type or size that is close to the old one."""
        rng = self.rng
        if isinstance(old, bool):
            return rng.choice([int(old), str(old), not old, float(old)])
        if isinstance(old, int | float):
            choices = [float(old), str(old), [old], old + 1, old - 1, -old, old * 2, old == 1]
            return rng.choice([*choices, old / 2, old * 1000, Raw(f"{old}e0")])
        if isinstance(old, str):
            choices = [old + " ", old.upper(), old[:-1], old * 2, list(old[:50]), old[::-1]]
            return rng.choice([*choices, {"content": old}, old[:1] + "\u0301" + old[1:]])
        if isinstance(old, list):
            return rng.choice([old[:-1], old + old[:100], old[::-1], dict.fromkeys(map(str, old))])
        if isinstance(old, dict):
            return rng.choice([list(old), list(old.values()), [old], Twice(old)])
        return rng.choice([0, "", [], {}])

    def _change(self, holder: dict) -> None:
        """Change one place of the tree below `holder`, in place."""
        parent, key = self._place(holder)
        rng, old = self.rng, parent[key]
        kind = rng.randrange(10)
        if kind == 0 and parent is not holder:
            del parent[key]
        elif kind == 1 and isinstance(old, dict):
            self._insert(old)
        elif kind == 1 and isinstance(old, list):
            old.insert(rng.randint(0, len(old)), self.value(old[0] if old else None))
        elif kind == 2 and len(parent) > 1:
            other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        elif kind == 3 and isinstance(parent, dict) and parent is not holder:
            del parent[key]
            parent[rng.choice([key.upper(), key + "_", rng.choice(TEXTS)[:300]])] = old
        elif kind == 4 and isinstance(old, dict) and old:
            parent[key] = Twice(old)
        else:
            parent[key] = self.value(old)

    def _insert(self, target: dict) -> None:
        """Put a key of another file into an object."""
        key, value = self.rng.choice(self.pool or [("x", 1)])
        target[str(key)] = copy.deepcopy(value) if self.rng.random() < 0.6 else self.value(value)

    def _place(self, holder: dict) -> tuple[Any, Any]:
        """Return a container of the tree and a key or an index in it."""
        parent, key = holder, ""
        while True:
            here = parent[key]
            if not isinstance(here, dict | list) or not here or self.rng.random() < 0.12:
                return parent, key
            parent = here
            key = self.rng.choice(list(here) if isinstance(here, dict) else range(len(here)))

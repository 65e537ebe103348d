"""Write the demonstration's task: train.jsonl and heldout.jsonl beside this file.

    python scripts/demonstration/make_task.py

The task is structured extraction: a short order, booking or log line becomes a JSON object with
fixed fields. The values are copied from the text, so the model learns which fields belong to which
kind of text and their places in it, not facts about the world.

The held-out split shares no sentence frame and no word of a name, item, service or city with the
training split, so only the learned skill can answer it. Levels, days, times and numbers come from
the same small sets in both. The same seed writes the same bytes.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from demonstration.task_tables import DAYS, FRAMES, LEVELS, VALUES

SYSTEM = "Extract the fields as JSON."
FIELDS = {
    "order": ("name", "item", "quantity", "city"),
    "booking": ("name", "city", "day", "time", "guests"),
    "log": ("level", "service", "code", "city"),
}


def frames(split: str, kind: str) -> list[str]:
    """Return the sentence frames of one kind of text."""
    return [line.strip() for line in FRAMES[split][kind].splitlines() if line.strip()]


def values(split: str, name: str) -> list[str]:
    """Return the entries of a table: separated by bars if the table has bars, else by spaces."""
    table = VALUES[split][name]
    if "|" not in table:
        return table.split()
    return [" ".join(entry.split()) for entry in table.split("|")]


def draw(random_: random.Random, split: str, field: str) -> str | int:
    """Draw a value for one field: a whole number for a count or a code, otherwise a text."""
    choice, number = random_.choice, random_.randint
    match field:
        case "name":
            first, last = choice(values(split, "first")), choice(values(split, "last"))
            return choice((first, f"{first} {last}", f"{first} {last}"))
        case "quantity":
            return number(2, 99)
        case "guests":
            return number(2, 9)
        case "code":
            return choice((number(400, 599), number(10, 99), number(1000, 9999)))
        case "level":
            return choice(LEVELS)
        case "day":
            return choice(DAYS)
        case "time":
            return f"{number(8, 22)}:{choice(('00', '15', '30', '45'))}"
    return choice(values(split, field))


def example(random_: random.Random, split: str, kind: str, frame: str) -> dict:
    """Return one conversation: the instruction, the text, and the JSON object as the answer."""
    fields = {field: draw(random_, split, field) for field in FIELDS[kind]}
    answer = json.dumps({"type": kind, **fields}, separators=(",", ":"), ensure_ascii=False)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": frame.format(**fields)},
            {"role": "assistant", "content": answer},
        ]
    }


def split_examples(split: str, count: int, seed: int) -> list[dict]:
    """Return `count` different conversations, shuffled.

    The kinds take turns, and each frame of a kind occurs equally often.
    """
    random_ = random.Random(f"{split} {seed}")
    kinds = list(FIELDS)
    shuffled = {}
    for kind in kinds:
        kind_frames = frames(split, kind)
        shuffled[kind] = random_.sample(kind_frames, len(kind_frames))
    examples: list[dict] = []
    seen: set[str] = set()
    while len(examples) < count:
        turn, index = divmod(len(examples), len(kinds))
        kind = kinds[index]
        frame = shuffled[kind][turn % len(shuffled[kind])]
        candidate = example(random_, split, kind, frame)
        text = candidate["messages"][1]["content"]
        if text not in seen:
            seen.add(text)
            examples.append(candidate)
    random_.shuffle(examples)
    return examples


def to_jsonl(examples: list[dict]) -> str:
    """Return the conversations as JSON, one a line."""
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def main(argv: Sequence[str] | None = None) -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(
        description="Write train.jsonl and heldout.jsonl of the demonstration's task."
    )
    folder = Path(__file__).parent
    parser.add_argument("--output-dir", type=Path, default=folder, help="default: %(default)s")
    parser.add_argument(
        "--train", type=int, default=384, help="training conversations (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout", type=int, default=48, help="held-out conversations (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", arguments.train), ("heldout", arguments.heldout)):
        text = to_jsonl(split_examples(split, count, arguments.seed))
        path = arguments.output_dir / f"{split}.jsonl"
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

"""Readers of data files, GGUF files and importance matrices, as in readers.py."""

import json
from pathlib import Path

from fuzz import byte_mutants, doors, gguf_mutants, jinja_mutants
from fuzz.maker import Maker, Mutant
from fuzz.text_mutants import csv_text

# ---- data


def records(maker: Maker) -> Mutant:
    """Change a record of each form in a JSONL or JSON file."""
    original = maker.root / maker.one_of("data")
    while original.suffix not in (".json", ".jsonl"):
        original = maker.root / maker.one_of("data")
    text = original.read_text()
    lines = (
        json.loads(text) if original.suffix == ".json" else list(map(json.loads, text.splitlines()))
    )
    path = maker.folder / original.name
    if original.suffix == ".json":
        content = maker.json.text(lines)
    else:
        place = maker.rng.randrange(len(lines))
        parts = [json.dumps(line) for line in lines]
        parts[place] = maker.json.text(lines[place])
        content = "\n".join(parts)
    encoded = content.encode("utf-8", "surrogatepass")
    if maker.rng.random() < 0.05:
        encoded = byte_mutants.reencoded(encoded, maker.rng)
    maker.rewrite(path, encoded)
    return _show(maker, path)


def _show(maker: Maker, path: Path) -> Mutant:
    model = maker.root / maker.rng.choice(
        ("models/tokens", "models/llama3", "models/spm", "models/tokens")
    )
    return Mutant(path, lambda: doors.show_data(model, path, maker.rng), True)


def text_files(maker: Maker) -> Mutant:
    """Change a CSV, TSV or text file."""
    original = maker.root / "data" / maker.rng.choice(("table.csv", "table.tsv", "text.txt"))
    path = maker.folder / original.name
    content = csv_text(original.read_bytes(), maker.rng)
    return _show(maker, maker.rewrite(path, content))


def arrow(maker: Maker) -> Mutant:
    """Change a Parquet file or a folder of `datasets`."""
    number = maker.rng.randrange(3)
    if maker.rng.random() < 0.4:
        path = maker.folder / "table.parquet"
        path.write_bytes((maker.root / "data" / f"table-{number}.parquet").read_bytes())
        maker.change_bytes(path, lambda b, rng: byte_mutants.damaged(b[::-1], rng, 3000)[::-1])
        return _show(maker, path)
    folder = maker.copy(f"data/saved-{number}", "saved")
    if maker.rng.random() < 0.4:
        path = maker.change_json(folder / "state.json")
    else:
        path = maker.change_bytes(folder / "data-00000-of-00001.arrow", byte_mutants.damaged)
    return _show(maker, folder)._replace(path=path)


# ---- GGUF


def gguf(maker: Maker) -> Mutant:
    """Change a GGUF file that is a base model."""
    name = maker.rng.choice(("llama", "llama", "llama3", "spm"))
    path = maker.folder / f"{name}.gguf"
    content = (maker.root / "gguf" / path.name).read_bytes()
    changed = gguf_mutants.mutated(content, maker.rng)
    if maker.rng.random() < 0.1:
        changed = byte_mutants.damaged(content, maker.rng, 30_000)
    maker.rewrite(path, changed)
    kind = maker.rng.randrange(16)
    if kind == 0:
        return Mutant(path, lambda: doors.generate(path), True)
    if kind == 1:
        return Mutant(path, lambda: doors.export(path, maker.folder / "out.gguf"), True)
    if kind == 2:
        data = maker.root / "data" / "form-0.jsonl"
        return Mutant(path, lambda: doors.show_data(path, data, maker.rng), True)
    return Mutant(path, lambda: doors.load_and_use(path, maker.rng))


def gguf_template(maker: Maker) -> Mutant:
    """Put a random chat template into a GGUF file."""
    path = maker.folder / "llama.gguf"
    file = gguf_mutants.Gguf((maker.root / "gguf" / path.name).read_bytes())
    for key in file.keys:
        if key[0] == b"tokenizer.chat_template":
            key[2] = jinja_mutants.template(maker.rng).encode("utf-8", "surrogatepass")
    maker.rewrite(path, file.serialise())
    return Mutant(path, lambda: doors.load_and_use(path, maker.rng))


def imatrix(maker: Maker) -> Mutant:
    """Change an importance matrix, and quantise with it."""
    original = maker.root / "imatrix" / maker.rng.choice(("imatrix.gguf", "imatrix.dat"))
    path = maker.folder / original.name
    content = original.read_bytes()
    if original.suffix == ".gguf":
        changed = gguf_mutants.mutated(content, maker.rng)
    elif maker.rng.random() < 0.6:
        changed = gguf_mutants.legacy_imatrix(content, maker.rng)
    else:
        changed = byte_mutants.damaged(content, maker.rng, 200)
    maker.rewrite(path, changed)
    model, output = maker.root / "models" / "llama", maker.folder / "out.gguf"
    return Mutant(path, lambda: doors.convert(model, output, "q4_0", path))

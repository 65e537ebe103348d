"""The readers: for each kind of file, the originals, the changes, and the door of a mutant.

A reader is a function of a Maker. It writes a mutant into the maker's folder and returns the file
that it changed and the function that uses the mutant.
"""

import json
from collections.abc import Callable
from pathlib import Path

from fuzz import (
    byte_mutants,
    doors,
    jinja_mutants,
    protobuf_mutants,
    tokenizer_pieces,
)
from fuzz import safetensors_mutants as safetensors
from fuzz.data_readers import arrow, gguf, gguf_template, imatrix, records, text_files
from fuzz.maker import Maker, Mutant
from fuzz.text_mutants import flags, toml_text

MORE_METRICS = """\
{"step": 2, "eval_loss": 1.5, "eval_runtime": 0.5, "eval_samples_per_second": 4.0, "epoch": 1.0}
{"step": 2, "samples": [{"prompt": "a lamp", "answer": "one lamp"}]}
"""

# ---- model folders


def _load(maker: Maker, folder: Path, path: Path) -> Mutant:
    """Return a mutant of a model folder, which is loaded or, seldom, exported or planned."""
    kind = maker.rng.randrange(25)
    if kind == 0:
        output = maker.folder / "out.gguf"
        return Mutant(path, lambda: doors.convert(folder, output, "q8_0"))
    if kind == 1:
        return Mutant(path, lambda: doors.command(doors.plan_command, "--model", folder), True)
    if kind == 2:
        return Mutant(path, lambda: doors.generate(folder), True)
    if kind == 3:
        data = maker.root / "data" / "form-0.jsonl"
        return Mutant(path, lambda: doors.show_data(folder, data, maker.rng), True)
    return Mutant(path, lambda: doors.load_and_use(folder, maker.rng))


def config(maker: Maker) -> Mutant:
    """Change config.json of a family, a wrapper, or a quantised model."""
    parents = ("families", "families", "models", "quantised")
    folder = maker.copy(maker.one_of(maker.rng.choice(parents)))
    return _load(maker, folder, maker.change_json(folder / "config.json"))


def weights(maker: Maker) -> Mutant:
    """Change model.safetensors."""
    folder = maker.copy(maker.one_of(maker.rng.choice(("models", "families", "quantised"))))
    path = maker.rng.choice(sorted(folder.glob("*.safetensors")))
    maker.change_bytes(path, lambda b, rng: safetensors.mutated(b, rng, maker.json))
    return _load(maker, folder, path)


def index(maker: Maker) -> Mutant:
    """Change model.safetensors.index.json."""
    folder = maker.copy("models/sharded")
    return _load(maker, folder, maker.change_json(folder / "model.safetensors.index.json"))


def quant_state(maker: Maker) -> Mutant:
    """Change the JSON that bitsandbytes stores in a tensor, or another of its tensors."""
    folder = maker.copy(maker.one_of("quantised"))
    path = folder / "model.safetensors"
    tensors = safetensors.unpack(path.read_bytes())
    names = [name for name in tensors if "proj.weight." in name or "_scale" in name]
    name = maker.rng.choice(names)
    dtype, shape, data = tensors[name]
    if "quant_state" in name:
        changed = maker.json.text(json.loads(data), 2).encode("utf-8", "surrogatepass")
        tensors[name] = (dtype, [len(changed)], changed)
    else:
        tensors[name] = (dtype, shape, safetensors.hostile_values(dtype, data, maker.rng))
    return _load(maker, folder, maker.rewrite(path, safetensors.pack(tensors)))


def generation_config(maker: Maker) -> Mutant:
    """Change generation_config.json."""
    folder = maker.copy("models/tokens")
    path = maker.change_json(folder / "generation_config.json")
    if maker.rng.random() < 0.3:
        return Mutant(path, lambda: doors.generate(folder), True)
    return _load(maker, folder, path)


# ---- tokenizers


def tokenizer_json(maker: Maker) -> Mutant:
    """Change tokenizer.json."""
    folder = maker.copy(f"models/{maker.rng.choice(('llama', 'tokens', 'llama3'))}")
    return _load(maker, folder, maker.change_json(folder / "tokenizer.json"))


def tokenizer_parts(maker: Maker) -> Mutant:
    """Put random normalizers, pre-tokenizers, decoders and models into tokenizer.json."""
    folder = maker.copy("models/llama")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    part = maker.rng.choice(sorted(tokenizer_pieces.PARTS))
    content[part] = tokenizer_pieces.random_part(part, maker.rng)
    return _load(maker, folder, maker.rewrite(path, json.dumps(content).encode()))


def tokenizer_model(maker: Maker) -> Mutant:
    """Change tokenizer.model, a protobuf."""
    folder = maker.copy("models/spm")
    path = maker.change_bytes(folder / "tokenizer.model", protobuf_mutants.mutated)
    return _load(maker, folder, path)


def tokenizer_files(maker: Maker) -> Mutant:
    """Change tokenizer_config.json, special_tokens_map.json or added_tokens.json."""
    name = maker.rng.choice(("models/tokens", "models/tokens", "models/spm", "models/llama"))
    folder = maker.copy(name)
    files = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    path = maker.rng.choice([folder / file for file in files if (folder / file).exists()])
    return _load(maker, folder, maker.change_json(path))


def chat_template(maker: Maker) -> Mutant:
    """Write a random template into a folder, or set it as a user does."""
    text = jinja_mutants.template(maker.rng)
    kind = maker.rng.randrange(4)
    folder = maker.copy("models/llama")
    if kind == 0:
        return Mutant(None, lambda: doors.set_template(folder, text))
    path = folder / "chat_template.jinja"
    if kind == 1:
        path = folder / "tokenizer_config.json"
        content = json.loads(path.read_bytes()) | {"chat_template": text}
        path.write_text(json.dumps(content))
    else:
        maker.rewrite(path, text.encode("utf-8", "surrogatepass"))
    data = maker.root / maker.one_of("data")
    if kind == 2 and data.suffix == ".jsonl":
        return Mutant(path, lambda: doors.show_data(folder, data, maker.rng), True)
    return Mutant(path, lambda: doors.load_and_use(folder, maker.rng))


# ---- adapters, runs, caches


def adapter(maker: Maker) -> Mutant:
    """Change an adapter of a folder or of a GGUF file."""
    kind = maker.rng.choice(("llama", "gguf"))
    folder = maker.copy(f"adapters/{kind}")
    part = maker.rng.random()
    if part < 0.1:
        path = folder / "chat_template.jinja"
        maker.rewrite(path, jinja_mutants.template(maker.rng).encode("utf-8", "surrogatepass"))
    elif part < 0.5:
        path = maker.change_json(folder / "adapter_config.json")
    else:
        path = folder / "adapter_model.safetensors"
        maker.change_bytes(path, lambda b, rng: safetensors.mutated(b, rng, maker.json))
    door = maker.rng.randrange(6)
    if door == 0:
        return Mutant(path, lambda: doors.export(folder, maker.folder / "out.gguf"), True)
    if door == 1:
        return Mutant(path, lambda: doors.generate(folder), True)
    if door == 2:
        base = maker.root / ("models/llama" if kind == "llama" else "gguf/llama.gguf")
        return Mutant(path, lambda: doors.load_and_use(base, maker.rng, folder))
    return Mutant(path, lambda: doors.load_and_use(folder, maker.rng))


def checkpoint(maker: Maker) -> Mutant:
    """Change a checkpoint, and resume from it."""
    run = maker.copy("run", "run")
    folder = run / "checkpoint-2"
    kind = maker.rng.randrange(5)
    if kind < 3:
        path = maker.change_json(folder / "state.json")
    else:
        name = ("optimizer", "adapter_model")[kind - 3] + ".safetensors"
        path = folder / name
        maker.change_bytes(path, lambda b, rng: safetensors.mutated(b, rng, maker.json))
    return Mutant(path, lambda: doors.resume(run, maker.root / "data" / "form-0.jsonl"), True)


def run_folder(maker: Maker) -> Mutant:
    """Change config.toml, metrics.jsonl or outputs.json of a run; resume, replace or load it."""
    run = maker.copy("run", "run")
    name = maker.rng.choice(("config.toml", "metrics.jsonl", "outputs.json"))
    path = run / name
    if name == "config.toml":
        maker.rewrite(path, toml_text(path.read_text(), maker.json).encode("utf-8", "replace"))
        words = ["--config", path, "--output-dir", maker.folder / "other"]
        return Mutant(path, lambda: doors.parse_command(list(map(str, words)), "train"))
    if name == "outputs.json":
        maker.change_json(path)
    else:
        maker.rewrite(path, _with_a_changed_line(path, maker))
    data = maker.root / "data" / "form-0.jsonl"
    model = maker.root / "models" / "llama"
    kind = maker.rng.randrange(3)
    if kind == 0:
        return Mutant(path, lambda: doors.overwrite(run, model, data), True)
    if kind == 1:
        return Mutant(path, lambda: doors.load_and_use(run, maker.rng))
    return Mutant(path, lambda: doors.resume(run, data), True)


def report(maker: Maker) -> Mutant:
    """Change run.json, metrics.jsonl or config.toml of a run, and write its report."""
    run = maker.copy("run", "run")
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").unlink()  # it may be a link to the original
    (run / "metrics.jsonl").write_text(metrics + MORE_METRICS)
    path = run / maker.rng.choice(("run.json", "run.json", "metrics.jsonl", "config.toml"))
    if path.name == "run.json":
        maker.change_json(path)
    elif path.name == "config.toml":
        maker.rewrite(path, toml_text(path.read_text(), maker.json).encode("utf-8", "replace"))
    else:
        maker.rewrite(path, _with_a_changed_line(path, maker))
    return Mutant(path, lambda: doors.report(run, maker.folder / "page.html"), True)


def _with_a_changed_line(path: Path, maker: Maker) -> bytes:
    """Return the lines of a JSONL file, of which one is changed."""
    lines = path.read_text().splitlines()
    place = maker.rng.randrange(len(lines))
    lines[place] = maker.json.text(json.loads(lines[place]))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def toml(maker: Maker) -> Mutant:
    """Change a TOML file for --config."""
    path = maker.folder / "settings.toml"
    original = (maker.root / "run" / "config.toml").read_text()
    maker.rewrite(path, toml_text(original, maker.json).encode("utf-8", "surrogatepass"))
    if maker.rng.random() < 0.4:
        model = ["--model", maker.root / "models" / "llama", "--max-steps", 1]
        return Mutant(
            path, lambda: doors.command(doors.plan_command, "--config", path, *model[:2]), True
        )
    return Mutant(path, lambda: doors.parse_command(["--config", str(path)], "train"))


def command_line(maker: Maker) -> Mutant:
    """Parse a random command line."""
    name = maker.rng.choice(("train", "train", "plan", "export", "data", "generate"))
    words = flags(name, maker.rng, maker.root)
    return Mutant(None, lambda: doors.parse_command(words, name), True)


def token_cache(maker: Maker) -> Mutant:
    """Change an entry of the token cache."""
    cache = maker.copy("cache", "cache")
    entry = next(cache.iterdir())
    path = maker.rng.choice(sorted(entry.iterdir()))
    if path.suffix == ".json":
        maker.change_json(path)
    else:
        maker.change_bytes(path, lambda b, rng: byte_mutants.damaged(b, rng, 128))
    model, data = maker.root / "models" / "llama", maker.root / "data" / "form-0.jsonl"
    return Mutant(None, lambda: doors.read_tokens(cache, model, data))


READERS: dict[str, Callable[[Maker], Mutant]] = {
    function.__name__: function
    for function in (
        config, weights, index, quant_state, generation_config, tokenizer_json, tokenizer_parts,
        tokenizer_model, tokenizer_files, chat_template, adapter, checkpoint, run_folder, toml,
        command_line, token_cache, records, text_files, arrow, gguf, gguf_template, imatrix,
        report,
    )
}  # fmt: skip

"""The undamaged files that mutants are made from: tiny models, adapters, a run, data.

    build(root)     write all of them, in about 10 s; run it in a process of its own

The process that forks the mutants must not compute, because a fork copies no threads.
"""

import contextlib
import io
import json
import os
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from family_configs import COMMON, FAMILIES, VISION, WRAPPERS
from fp8_folders import KINDS, write_fp8
from safetensors.torch import load_file, save_file
from tiny import GENERATION_CONFIG, draw, draw_adapter, make_tiny_model, write_tokenizer
from training_runs import RECORDS, SMALLEST

from minitune import FastLanguageModel
from minitune.commands.train import main as train
from minitune.config.architectures import ARCHITECTURES
from minitune.config.model_config import ModelConfig
from minitune.data import token_cache
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset
from minitune.gguf.export import convert_folder
from minitune.gguf.importance.imatrix_files import write_imatrix
from minitune.gguf.importance.importance import ImportanceMatrix, tensor_widths

TINY = SMALLEST | {"vocab": 420, "dtype": torch.float32}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SAMPLES = [  # one record of each form
    RECORDS[0],
    {"messages": [{"role": "system", "content": "Be brief."}, *RECORDS[1]["messages"]]},
    {
        "messages": [
            {"role": "user", "content": "Is it warm in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "content": "7 degrees"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": [TOOL],
    },
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "system": "s",
    },
    {"prompt": "a question", "completion": " an answer"},
    {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"text": "The order of twelve lamps goes to Lisbon.", "id": 7, "score": 0.5},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
]


def build(root: Path) -> None:
    """Write all originals below `root`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = root / "models"
    llama = make_tiny_model(models / "llama", **TINY)
    make_tiny_model(models / "sharded", shards=2, **TINY)
    _with_more_tokens(make_tiny_model(models / "tokens", **TINY))
    make_tiny_model(models / "llama3", tokenizer="llama3", **TINY)
    make_tiny_model(models / "spm", tokenizer="spm", tie=False, **TINY)
    _build_families(root / "families")
    _build_quantised(root / "quantised", llama)
    gguf = root / "gguf"
    for name in ("llama", "llama3", "spm"):
        convert_folder(models / name, gguf / f"{name}.gguf", "q8_0", verify=False, progress=False)
    _build_adapters(root, llama, gguf / "llama.gguf")
    _build_imatrix(root / "imatrix", llama)
    _build_data(root / "data")
    _build_run(root, llama)
    _build_cache(root, llama)


def _with_more_tokens(folder: Path) -> None:
    """Write the other files of a tokenizer into a folder."""
    tokens = ["<tool>", "<think>"]
    _write(
        folder / "added_tokens.json", {token: 400 + i for i, token in enumerate([*tokens, "<|x|>"])}
    )
    names = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    _write(folder / "special_tokens_map.json", names | {"additional_special_tokens": tokens})
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    entries = {"400": {"content": "<tool>"}, "401": {"content": "<think>"}}
    entries["402"] = {"content": "<|x|>", "lstrip": False, "rstrip": True, "normalized": False}
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"added_tokens_decoder": entries}
    _write(path, config | {"model_max_length": 256, "clean_up_tokenization_spaces": False})
    generation = GENERATION_CONFIG | {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    _write(folder / "generation_config.json", generation | {"repetition_penalty": 1.1})


def _build_families(root: Path) -> None:
    """Write a model of each family and of each multimodal wrapper."""
    for name, (model_type, values) in FAMILIES.items():
        config = COMMON | {"model_type": model_type, **values}
        if model_type in ARCHITECTURES:
            config["architectures"] = [ARCHITECTURES[model_type].model_class]
        _write_model(root / name.replace(" ", "-"), config, "")
    for name, (model_type, text, outer) in WRAPPERS.items():
        config = {"model_type": model_type, "vision_config": VISION} | outer
        config["text_config"] = COMMON | text
        _write_model(root / f"in-{name.replace(' ', '-')}", config, "model.language_model.")


def _write_model(folder: Path, config: dict, prefix: str) -> None:
    folder.mkdir(parents=True)
    _write(folder / "config.json", config)
    shapes = ModelConfig.from_folder(folder).tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        prefix + name.removeprefix("model.")
        if prefix and name.startswith("model.")
        else name: draw(name, tuple(shape), generator).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "generation_config.json", GENERATION_CONFIG)
    write_tokenizer(folder, "bpe")


def _build_quantised(root: Path, llama: Path) -> None:
    for name, arguments in KINDS.items():
        folder = make_tiny_model(root / name.replace(" ", "-"), hidden=96, ffn=160, layers=1)
        write_fp8(folder, *arguments)
    for name in ("nf4", "nf4-again"):
        options = {"max_seq_length": 64, "dtype": torch.float32, "device": "cpu"}
        model, tokenizer = FastLanguageModel.from_pretrained(llama, **options)
        model.save_4bit(root / name, tokenizer)


def _build_adapters(root: Path, llama: Path, gguf: Path) -> None:
    for name, base in {"llama": llama, "gguf": gguf}.items():
        model, _ = FastLanguageModel.from_pretrained(
            base, max_seq_length=64, dtype=torch.float32, device="cpu", load_in_4bit=False
        )
        FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj", "down_proj"])
        draw_adapter(model, b=0.1)
        model.save_pretrained(root / "adapters" / name)


def _build_imatrix(root: Path, llama: Path) -> None:
    widths = tensor_widths(ModelConfig.from_folder(llama))
    values = {name: torch.rand(width) for name, width in widths.items() if name[:4] == "blk."}
    root.mkdir()
    write_imatrix(ImportanceMatrix(values, 512, 1, "text"), root / "imatrix.gguf")
    parts = [struct.pack("<i", len(values))]
    for name, sums in values.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", 7, len(sums))]
        parts.append(sums.numpy().tobytes())
    parts.append(struct.pack("<ii", 1, 4) + b"text")
    (root / "imatrix.dat").write_bytes(b"".join(parts))


def _build_data(root: Path) -> None:
    root.mkdir()
    for number, record in enumerate(SAMPLES):
        lines = [record, record | {"id": 3}] if "input_ids" not in record else [record] * 2
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / f"form-{number}.jsonl").write_text(text)
        _write(root / f"form-{number}.json", lines)
    (root / "table.csv").write_text('prompt,completion\n"a ""b""",c\nd,"e\nf"\n')
    (root / "table.tsv").write_text("instruction\toutput\na\tb\n")
    (root / "text.txt").write_text("The first line.\nGrüße.\n\nThe last line.\n")
    for number, records in enumerate((SAMPLES[:1], SAMPLES[4:5] * 3, SAMPLES[7:8] * 2)):
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, root / f"table-{number}.parquet")
        folder = root / f"saved-{number}"
        folder.mkdir()
        with (
            pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
        _write(folder / "state.json", state | {"_format_columns": None, "_format_type": None})
        _write(folder / "dataset_info.json", {"features": {}, "citation": ""})


def _build_run(root: Path, llama: Path) -> None:
    """Train two steps from the command line, with a checkpoint at each."""
    arguments = ["--model", llama, "--data", root / "data" / "form-0.jsonl", "--r", 2]
    arguments += ["--output-dir", root / "run", "--max-steps", 2, "--device", "cpu"]
    arguments += ["--max-seq-length", 64, "--no-load-in-4bit", "--save-strategy", "steps"]
    arguments += ["--save-steps", 1, "--logging-steps", 1]
    with contextlib.redirect_stderr(io.StringIO()) as text:
        code = train(list(map(str, arguments)))
    if code:
        raise RuntimeError(text.getvalue())


def _build_cache(root: Path, llama: Path) -> None:
    token_cache.MIN_BYTES = 0
    tokenizer = Tokenizer.from_folder(llama)
    tokenize_dataset(root / "data" / "form-0.jsonl", tokenizer, 60, cache=root / "cache")


def build_in_a_process(root: Path) -> None:
    """Build the originals in a forked process.

    Raises: RuntimeError if that fails.
    """
    root.mkdir(parents=True)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            build(root)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f"{root}: the originals could not be built")


def edit_tensors(content: Path, change) -> None:
    """Rewrite a safetensors file after a change of its dictionary."""
    tensors = load_file(content)
    change(tensors)
    save_file(tensors, content, metadata={"format": "pt"})


def _write(path: Path, value) -> None:
    path.write_text(json.dumps(value))

"""The export command audits the ways to ship an adapter, with or without writing files."""

import json
import shlex
from pathlib import Path

import pytest
from test_merge import load
from tiny import make_tiny_model

from minitune.commands import export
from minitune.commands.next_commands import after_audit
from minitune.gguf.audit.audit_table import AuditRow, MergeAudit
from minitune.gguf.audit.merge_audit import audit_merges

TEXTS = ["Twelve blue lamps go to Lisbon on Friday.", "The invoice follows by letter."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder with a base, an adapter trained on each form of it, and held-out data."""
    folder = tmp_path_factory.mktemp("audit")
    make_tiny_model(folder / "base")
    for form, load_in_4bit in (("nf4", True), ("16bit", False)):
        model, _ = load(folder / "base", load_in_4bit=load_in_4bit)
        model.save_pretrained(folder / form)
    data = folder / "heldout.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def run(capsys, *arguments):
    code = export.main(list(map(str, arguments)))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("form", ["nf4", "16bit"])
def test_the_command_prints_the_audit_on_the_base_of_the_training_and_writes_nothing(
    tiny, tmp_path, monkeypatch, capsys, form
):
    monkeypatch.chdir(tmp_path)
    methods = ("--quantization-method", "q8_0", "q4_0")
    code, out, err = run(
        capsys, "--model", tiny / form, "--audit", tiny / "heldout.jsonl", *methods
    )
    assert code == 0 and list(tmp_path.iterdir()) == []
    model, tokenizer = load(tiny / form, lora=False, load_in_4bit=form == "nf4")
    audit = audit_merges(model, tokenizer, tiny / "heldout.jsonl", ["q8_0", "q4_0"])
    assert out == f"{audit}\n"
    assert ("as trained (NF4 + adapter)" in out) == (form == "nf4")
    # The next command writes the recommended way.
    command = shlex.split(err.splitlines()[-1].removeprefix("next"))
    code, out, _ = run(capsys, *command[command.index("export") + 1 :])
    assert code == 0
    (path,) = out.splitlines()
    way = audit.recommended
    assert path.endswith(f"-{way.method.upper()}.gguf")
    assert Path(path).stat().st_size == way.nbytes


@pytest.mark.parametrize(
    ("way", "commands"),
    [
        ((None, "nf4"), ["--model runs/1 --merge-base nf4 --merged merged"]),
        ((None, "original"), ["--model runs/1 --merged merged"]),
        (("q4_0", "auto"), ["--model runs/1 --output gguf --quantization-method q4_0 --imatrix i"]),
        (
            ("q4_0", None),
            [
                "--model runs/1 --gguf-adapter gguf",
                "--model base --output gguf --quantization-method q4_0 --imatrix i",
            ],
        ),
        ((None, None), ["--model runs/1 --gguf-adapter gguf"]),
    ],
)
def test_the_next_commands_write_the_recommended_way(way, commands):
    parser = export.export_parser("minitune export")
    arguments = parser.parse_args(["--model", "runs/1", "--audit", "d", "--imatrix", "i"])
    row = AuditRow("way", 1, 0.0, 1.0, 1.0, 1.0, *way)
    audit = MergeAudit(row, row, (row,), 1, 1, 1)
    lines = after_audit("minitune export", arguments, audit, Path("base")).splitlines()
    assert [line.split(" export ")[1] for line in lines] == commands


def test_with_an_output_the_written_types_are_audited_first(tiny, tmp_path, capsys):
    data, file = tiny / "heldout.jsonl", tmp_path / "x.gguf"
    arguments = ("--model", tiny / "nf4", "--audit", data, "--audit-tokens", 9)
    imatrix = ("--imatrix-from", data, "--quantization-method", "q4_0")
    code, out, err = run(capsys, *arguments, "--output", file, *imatrix)
    assert code == 0 and file.is_file()
    lines = out.splitlines()
    assert lines[0].startswith("1 samples, ") and "1 samples left out" in lines[0]
    assert any(line.startswith("merged on NF4, Q4_0") for line in lines)
    assert lines[-1] == str(file) and "imatrix" in err


def test_an_adapter_of_another_program_is_taken_as_trained_on_16_bit_with_a_note(
    tiny, tmp_path, capsys
):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = (tiny / "nf4" / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config)
    content = (tiny / "nf4" / "adapter_model.safetensors").read_bytes()
    foreign = content.replace(b'"minitune.base"', b'"somebody.base"')
    (adapter / "adapter_model.safetensors").write_bytes(foreign)
    arguments = ("--model", adapter, "--audit", tiny / "heldout.jsonl")
    code, out, err = run(capsys, *arguments)
    assert code == 0 and "as trained (16 bit + adapter)" in out
    words = " ".join(err.split())
    assert "does not say on which weights it was trained: taken is 16-bit; for NF4 give" in words
    code, out, err = run(capsys, *arguments, "--merge-base", "nf4")
    assert code == 0 and "as trained (NF4 + adapter)" in out
    assert "trained: taken is NF4" in " ".join(err.split())


def test_flags_that_do_not_belong_together_are_refused(tiny, capsys):
    data = tiny / "heldout.jsonl"
    audit = ("--audit", data)
    for arguments, message in [
        (("--model", tiny / "base", *audit), "--audit measures a fine-tune, and"),
        (("--model", tiny / "nf4", "--audit-tokens", "9"), "nothing to write"),
        (("--model", tiny / "nf4", *audit, "--audit-tokens", "0"), "expected at least 1, together"),
        (("--model", tiny / "nf4", *audit, "--ollama"), "--ollama needs --output"),
        (
            ("--model", tiny / "nf4", "--imatrix", data, "--merged", "x"),
            "--imatrix needs --output",
        ),
        (("--model", tiny / "16bit", *audit, "--merge-base", "nf4"), "leave --merge-base out"),
        (("--model", tiny / "nf4", "--audit", tiny / "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", tiny / "nf4", *audit, "--quantization-method", "q9"), "is not supported"),
    ]:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "") and message in err, err

"""The export command writes GGUF files and merged folders, and reports bad input in one line."""

import re

import numpy as np
from gguf_files import tensors_of
from test_merge import load
from tiny import make_tiny_model

from minitune.commands import export
from minitune.gguf.export import export_gguf
from minitune.gguf.lora_adapter import save_gguf_adapter


def test_the_command_exports_and_reports_bad_input_in_one_line(tmp_path, capsys):
    def command(*arguments):
        code = export.main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    model, tokenizer = load(make_tiny_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    base = ("--model", tmp_path / "base")
    trained = (*base, "--adapter", tmp_path / "adapter", "--merge-base", "nf4")
    gguf, merged = tmp_path / "x.gguf", tmp_path / "merged"
    code, out, _ = command(*trained, "--output", gguf, "--merged", merged)
    assert code == 0 and out.splitlines() == [str(merged), str(gguf)]
    expected = tensors_of(export_gguf(model, tmp_path / "y.gguf", tokenizer, merge_base="nf4"))
    found = tensors_of(gguf)
    assert all(np.array_equal(found[name].data, expected[name].data) for name in expected)
    options = ("--output", tmp_path / "z", "--quantization-method", "f16")
    assert command("--model", merged, *options)[0] == 0
    assert (tmp_path / "z" / "merged-F16.gguf").is_file()
    for bad, message in [
        (base, "nothing to write"),
        (("--model", tmp_path / "nowhere", "--output", tmp_path), "nowhere"),
        ((*trained, "--output", gguf), "exists; remove it"),
        ((*trained, "--output", gguf / "y.gguf"), "its folder could not be made"),
        ((*trained, "--output", tmp_path / ("x" * 300 + ".gguf")), "File name too long"),
    ]:
        code, out, err = command(*bad)
        assert code == 2 and not out
        last = err.splitlines()[-1]  # behind the line on the base of the merge
        assert re.fullmatch(rf"minitune export: error: .*{message}.*", last), err


def test_an_interrupted_command_ends_with_130_and_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export", interrupted)
    assert export.main(["--model", "x"]) == 130
    assert capsys.readouterr() == ("", "minitune export: stopped by Ctrl-C\n")


def test_the_command_writes_the_adapter_alone_and_beside_a_merged_file(tmp_path, capsys):
    model, _ = load(make_tiny_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    expected = save_gguf_adapter(model, tmp_path / "expected.gguf").read_bytes()
    alone, both, merged = (tmp_path / name for name in ("a.gguf", "b.gguf", "m.gguf"))
    trained = ["--model", str(tmp_path / "adapter")]
    capsys.readouterr()
    assert export.main([*trained, "--gguf-adapter", str(alone)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(alone)] and alone.read_bytes() == expected
    # The base is no GGUF file yet, so the command that makes it comes first.
    text = " ".join(err.split())
    assert f"--output {tmp_path}/base.gguf --quantization-method not_quantized" in text
    assert f"llama-server -m {tmp_path}/base.gguf --lora {alone}" in text and "merging" not in text
    arguments = [*trained, "--gguf-adapter", str(both), "--output", str(merged), "--no-verify"]
    assert export.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(merged), str(both)] and both.read_bytes() == expected
    assert f"llama-server -m {merged}\n" in err and f"llama-server -m {both}" not in err
    same = [*trained, "--gguf-adapter", str(tmp_path / "c.gguf")]
    assert export.main([*same, "--output", str(tmp_path / "c.gguf")]) == 2
    assert "--output and --gguf-adapter name the same file" in capsys.readouterr().err
    assert export.main([*same, "--ollama"]) == 2
    assert "and write the adapter with --ollama then" in " ".join(capsys.readouterr().err.split())
    base = ["--model", str(tmp_path / "base"), "--gguf-adapter", str(tmp_path / "c.gguf")]
    assert export.main(base) == 2
    assert "base has none; give the folder of a run or an adapter" in capsys.readouterr().err

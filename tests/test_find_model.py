"""A name stands for a model folder, an adapter with its base, or a run; the rest is refused."""

import json

import pytest
import torch
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.checkpoints.adapter import CONFIG
from minitune.checkpoints.find_model import find_adapter, find_model
from minitune.commands import export, generate

IDS = torch.tensor([[5, 17, 300, 42, 7, 7, 260, 99, 3]])


def load(name, **options):
    return FastLanguageModel.from_pretrained(
        name, max_seq_length=64, load_in_4bit=False, device="cpu", **options
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(base, seed=0, **settings):
    model = FastLanguageModel.get_peft_model(load(base)[0], **({"r": 4} | settings))
    draw_adapter(model, b=0.2, seed=seed)
    return model


def set_base(adapter, name):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": name}))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a folder with models/base, and in runs/1 an adapter and two checkpoints."""
    base = make_tiny_model(tmp_path / "models" / "base")
    for seed, name in enumerate(("adapter", "checkpoint-9", "checkpoint-10")):
        trained(base, seed).save_pretrained(tmp_path / "runs" / "1" / name)
    (tmp_path / "runs" / "1" / "outputs.json").write_text('{"names": ["adapter"]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["runs/1", "runs/1/adapter", "runs/1/checkpoint-10"])
def test_a_run_an_adapter_and_a_checkpoint_load_with_their_base(project, name):
    adapter = find_adapter(name)
    model, _ = load(name)
    expected, _ = load("models/base")
    expected.load_adapter(adapter)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(load("models/base")[0]))
    assert find_model(name) == (project / "models/base", str(project / "models/base"), adapter)


def test_a_run_stands_for_its_adapter_and_until_then_for_its_newest_checkpoint(project):
    assert find_adapter("runs/1").name == "adapter"
    (project / "runs/1/adapter").rename(project / "elsewhere")
    assert find_adapter("runs/1").name == "checkpoint-10"


def test_a_saved_adapter_names_a_folder_by_its_absolute_path_and_an_id_as_it_is(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    entry = tmp_path / "hub" / "models--some--llama"
    make_tiny_model(entry / "snapshots" / "abc")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    make_tiny_model(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for name, expected in (("some/llama", "some/llama"), ("base", str(tmp_path / "base"))):
        trained(name).save_pretrained("adapter")
        config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
        assert config["base_model_name_or_path"] == expected
        assert find_model("adapter").name == expected


def test_a_relative_base_is_sought_from_the_folders_above_the_adapter(project, monkeypatch):
    set_base(project / "runs/1/adapter", "models/base")
    assert find_model("runs/1").base == project / "models/base"
    monkeypatch.chdir("/")
    source = find_model(project / "runs/1")
    assert source[:2] == (project / "models/base", str(project / "models/base"))


def test_a_base_that_moved_is_named_with_the_remedy_and_the_remedy_works(project):
    (project / "models/base").rename(project / "moved")
    with pytest.raises(ValueError, match=r"base model is missing.*pass adapter='runs/1/adapter'"):
        load("runs/1")
    assert load("moved", adapter="runs/1")[0].lora.r == 4


REFUSED = {
    "runs/2": "model folder runs/2 does not exist; .*runs holds 1",
    "models/base/config.json": "is a file; give the folder",
    "gguf": "give a GGUF file in it by its own path, such as gguf/x.gguf",
    "runs/3": "saved neither an adapter nor a checkpoint yet",
    "nameless": "names no base model; load the base model by its own path",
    "nested": "names runs/1 as its base, an adapter",
    "other": r"other: does not fit the model large/?: .*has shape .*model need \(4, 128\)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_folder_is_refused_in_plain_words(project, name):
    for folder in ("gguf", "runs/3", "other"):
        (project / folder).mkdir()
    (project / "gguf" / "x.gguf").touch()
    (project / "runs/3/metrics.jsonl").touch()
    for folder, base in (("nameless", None), ("nested", "runs/1")):
        trained("models/base").save_pretrained(folder)
        set_base(project / folder, base)
    trained("models/base").save_pretrained("other")
    set_base(project / "other", str(make_tiny_model(project / "large", hidden=128)))
    with pytest.raises(ValueError, match=REFUSED[name]):
        load(name)


def test_a_second_adapter_is_refused_and_the_same_one_is_taken(project):
    trained("models/base", seed=5).save_pretrained("second")
    assert find_model("runs/1", "runs/1/adapter") == find_model("runs/1")
    with pytest.raises(ValueError, match="runs/1 is an adapter itself, so second would be"):
        find_model("runs/1", "second")
    assert find_model("models/base", "second").adapter.name == "second"
    with pytest.raises(ValueError, match="holds no adapter"):
        find_model("models/base", "models/base")


def test_the_commands_take_a_run_as_model_and_as_adapter(project, capsys):
    ways = [
        ("--model", "runs/1"),
        ("--model", "runs/1/adapter"),
        ("--model", "models/base", "--adapter", "runs/1"),
    ]
    options = ("--prompt", "The order", "--raw", "--no-load-in-4bit", "--max-new-tokens", "8")
    texts, files = set(), set()
    for number, way in enumerate(ways):
        assert generate.main([*way, *options]) == 0
        texts.add(capsys.readouterr().out)
        assert export.main([*way, "--merged", f"merged{number}"]) == 0
        capsys.readouterr()
        files.add((project / f"merged{number}" / "model.safetensors").read_bytes())
    assert len(texts) == len(files) == 1
    assert export.main(["--model", "runs/1", "--save-4bit", "x"]) == 2
    assert "writes the model without an adapter" in capsys.readouterr().err

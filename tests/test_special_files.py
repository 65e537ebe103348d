"""A FIFO, device, socket, folder or broken link in place of a file is refused unopened."""

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from tiny import make_tiny_model

from minitune.checkpoints.adapter import read_adapter_config
from minitune.checkpoints.find_model import find_adapter, find_model
from minitune.checkpoints.safetensors_folder import SafetensorsFolder, read_safetensors
from minitune.config.model_config import ModelConfig
from minitune.data.sources.sources import open_sources
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.importance.imatrix_files import read_imatrix
from minitune.gguf.reader import GgufReader
from minitune.model.generation_arguments import read_generation_defaults
from minitune.read_files import file_exists, read_json, read_text, read_toml

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")


def make_socket(path):
    at_home = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as opened:
        opened.bind(path.name)
    os.chdir(at_home)


def make_link_to_fifo(path):
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


KINDS = {  # name -> maker, words of the error
    "FIFO": (os.mkfifo, "a FIFO, not a file"),
    "link to a FIFO": (make_link_to_fifo, "a FIFO, not a file"),
    "socket": (make_socket, "a socket, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    "folder": (Path.mkdir, "a folder, not a file"),
    "broken link": (lambda path: path.symlink_to("../blobs/1"), "a broken link to ../blobs/1"),
    "circle of links": (lambda path: path.symlink_to(path.name), "could not be read"),
    "link to a folder": (lambda path: path.symlink_to("/dev"), "a folder, not a file"),
}


MAY_BE_FOLDERS = ("x.jsonl", "x.parquet")  # of `datasets`


def tokenizer_of(path):
    return Tokenizer.from_folder(path.parent)


def sentencepiece_of(path):
    path.with_name("tokenizer.json").unlink()
    return tokenizer_of(path)


def template_of(path):
    return Tokenizer.from_folder(path.parents[1])


def weights_of(path):
    return SafetensorsFolder(path.parent)


READERS = {  # file -> its readers
    "config.json": (
        lambda path: ModelConfig.from_folder(path.parent),
        lambda path: find_model(path.parent),
    ),
    "tokenizer_config.json": (tokenizer_of,),
    "tokenizer.json": (tokenizer_of,),
    "tokenizer.model": (sentencepiece_of,),
    "special_tokens_map.json": (tokenizer_of,),
    "added_tokens.json": (tokenizer_of,),
    "chat_template.jinja": (tokenizer_of,),
    "additional_chat_templates/tool_use.jinja": (template_of,),
    "generation_config.json": (
        tokenizer_of,
        lambda path: read_generation_defaults(path.parent),
    ),
    "model.safetensors": (weights_of,),
    "model.safetensors.index.json": (weights_of,),
    "other.safetensors": (
        lambda path: (path.with_name("model.safetensors").unlink(), weights_of(path)),
    ),
    "adapter_config.json": (
        lambda path: read_adapter_config(path.parent),
        lambda path: find_adapter(path.parent),
    ),
    "adapter_model.safetensors": (read_safetensors,),
    "x.gguf": (GgufReader,),
    "x.imatrix": (read_imatrix,),
    "x.jsonl": (open_sources,),
    "x.parquet": (open_sources,),
    "x.toml": (read_toml,),
    "state.json": (lambda path: read_json(path), lambda path: read_json(path, default={})),
    "x.txt": (read_text,),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_file_in_place_of_any_file_is_refused_by_name(base, tmp_path, kind):
    make, words = KINDS[kind]
    for number, (name, readers) in enumerate(READERS.items()):
        if "folder" in kind and name in MAY_BE_FOLDERS:
            continue
        for number_of_reader, read in enumerate(readers):
            folder = tmp_path / f"{number}-{number_of_reader}"
            shutil.copytree(base, folder)
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            make(path)
            with pytest.raises(ValueError) as refused:
                read(path)
            assert name in str(refused.value) and words in str(refused.value), name


def test_a_link_to_a_file_is_read_and_a_path_that_names_nothing_is_absent(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to("a.json")
    assert file_exists(tmp_path / "b.json") and read_json(tmp_path / "b.json") == {}
    for absent in ("c.json", "a.json/c.json", "none/c.json", "a\0b"):
        assert not file_exists(tmp_path / absent)
    with pytest.raises(ValueError, match="File name too long"):
        file_exists(tmp_path / ("x" * 300))


def test_a_broken_link_in_place_of_a_folder_of_templates_is_refused(base, tmp_path):
    name = "additional_chat_templates"
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{name}: is not a folder"):
        Tokenizer.from_folder(tmp_path / "model")


def test_a_byte_order_mark_of_a_template_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("x", encoding="utf-8-sig")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: begins with a byte order mark"):
        Tokenizer.from_folder(tmp_path / "model")


OUTSIDE = (
    "../x.safetensors",
    "a/../../x.safetensors",
    "/x.safetensors",
    "",
    "..",
    "C:\\x",
    "a\\..\\x",
)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_an_index_that_names_a_file_outside_its_folder_is_refused(base, tmp_path, outside):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    shutil.copy(base / "model.safetensors", tmp_path / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": outside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: names the shard '.*', expected a file in"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("kind", ["FIFO", "broken link", "socket"])
def test_a_special_file_in_place_of_a_gguf_model_is_refused_by_name(tmp_path, kind):
    make, words = KINDS[kind]
    make(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=f"x.gguf: {words}"):
        find_model(tmp_path / "x.gguf")


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path):
    folder = make_tiny_model(tmp_path / "models--org--name" / "snapshots" / "1", shards=2)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert "model.norm.weight" in SafetensorsFolder(folder)
    assert Tokenizer.from_folder(folder).chat_template
    assert ModelConfig.from_folder(folder).num_hidden_layers == 2

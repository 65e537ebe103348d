"""Files and folders are written whole or not at all."""

import os

import pytest
from full_disk import files_limited_to

from minitune.atomic_files import atomic_file, atomic_folder, atomic_write_text


@pytest.fixture
def disk_events(monkeypatch):
    """Record each fsync and rename as (kind, inode, size at that moment)."""
    events = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append(("fsync", status.st_ino, status.st_size))
        fsync(descriptor)

    def recorded(rename):
        def call(source, target, **options):
            status = os.stat(source)
            events.append(("rename", status.st_ino, status.st_size))
            rename(source, target, **options)

        return call

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded(replace))
    monkeypatch.setattr(os, "rename", recorded(rename))
    return events


def test_a_file_is_flushed_whole_before_its_rename_and_its_folder_afterwards(tmp_path, disk_events):
    (tmp_path / "config.toml").write_text("old")
    atomic_write_text(tmp_path / "config.toml", "learning_rate = 0.1\n")
    file, folder = (tmp_path / "config.toml").stat().st_ino, tmp_path.stat().st_ino
    kinds = [(kind, inode) for kind, inode, _ in disk_events]
    assert kinds == [("fsync", file), ("rename", file), ("fsync", folder)]
    assert disk_events[0][2] == len("learning_rate = 0.1\n")


@pytest.mark.parametrize("others", [False, True], ids=["new folder", "beside other files"])
def test_a_folders_files_are_flushed_before_any_rename(tmp_path, disk_events, others):
    if others:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").write_text("kept")
    with atomic_folder(tmp_path / "a") as partial:
        for name in ("one", "two"):
            (partial / name).write_text(name)
    files = {(tmp_path / "a" / name).stat().st_ino for name in ("one", "two")}
    kinds = [kind for kind, *_ in disk_events]
    first_rename = kinds.index("rename")
    flushed = {inode for kind, inode, size in disk_events[:first_rename] if size}
    assert files <= flushed and kinds[-1] == "fsync"


def test_a_block_that_raises_leaves_the_earlier_file_and_nothing_else(tmp_path):
    atomic_write_text(tmp_path / "deep" / "file", "first")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "deep" / "file") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "deep" / "file").read_text() == "first"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_full_disk_leaves_the_earlier_file_and_names_it(tmp_path):
    atomic_write_text(tmp_path / "file", "first")
    message = r"file: could not be written \(File too large\)"
    with files_limited_to(64), pytest.raises(ValueError, match=message):
        atomic_write_text(tmp_path / "file", "x" * 1000)
    assert (tmp_path / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"x: its folder could not be made \(.*: .*file.*\)"):
        atomic_write_text(tmp_path / "file" / "deep" / "x", "text")


def test_symlinked_folder_stays_a_symlink_and_its_target_gets_the_files(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "a") as partial:
            (partial / "file").write_text(text)
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "elsewhere"]


def test_interrupted_save_leaves_the_earlier_folder_whole(tmp_path):
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("first")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("second")
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_save_that_was_killed_between_its_renames_is_recovered(tmp_path):
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("first")
    (tmp_path / "a").rename(tmp_path / ".a.old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "file").read_text() == "first"


def test_folder_left_by_a_killed_save_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "half").write_text("")
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_whole_folder_may_replace_all_that_was_there_and_does_so_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder, keep_others=False) as partial:
        (partial / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["model-00001-of-00002.safetensors"]
    with atomic_folder(folder, keep_others=False) as partial:
        (partial / "model.safetensors").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]

"""The commands open no socket, unpickle no file, and start no program but llama.cpp's check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_inputs import write_inputs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Return the events of the commands, and those of one misdeed of each kind."""
    folder = tmp_path_factory.mktemp("watched")
    inputs, report = write_inputs(folder), folder / "report.json"
    program = str(ROOT / "tests" / "watched_program.py")
    command = [sys.executable, program, str(inputs), str(folder / "output"), str(report)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())


def test_commands_open_no_socket_and_load_no_pickle_and_start_only_the_check_by_llama_cpp(events):
    of_commands, _ = events
    others = [event for event in of_commands if "llama_cpp_probe.py" not in event]
    assert others == []


@pytest.mark.parametrize(
    "kind",
    [
        "socket 2",
        "socket.connect",
        "pickle.find_class",
        "pickle.loads",
        "marshal.loads",
        "torch.load",
        "program true",
    ],
)
def test_each_kind_of_misdeed_is_noticed(events, kind):
    assert kind in events[1]

"""The commands `data show` and `train --show`, on the terminal and as an HTML page."""

import io
import json
import os
import re
import shutil

import pytest
from command_inputs import train, train_arguments, write_inputs
from html_pages import Page
from hypothesis import given
from hypothesis import strategies as st

from minitune.commands.__main__ import main
from minitune.data.dataset_report import DatasetReport
from minitune.data.inspector.dataset_summary import Bar, DatasetSummary
from minitune.data.inspector.html_page import MAX_SAMPLE_BYTES, html_page
from minitune.data.inspector.token_display import Piece, ShownSample
from minitune.streams import printable

HOSTILE = "</mark><script>alert('x')</script>\x1b]0;owned\x07\u202e & <img src=https://evil/x>"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a tiny model and datasets."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def show(inputs, tmp_path, capsys, monkeypatch):
    """Return a function that writes records, runs `data show` and returns its output."""
    monkeypatch.chdir(tmp_path)

    def run(records, *flags, form=("show",)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "mixed.jsonl").write_text(text)
        command = ["data", *form, "--model", str(inputs / "model"), "--data", "mixed.jsonl"]
        assert main([*command, *flags]) == 0
        return capsys.readouterr().out

    return run


def turns(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


RECORDS = [
    turns("Where?", "In\nLisbon."),
    {"messages": [{"role": "user", "content": "never answered"}]},
    turns("Where?", "In\nLisbon."),
    {"text": "word " * 30},
]
SHOWN = """\
--- sample 1  mixed.jsonl:1  messages, 29 tokens, 6 trained on
<|im_start|>user⏎
Where?<|im_end|>⏎
<|im_start|>assistant⏎
[[In⏎
Lisbon.<|im_end|>]]⏎

records                 4  messages 3, text 1
samples                 3
tokens                 98
trained on             51  52.0% of the tokens
longest sample         40  tokens; median 29, shortest 29, limit 40
packed rows             3  of 40 tokens, 81.7% full

samples by length in tokens
                  29 - 39  ████████████████████████████████████████ 2
                       40  ████████████████████ 1

truncated               1  cut to 40 tokens: mixed.jsonl:4
skipped                 1  no token to train on: mixed.jsonl:2
empty answers           0
bad records             0
duplicates              1  the same tokens as an earlier sample: mixed.jsonl:3 = 1
no stop token           1  of 3 trained-on stretches (2 end in <|im_end|>): mixed.jsonl:4
doubled BOS             0
other labels            0
note                    1  no answer to train on: mixed.jsonl:2
"""


def test_show_prints_samples_with_marks_and_then_the_summary(show):
    assert show(RECORDS, "--n", "1", "--max-length", "40") == SHOWN


def test_quiet_may_stand_before_show_and_behind_it(show):
    for form in (("--quiet", "show"), ("show", "--quiet")):
        assert show(RECORDS, "--n", "1", "--max-length", "40", form=form) == SHOWN


def test_without_show_the_summary_stands_alone(show):
    summary = SHOWN.partition("\n\n")[2]
    assert show(RECORDS, "--max-length", "40", form=()) == summary


def test_five_samples_are_shown_by_default_and_borders_on_demand(show):
    assert show([turns(str(i), "x") for i in range(9)]).count("--- sample ") == 5
    assert "--- sample 3  mixed.jsonl:4  text, " in show(RECORDS)
    assert "[[I│n│⏎\n│Lisbon│.│<|im_end|>]]" in show(RECORDS, "--tokens")


def test_colours_are_for_terminals_and_no_color_turns_them_off(show, monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(RECORDS[:1])
    assert terminal.getvalue().startswith("\x1b[1msample 1  ")
    assert "\x1b[1;30;48;5;157m<|im_end|>\x1b[0m" in terminal.getvalue()
    plain = Terminal()
    monkeypatch.setattr("sys.stdout", plain)
    monkeypatch.setenv("NO_COLOR", "1")
    show(RECORDS[:1])
    assert plain.getvalue().startswith("--- sample 1  ") and "\x1b" not in plain.getvalue()


def test_a_stream_that_lacks_a_character_gets_its_escape():
    assert printable("é⏎", io.TextIOWrapper(io.BytesIO(), encoding="ascii")) == "\\xe9\\u23ce"


def test_a_reader_that_stops_early_ends_the_command_without_a_word(inputs, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    data_file = str(inputs / "data.jsonl")
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        command = ["data", "show", "--model", str(inputs / "model"), "--data", data_file]
        assert main(command) == 141
        stream.write("the rest goes nowhere")
    assert capsys.readouterr().err == ""


def test_control_characters_of_the_data_never_reach_the_terminal(show):
    shown = show([turns(HOSTILE, HOSTILE)])
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert "<U+001B>]0;owned<U+0007><U+202E>" in shown


@pytest.mark.parametrize("lines", [1, 2])
def test_control_characters_of_a_bad_record_never_reach_the_terminal(
    lines, inputs, tmp_path, capsys
):
    path = tmp_path / "hostile.jsonl"
    path.write_text(lines * '{"\\u001b[2J\\u009b1m": "v", "text": "x"}\n' + '{"text": "y"}\n')
    assert main(["data", "--model", str(inputs / "model"), "--data", str(path)]) == 2
    error = capsys.readouterr().err
    assert "hostile.jsonl:1: " in error and "<U+001B>[2J<U+009B>1m" in error
    assert "\x1b" not in error and "\x9b" not in error
    arguments = train_arguments(inputs, tmp_path / "run", "--data", str(path), "--skip-bad")
    assert train(arguments) == 0
    assert "\x1b" not in capsys.readouterr().err


def test_bad_records_are_listed_with_exit_code_2_or_left_out_on_demand(inputs, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x"}\n' + 22 * "{not JSON\n")
    command = ["data", "show", "--model", str(inputs / "model"), "--data", str(path)]
    assert main(command) == 2
    output = capsys.readouterr()
    assert not output.out
    assert [f"bad.jsonl:{line}: not JSON" in output.err for line in (2, 21, 22)] == [1, 1, 0]
    assert main([*command, "--skip-bad"]) == 0
    output = capsys.readouterr().out
    assert "\nrecords                23  text 1\n" in output
    assert "\nbad records            22  left out, listed below\n" in output
    assert "bad.jsonl:21: not JSON" in output and output.endswith("\n  and 2 more\n")


def test_show_takes_the_settings_of_a_run_from_its_config(inputs, show, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        'assistant_only_loss = false\neval_strategy = "epoch"\neval_data = "e.jsonl"\n'
    )
    assert "29 tokens, 28 trained on" in show(RECORDS[:1], "--config", str(config))


def test_samples_are_cut_where_training_would_cut_them(inputs, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 30}) + "\n")
    assert main(["data", "--model", str(model), "--data", str(tmp_path / "long.jsonl")]) == 0
    assert "cut to 16 tokens" in capsys.readouterr().out


def test_show_writes_nothing_beside_the_run(show, tmp_path, monkeypatch):
    monkeypatch.setattr("minitune.data.token_cache.MIN_BYTES", 0)
    (tmp_path / "run.toml").write_text('output_dir = "run"\n')
    show(RECORDS, "--config", "run.toml")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n", "-1"), "--n is -1; expected a whole number from 0"),
        (("--html", "data.jsonl"), "--html is data.jsonl; expected a file name that ends in .html"),
        (("--show", "3"), "`minitune data show --n 3` shows"),
        (("--max-lenght", "3"), "did you mean --max-length"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ],
)
def test_a_wrong_flag_is_named_with_the_remedy(flags, message, inputs, capsys):
    given = ["--model", str(inputs / "model"), "--data", str(inputs / "data.jsonl")]
    assert main(["data", "show", *given, *flags]) == 2
    assert message in capsys.readouterr().err


def test_model_and_data_are_needed(capsys):
    assert main(["data", "show", "--model", "x"]) == 2
    error = "minitune data: error: --data is missing: minitune data show --model DIR --data FILE\n"
    assert capsys.readouterr().err == error


# ---- the page


def page_of(show, tmp_path, records, *flags):
    path = tmp_path / "page.html"
    show(records, "--html", str(path), *flags)
    return path.read_text(encoding="utf-8")


def test_the_page_holds_the_samples_and_the_summary(show, tmp_path):
    source = page_of(show, tmp_path, RECORDS, "--max-length", "40")
    page = Page(source)
    text = "".join(page.texts)
    assert "In⏎\nLisbon.<|im_end|>⏎\n" in text
    assert "mixed.jsonl:1" in text and "messages, 29 tokens, 6 trained on" in text
    for words in ("duplicates", "doubled BOS", "52.0% of the tokens", "29 - 39"):
        assert words in text
    marked = "".join(re.findall(r"<mark>(.*?)</mark>", source, re.DOTALL))
    assert re.sub("<[^>]*>", "", marked).startswith("trained onIn⏎\nLisbon.&lt;|im_end|&gt;")


def test_the_page_needs_no_network_and_no_script(show, tmp_path):
    source = page_of(show, tmp_path, RECORDS)
    page = Page(source)
    assert not re.search(r"https?:|//|@import|url\(", source)
    assert not {"script", "link", "img", "iframe", "a", "object"} & set(page.tags)
    assert {name for name, _ in page.attributes} <= {"lang", "charset", "name", "content"} | {
        "class",
        "style",
    }


def test_hostile_texts_stay_texts_on_the_page(show, tmp_path):
    source = page_of(show, tmp_path, [turns(HOSTILE, HOSTILE)] * 2)
    page = Page(source)
    assert "script" not in page.tags and "img" not in page.tags
    assert "\x1b" not in source and "\x07" not in source
    shown = HOSTILE.replace("\x1b", "<U+001B>").replace("\x07", "<U+0007>")
    assert "".join(page.texts).count(shown.replace("\u202e", "<U+202E>")) == 4


def page_of_pieces(*pieces):
    """Return the page of samples that consist of pieces, beside the summary of one token."""
    sizes = {"samples": 1, "tokens": 1, "trained": 1, "shortest": 1, "median": 1, "longest": 1}
    bars = [Bar(1, 1, 1)]
    summary = DatasetSummary(DatasetReport(), max_length=1, **sizes, bars=bars, rows=1)
    samples = [ShownSample(i + 1, f"a.jsonl:{i}", "text", own) for i, own in enumerate(pieces)]
    return html_page("a.jsonl", "", summary, samples)


@given(st.lists(st.tuples(st.text(max_size=9), st.booleans(), st.booleans()), min_size=1))
def test_a_reader_of_the_page_finds_the_pieces_of_random_texts(draws):
    pieces = [Piece(text, (5,), trained, special) for text, trained, special in draws]
    source = page_of_pieces(pieces)
    source.encode()  # no half surrogate pair is left
    assert "".join(piece.shown for piece in pieces) in "".join(Page(source).texts)


def test_a_page_of_a_hundred_long_samples_stays_below_2_mb_and_says_its_cuts():
    pieces = [Piece(5 * "日本<&>", (5,), i % 7 == 0, i % 9 == 0) for i in range(600)]
    source = page_of_pieces(*[pieces] * 99, pieces[:50])
    assert len(source.encode()) < 2 * 10**6
    text = "".join(Page(source).texts)
    left_out = re.findall(r"([\d,]+) tokens are left out of this page, ([\d,]+) of", text)
    assert len(left_out) == 99
    assert len(source.encode()) > MAX_SAMPLE_BYTES - 100_000  # and no more than needed is cut
    hidden = 600 - source.partition("</pre>")[0].count("日本") // 5
    assert {int(tokens.replace(",", "")) for tokens, _ in left_out} == {hidden}
    assert all(0.12 < int(trained.replace(",", "")) / hidden < 0.16 for _, trained in left_out)


# ---- train --show


def test_train_prints_the_first_samples_before_it_trains(inputs, tmp_path, capsys):
    assert train(train_arguments(inputs, tmp_path / "run", "--show", "2")) == 0
    error = capsys.readouterr().err
    shown, _, rest = error.partition("model  ")
    assert shown.count("--- sample ") == 2 and "number 0" in shown and "number 1" in shown
    assert "[[it is 0<|im_end|>]]" in shown and "step 2/2" in rest
    assert "show" not in (tmp_path / "run" / "config.toml").read_text()

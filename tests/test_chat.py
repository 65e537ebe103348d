"""The chat of `minitune generate`: history, commands, Ctrl-C, both sides, a full context."""

import builtins
import signal

import pytest
from tiny import draw_adapter, make_tiny_model

from minitune import FastLanguageModel
from minitune.commands import chat, generate
from minitune.commands.answering import WITH_ADAPTER, Answerer
from minitune.commands.chat_history import ChatHistory, Turn
from minitune.commands.generate_flags import parse_arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), positions=512)


@pytest.fixture(scope="module")
def loaded(folder):
    """Return a model with an adapter that changes its answers, and its tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(folder, 512, device="cpu")
    model = FastLanguageModel.get_peft_model(model, r=2)
    draw_adapter(model, b=0.3)
    return model, tokenizer


def answerer_of(loaded, *flags):
    return Answerer(*loaded, parse_arguments(["--model", "m", *flags], "generate"))


def start(loaded, *flags, system=None, raw=False):
    answerer = answerer_of(loaded, "--max-new-tokens", "6", *flags)
    history = ChatHistory(answerer.tokenizer, 512, 6, system)
    return chat.Chat(answerer, history, (WITH_ADAPTER,), raw)


def typed(monkeypatch, *lines):
    """Type lines into a chat; an exception stands for a key such as Ctrl-D, which comes last."""
    keys = iter([*lines, EOFError()])

    def next_line(mark):
        line = next(keys)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(chat, "is_terminal", lambda stream: True)
    monkeypatch.setattr(builtins, "input", next_line)


def expected_answer(loaded, *messages, adapter=True):
    """Return the greedy answer to messages of (role, content)."""
    model, tokenizer = loaded
    chat_form = [{"role": role, "content": content} for role, content in messages]
    ids = tokenizer.apply_chat_template(chat_form, add_generation_prompt=True)
    if adapter:
        (answer,) = model.generate([ids], max_new_tokens=6)
    else:
        with model.disable_adapter():
            (answer,) = model.generate([ids], max_new_tokens=6)
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_a_chat_answers_each_question_behind_the_conversation(loaded, monkeypatch, capsys):
    typed(monkeypatch, "Hello", "", '"""And', 'now?"""', "/reset", "Hello", "//x", "/exit", "no")
    talk = start(loaded, system="Be brief.")
    talk.run()
    system, hello = ("system", "Be brief."), ("user", "Hello")
    first = expected_answer(loaded, system, hello)
    turns = (system, hello, ("assistant", first))
    second = expected_answer(loaded, *turns, ("user", "And\nnow?"))
    slash = expected_answer(loaded, *turns, ("user", "/x"))
    out = capsys.readouterr().out
    assert out == f"{first}\n{second}\n{first}\n{slash}\n"
    assert [turn.question for turn in talk.history.turns] == ["Hello", "/x"]


def test_commands_change_the_chat_and_wrong_ones_are_named(loaded, monkeypatch, capsys):
    lines = [
        "/help",
        "Hello",
        "/undo",
        "/undo",
        "/system Be kind.",
        "/sytem x",
        "/undo x",
        "/special",
    ]
    typed(monkeypatch, *lines)
    talk = start(loaded)
    talk.run()
    assert (talk.history.turns, talk.history.system) == ([], "Be kind.")
    lines = capsys.readouterr().err.splitlines()
    assert "and the adapter of m; /help lists" in " ".join(lines)
    errors = " ".join(" ".join(lines).split()).split("error: ")[1:]
    for error, beginning in zip(
        errors,
        (
            "the conversation is empty, so there is nothing to undo",
            "no command /sytem; /help lists them, and a question that begins with a / is written",
            "/undo takes no text, but x follows it",
            "/special: choose on or off",
        ),
        strict=True,
    ):
        assert error.startswith(beginning)
    assert all(any(line.startswith(name) for line in lines) for name in chat.HELP)


def test_both_sides_answer_and_the_adapter_goes_on(loaded, monkeypatch, capsys):
    typed(monkeypatch, "/adapter both", "Hello", "/adapter off", "And now?")
    talk = start(loaded)
    talk.run()
    hello = ("user", "Hello")
    ours, base = (expected_answer(loaded, hello, adapter=on) for on in (True, False))
    assert ours != base
    last = expected_answer(loaded, hello, ("assistant", ours), ("user", "And now?"), adapter=False)
    assert capsys.readouterr().out == f"[with the adapter]\n{ours}\n[base]\n{base}\n{last}\n"


def test_a_model_without_adapter_has_one_side(folder, monkeypatch, capsys):
    typed(monkeypatch, "/adapter both")
    start(FastLanguageModel.from_pretrained(folder, device="cpu")).run()
    assert "error: " in (error := capsys.readouterr().err) and "has no adapter, so" in error
    assert generate.main(["--model", str(folder), "--compare", "--prompt", "Hi"]) == 2
    assert "has no adapter to compare with its base" in capsys.readouterr().err


def test_special_tokens_appear_on_request_with_the_prompt(loaded, monkeypatch, capsys):
    model, tokenizer = loaded
    typed(monkeypatch, "/special on", "Hello")
    prompt = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    (answer,) = model.generate([ids], max_new_tokens=6, eos_token_ids=[])
    monkeypatch.setattr(model, "_ends", (answer[3],))  # so the fourth token ends the answer
    start(loaded).run()
    out, error = capsys.readouterr()
    assert out == tokenizer.decode(answer[: answer.index(answer[3]) + 1]) + "\n"
    assert tokenizer.decode(ids) in error


def interrupt(monkeypatch, tokenizer, presses):
    """Press Ctrl-C, once or more, when the second token of the first answer is decoded."""
    calls, decode = [], tokenizer.decode

    def decode_and_press(ids, *arguments, **options):
        calls.append(ids)
        if len(calls) == 2:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return decode(ids, *arguments, **options)

    monkeypatch.setattr(tokenizer, "decode", decode_and_press)


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(loaded, monkeypatch, capsys):
    typed(monkeypatch, "Hello", KeyboardInterrupt(), "And now?")
    talk = start(loaded)
    interrupt(monkeypatch, loaded[1], presses=1)
    talk.run()
    monkeypatch.undo()
    error = capsys.readouterr().err
    whole = expected_answer(loaded, ("user", "Hello"))
    first, second = talk.history.turns
    assert whole.startswith(first.answer) and first.answer != whole
    messages = (("user", "Hello"), ("assistant", first.answer), ("user", "And now?"))
    assert second.answer == expected_answer(loaded, *messages)
    assert "(stopped; its text so far stays" in error and "Ctrl-D or /exit ends" in error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_stops_at_once_and_the_model_still_answers(loaded, monkeypatch, capsys):
    typed(monkeypatch, "Hello", "Hello")
    talk = start(loaded)
    interrupt(monkeypatch, loaded[1], presses=2)
    talk.run()
    monkeypatch.undo()
    assert talk.history.turns == [Turn("Hello", expected_answer(loaded, ("user", "Hello")))]
    assert "(stopped; nothing is kept)" in capsys.readouterr().err


def test_a_stop_string_ends_an_answer_and_is_no_part_of_the_conversation(
    loaded, monkeypatch, capsys
):
    whole = expected_answer(loaded, ("user", "Hello"))
    stop = whole[len(whole) // 2 :][:2]
    typed(monkeypatch, "Hello")
    talk = start(loaded, "--stop-strings", stop, "never")
    talk.run()
    out, error = capsys.readouterr()
    out = out[:-1]
    assert "(cut" not in error and stop in out and whole.startswith(out) and out != whole
    assert talk.history.turns == [Turn("Hello", whole.partition(stop)[0])]


def test_the_oldest_turns_are_left_out_by_name_when_the_context_is_full(loaded, capsys):
    _, tokenizer = loaded
    history = ChatHistory(tokenizer, 120, 30, "Be brief.")
    history.turns = [Turn(f"{i} {'lamp ' * 8}", "Lisbon") for i in range(6)]
    dropped = history.make_room_("And now?")
    kept = [turn.question[0] for turn in history.turns]
    assert [turn.question[0] for turn in dropped] + kept == list("012345") and kept
    assert len(history.ids_of("And now?")) <= 90
    history.turns.insert(0, dropped[-1])
    assert len(history.ids_of("And now?")) > 90  # no turn was left out without need
    with pytest.raises(ValueError, match=r"the question takes .* shorten it"):
        history.make_room_("lamp " * 200)
    assert [turn.question[0] for turn in history.turns][1:] == kept
    assert "Be brief." in history.text_of("And now?")


def test_a_system_message_that_the_template_leaves_out_is_refused(loaded, monkeypatch):
    _, tokenizer = loaded
    talk = start(loaded)
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "_chat_template", template)
    monkeypatch.setitem(tokenizer.__dict__, "template", tokenizer._compiled(template, ()))
    talk.history.turns.append(Turn("a", "b"))
    with pytest.raises(ValueError, match="leaves out message 1, which is the system's"):
        talk._system("Be kind.")
    assert talk.history.system is None and talk.history.turns


def test_raw_lines_are_continued_without_history(loaded, monkeypatch, capsys):
    model, tokenizer = loaded
    typed(monkeypatch, "The order of", "/system x")
    start(loaded, "--stats", raw=True).run()
    (answer,) = model.generate([tokenizer.encode("The order of")], max_new_tokens=6)
    out, error = capsys.readouterr()
    assert out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
    assert "of 512 tokens of context" in error and "there is no system message" in error


@pytest.mark.parametrize(("limit", "line"), [(3, "the 3 tokens of"), (900, "fill the context")])
def test_a_line_says_that_a_limit_has_cut_an_answer(loaded, capsys, limit, line):
    prompt = (loaded[1].encode("Hi") * 512)[:508]
    answerer_of(loaded, "--max-new-tokens", str(limit)).show(prompt, (WITH_ADAPTER,))
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--show-special-tokens"]])
def test_no_line_calls_a_whole_answer_cut(loaded, monkeypatch, capsys, flags):
    model, tokenizer = loaded
    prompt = tokenizer.encode("Hi")
    ends = model.generate([prompt], max_new_tokens=3)[0][-1:]
    monkeypatch.setattr(type(model), "eos_token_ids", tuple(ends))
    answerer_of(loaded, "--max-new-tokens", "6", *flags).show(prompt, (WITH_ADAPTER,))
    assert "(cut" not in capsys.readouterr().err


def test_several_answers_to_a_prompt_are_numbered(folder, capsys):
    arguments = ["--model", str(folder), "--prompt", "Hi", "--max-new-tokens", "4", "--raw"]
    arguments += ["--device", "cpu", "--no-load-in-4bit", "--num-return-sequences", "2"]
    assert generate.main(arguments) == 2
    assert "at temperature 0 all answers" in capsys.readouterr().err
    assert generate.main([*arguments, "--temperature", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("[answer 1]\n") and "\n[answer 2]\n" in out

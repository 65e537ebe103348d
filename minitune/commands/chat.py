"""A chat in a terminal: questions and commands from the keyboard, answers as they are decoded.

    Ctrl-C    ends an answer, whose text so far stays in the conversation; clears a line
    Ctrl-D    ends the chat

An answer goes on stdout, all else on stderr. With an adapter and the base side by side, the answer
of the adapter continues the conversation. Without the chat template each line is a prompt of its
own.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence

from minitune.commands.answering import BASE, BOTH, WITH_ADAPTER, Answerer, Side
from minitune.commands.chat_history import ChatHistory, Turn
from minitune.progress import is_quiet, print_error, print_line, print_message, wrapped
from minitune.streams import is_terminal

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401 - gives input() a line editor and its history

QUOTES = '"""'
HELP = {
    "/reset": "forget the conversation; the system message stays",
    "/undo": "forget the last question and its answer",
    "/system TEXT": "set the system message, and forget the conversation; without TEXT none",
    "/adapter on|off|both": "answer with the adapter, without it, or both side by side",
    "/special on|off": "show special tokens, and the prompt as the model sees it",
    "/exit": "end the chat, as Ctrl-D does",
    QUOTES: "begins and ends a question of several lines",
    "//...": "a question that begins with a /",
}
SIDES = {"on": (WITH_ADAPTER,), "off": (BASE,), "both": BOTH}
CUT = 40  # characters of a question that a line quotes


class Chat:
    """A conversation with a model.

    raw: each question is a prompt of its own, without the chat template.
    """

    def __init__(self, answerer: Answerer, history: ChatHistory, sides: Sequence[Side], raw: bool):
        self.answerer, self.history, self.sides, self._raw = answerer, history, sides, raw
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/undo": self._undo,
            "/system": self._system,
            "/adapter": self._adapter,
            "/special": self._special,
        }

    def run(self) -> None:
        """Ask and answer until the user ends the chat."""
        name = self.answerer.model.name
        kind = "lines to continue, without the chat template" if self._raw else "chat"
        if (adapter := self.answerer.adapter_name) is not None:
            name = f"{name} and the adapter of {adapter}"
        print_line(wrapped(f"{kind} with {name}; /help lists the commands, Ctrl-D ends"))
        while True:
            try:
                text = read_question()
                if text in ("/exit", "/quit", "/bye"):
                    return
                if text:
                    self.take(text)
            except EOFError:
                print_line("")
                return
            except KeyboardInterrupt:
                print_line("\nCtrl-D or /exit ends the chat")

    def take(self, text: str) -> None:
        """Obey a command, or answer a question. An error is a line, and the chat goes on."""
        word, _, rest = text.partition(" ")
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._obey(word, rest.strip())
            else:
                self.ask(text.removeprefix("/") if text.startswith("//") else text)
        except ValueError as error:
            print_error(wrapped(f"error: {error}", len("error: ")))

    def ask(self, question: str) -> None:
        """Answer a question, and keep both in the conversation.

        Raises: ValueError if the question does not fit into the context; it is not kept then.
        """
        tokenizer = self.answerer.tokenizer
        if self._raw:
            text, prompt = question, tokenizer.encode(question)
            _check_fits(len(prompt), self.answerer.model.max_seq_length)
        else:
            for turn in self.history.make_room_(question):
                print_message("note", _dropped(turn))
            text, prompt = self.history.text_of(question), self.history.ids_of(question)
        if self.answerer.show_special:
            print_line(text, end="")
        try:
            answer, is_stopped = self.answerer.show(prompt, self.sides)
        except KeyboardInterrupt:  # the second one during this answer
            answer, is_stopped = "", True
        if is_stopped:
            kept = "its text so far stays in the conversation" if answer else "nothing is kept"
            print_line(f"(stopped{'' if self._raw else f'; {kept}'})")
        if answer or not is_stopped:
            self.history.turns.append(Turn(question, answer))

    # ---- commands

    def _obey(self, word: str, rest: str) -> None:
        """Obey a command.

        Raises: ValueError if it does not exist, or its argument is wrong.
        """
        if word not in self._commands:
            raise ValueError(
                f"no command {word}; /help lists them, and a question that begins with a / is "
                "written with two"
            )
        if rest and word not in ("/system", "/adapter", "/special"):
            raise ValueError(f"{word} takes no text, but {rest:.40} follows it")
        self._commands[word](rest)

    def _help(self, _: str) -> None:
        for name, text in HELP.items():
            print_line(wrapped(text, 22, f"{name:<21} "))

    def _reset(self, _: str) -> None:
        self.history.turns.clear()
        print_line("the conversation is empty")

    def _undo(self, _: str) -> None:
        if not self.history.turns:
            raise ValueError("the conversation is empty, so there is nothing to undo")
        print_line(f"forgotten: {_quoted(self.history.turns.pop().question)}")

    def _system(self, text: str) -> None:
        if self._raw:
            raise ValueError("without the chat template there is no system message")
        before, self.history.system = self.history.system, text or None
        turns, self.history.turns = self.history.turns, []
        try:
            self.history.text_of("?")  # a template may refuse or leave out the message
        except ValueError:
            self.history.system, self.history.turns = before, turns
            raise
        print_line(f"{'system message set' if text else 'no system message'}; the conversation is "
                   "empty")  # fmt: skip

    def _adapter(self, which: str) -> None:
        if which not in SIDES:
            raise ValueError(f"{f'/adapter {which}'.strip()}: choose on, off or both")
        self.answerer.check_side((BASE,))
        self.sides = SIDES[which]
        more = "; the answer with the adapter continues the conversation"
        print_line(f"adapter {which}{more if which == 'both' and not self._raw else ''}")

    def _special(self, which: str) -> None:
        if which not in ("on", "off"):
            raise ValueError(f"{f'/special {which}'.strip()}: choose on or off")
        self.answerer.show_special = which == "on"
        print_line(f"special tokens {'shown' if which == 'on' else 'hidden'}")


def read_question() -> str:
    """Return the next question or command from the terminal, without spaces at its ends.

    Raises: EOFError if the user ends the input; KeyboardInterrupt for Ctrl-C.
    """
    text = _read_line("> ").strip()
    if not text.startswith(QUOTES):
        return text
    lines = [text.removeprefix(QUOTES)]
    while QUOTES not in lines[-1]:
        lines.append(_read_line(". "))
    lines[-1] = lines[-1].partition(QUOTES)[0]
    return "\n".join(lines).strip()


def _read_line(mark: str) -> str:
    """Return a line from the terminal.

    mark: stands before the line, unless the package is quiet.
    """
    if is_terminal(sys.stdout) and not is_quiet():
        return input(mark)
    if not is_quiet():
        print_line(mark, end="")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _check_fits(length: int, context: int) -> None:
    """Raise ValueError if a prompt leaves no room for an answer."""
    if length >= context:
        raise ValueError(f"the text takes {length:,} tokens, but the context is {context:,}")


def _dropped(turn: Turn) -> str:
    return (
        f"the conversation is too long for the context: the question {_quoted(turn.question)} and "
        "its answer are left out from here on"
    )


def _quoted(text: str) -> str:
    """Return the beginning of a text on one line, in quotes."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= CUT else f"{line[: CUT - 3]}..."}"'

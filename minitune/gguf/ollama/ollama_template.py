"""Ollama's template of a model: its chat template as text for Go's text/template, in three forms.

    ChatML    <|im_start|>ROLE\\nTEXT<|im_end|>\\n
    Llama 3   <|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>
    Mistral   [INST]TEXT[/INST]ANSWER</s>, with white space that depends on the version

Ollama gives a template these variables:

- `.Messages`: the conversation, each message with `.Role` and `.Content`. Ollama joins neighbours
  of one role with an empty line.
- `.System`: the system message, which is in `.Messages` too. If a conversation has none, Ollama
  puts the SYSTEM text of the Modelfile in front.

A Go template cannot change a content, so white space around a content stays; many chat templates
trim it. Ollama's tokenizer adds the BOS, as llama.cpp does, so the template leaves the BOS out.

The form is found by rendering: marked messages show how the chat template writes system messages
and white space. Then the Go template is rendered too, and both must give the same text for several
conversations.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from minitune.data.templates.chat_template import ChatTemplate
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.ollama.go_template import render_go_template

SYSTEM, QUESTION, ANSWER, NEXT = "Rules of the system.", "A question?", "An answer.", "Another one?"
LONG = 'Two lines,\nand a "quoted" word:\n\n- {braces} & <angles>, 100 %.'
THOUGHT = "<think>\nA thought.\n</think>\n\n"  # of reasoning models, before an answer
DAYS = "2001-02-03", "2004-05-06"
SHOWN = 60  # characters of a text in an error

Message = dict[str, str]
Render = Callable[[list[Message]], str]


@dataclass(frozen=True)
class OllamaTemplate:
    """The template of a Modelfile.

    form: its name, such as "ChatML".
    text: the Go template.
    system: the system text that the chat template adds to a conversation without one, or "".
    stops: the texts at which an answer ends.
    notes: facts that the user should know.
    """

    form: str
    text: str
    system: str
    stops: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Draft:
    """A template before it is compared: the fields of OllamaTemplate.

    lead: the text before the first message, such as the BOS.
    takes_system: False if the chat template refuses system messages.
    """

    form: str
    lead: str
    body: str
    stops: tuple[str, ...]
    system: str = ""
    takes_system: bool = True


def ollama_template(tokenizer: Tokenizer, adds_bos: bool) -> OllamaTemplate:
    """Return the Go template of a tokenizer's chat template.

    adds_bos: True if llama.cpp adds the BOS to a prompt.

    Raises: ValueError with the reason if the chat template has none of the three forms, or none
        that a Go template can express.
    """
    template = tokenizer.template

    def render(messages: list[Message]) -> str:
        return template.render(messages, add_generation_prompt=True)

    draft = _draft(render, tokenizer.eos_token)
    bos = "" if tokenizer.bos_token_id is None else tokenizer.id_to_token(tokenizer.bos_token_id)
    if draft.lead not in ("", bos):
        raise ValueError(
            f"Ollama: the chat template writes {_shown(draft.lead)} before the first message; "
            f"expected nothing or the BOS {bos!r}"
        )
    text = draft.body if adds_bos else draft.lead + draft.body
    if text.count("{{") != text.count("}}") or "{{" in draft.lead:
        raise ValueError("Ollama: the chat template writes braces that a Go template reads")
    _compare(render, draft, text)
    ends = (tokenizer.id_to_token(index) for index in tokenizer.eos_token_ids)
    stops = tuple(dict.fromkeys((*draft.stops, *ends)))
    notes = _notes(template, render, draft)
    if adds_bos and not draft.lead:
        notes += (f"Ollama puts {bos} before the prompt, and the chat template does not",)
    return OllamaTemplate(draft.form, text, draft.system, stops, notes)


def ollama_text(template: str, messages: list[Message], system: str) -> str:
    """Return the prompt that Ollama makes of a conversation, without the BOS that it adds.

    system: the SYSTEM text of the Modelfile.
    """
    if system and messages[0]["role"] != "system":
        messages = [_message("system", system), *messages]
    texts = [message["content"] for message in messages if message["role"] == "system"]
    fields = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return render_go_template(template, {"System": "\n\n".join(texts), "Messages": fields})


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _conversation(*contents: str, system: str | None = None) -> list[Message]:
    """Return a conversation of questions and answers in turn, with a system message if given."""
    roles = ("user", "assistant")
    messages = [_message(roles[i % 2], content) for i, content in enumerate(contents)]
    return messages if system is None else [_message("system", system), *messages]


def _render_with_system(render: Render, *contents: str) -> str | None:
    """Return a conversation with a system message as text, or None if it is refused."""
    try:
        return render(_conversation(*contents, system=SYSTEM))
    except ValueError:
        return None


def _shown(text: str) -> str:
    """Return a text in quotes, without its middle if it is long."""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")


# ---- the forms


@dataclass(frozen=True)
class _Blocks:
    """A form that writes every message as opening + role + close + content + end."""

    form: str
    opening: str
    close: str
    end: str

    def begin(self, role: str) -> str:
        """Return the text before a content."""
        return self.opening + role + self.close


CHATML = _Blocks("ChatML", "<|im_start|>", "\n", "<|im_end|>\n")
LLAMA3 = _Blocks("Llama 3", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")


def _draft(render: Render, eos: str | None) -> _Draft:
    """Return the template in the form that the chat template has.

    Raises: ValueError if it has none of the forms.
    """
    text = render(_conversation(QUESTION))
    for blocks in (CHATML, LLAMA3):
        if blocks.begin("user") + QUESTION in text:
            return _block_draft(render, blocks)
    if "[INST]" in text:
        return _mistral_draft(render, eos or "")
    raise ValueError(
        "Ollama: the chat template has none of the forms ChatML, Llama 3 and Mistral; "
        f"it writes a question as {_shown(text)}"
    )


def _block_draft(render: Render, blocks: _Blocks) -> _Draft:
    """Return the template of a form of blocks."""
    text, with_system = render(_conversation(QUESTION)), _render_with_system(render, QUESTION)
    lead = text.partition(blocks.opening)[0]
    prompt = blocks.begin("user") + QUESTION + blocks.end + blocks.begin("assistant")
    for rendered in filter(None, (text, with_system)):
        if not rendered.endswith(prompt):
            question = blocks.begin("user") + QUESTION
            behind = rendered.partition(question)[2]
            raise _differs(blocks.form, behind, prompt.removeprefix(question))
    default = _system_content(blocks, text.removesuffix(prompt)[len(lead) :])
    message = blocks.begin("{{ .Role }}") + "{{ .Content }}" + blocks.end
    unless_system = f'{{{{ if ne .Role "system" }}}}{message}{{{{ end }}}}'
    stops = tuple(mark.strip() for mark in (blocks.opening, blocks.close, blocks.end))

    def draft(system_block: str, each: str, system: str = "", takes_system: bool = True) -> _Draft:
        loop = f"{{{{ range .Messages }}}}{each}{{{{ end }}}}"
        body = system_block + loop + blocks.begin("assistant")
        used = tuple(filter(None, stops))
        return _Draft(blocks.form, lead, body, used, system, takes_system)

    if with_system is None:
        block = "" if default is None else blocks.begin("system") + default + blocks.end
        return draft(block, unless_system, takes_system=False)
    written = _system_content(blocks, with_system.removesuffix(prompt)[len(lead) :])
    before, found, after = (written or "").partition(SYSTEM)
    if not found:
        raise ValueError(
            f"Ollama: the chat template writes a system message as {_shown(with_system)}, "
            f"which the form {blocks.form} does not"
        )
    block = blocks.begin("system") + before + "{{ .System }}" + after + blocks.end
    if default == before + after:
        return draft(block, unless_system)
    system = _without_frame(default, before, after)
    if not before + after:
        return draft("", message, system)
    return draft(f"{{{{ if .System }}}}{block}{{{{ end }}}}", unless_system, system)


def _system_content(blocks: _Blocks, block: str) -> str | None:
    """Return the content of a system message's block, or None if there is no block."""
    if not block:
        return None
    begin = blocks.begin("system")
    if not (block.startswith(begin) and block.endswith(blocks.end)):
        raise _differs(blocks.form, block, begin)
    return block.removeprefix(begin).removesuffix(blocks.end)


def _without_frame(default: str | None, before: str, after: str) -> str:
    """Return the default system text of a content that has fixed texts around it."""
    if default is None:
        return ""
    if not (default.startswith(before) and default.endswith(after)):
        raise ValueError(
            f"Ollama: without a system message the chat template writes {_shown(default)}, which "
            "no system text gives"
        )
    return default.removeprefix(before).removesuffix(after)


def _mistral_draft(render: Render, eos: str) -> _Draft:
    """Return the template of the form of Mistral."""
    contents = (QUESTION, ANSWER, NEXT)
    text, with_system = render(_conversation(*contents)), _render_with_system(render, *contents)
    question, answer, following = map(re.escape, contents)
    turns = re.compile(
        rf"\[INST\](\s*){question}(\s*)\[/INST\](\s*){answer}(\s*{re.escape(eos)}\s*)"
        rf"\[INST\]\1{following}\2\[/INST\]"
    )
    match = turns.search(text)
    if match is None or match.end() != len(text):
        raise _differs("Mistral", text, f"[INST]{QUESTION}[/INST]{ANSWER}{eos}[INST]{NEXT}[/INST]")
    before, after, gap, end = match.groups()
    lead, mark, default = text[: match.start()].partition("[SYSTEM_PROMPT]")
    begin, close = f"[INST]{before}", f"{after}[/INST]"
    insert, block, system, head = "", "", "", "{{ range .Messages }}"
    if with_system is not None and "[SYSTEM_PROMPT]" in with_system:
        frame = with_system.removesuffix(text[match.start() :])[len(lead) :].split(SYSTEM)
        if len(frame) != 2:
            raise _differs("Mistral", with_system, f"[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT]")
        system = _without_frame(mark + default if mark else None, *frame)
        block = "{{ if .System }}" + frame[0] + "{{ .System }}" + frame[1] + "{{ end }}"
    elif with_system is not None:
        found = re.search(
            rf"\[INST\]\s*{re.escape(SYSTEM)}(.+?)({question}|{following})", with_system, re.DOTALL
        )
        if found is None or mark:
            raise _differs("Mistral", with_system, f"{begin}{SYSTEM}\n\n{QUESTION}{close}")
        if found[2] == QUESTION:
            block = "{{ $system := .System }}"
            insert = "{{ if $system }}{{ $system }}" + found[1] + '{{ $system = "" }}{{ end }}'
        else:
            head = "{{ range $i, $_ := .Messages }}"
            last = "(eq (len (slice $.Messages $i)) 1)"
            insert = "{{ if and $.System " + last + " }}{{ $.System }}" + found[1] + "{{ end }}"
    body = (
        f'{block}{head}{{{{ if eq .Role "user" }}}}{begin}{insert}{{{{ .Content }}}}{close}'
        f'{{{{ else if eq .Role "assistant" }}}}{gap}{{{{ .Content }}}}{end}'
        "{{ end }}{{ end }}"
    )
    return _Draft("Mistral", lead, body, ("[INST]", "[/INST]"), system, with_system is not None)


def _differs(form: str, text: str, expected: str) -> ValueError:
    return ValueError(
        f"Ollama: the chat template writes {_shown(text)}, but the form {form} has "
        f"{_shown(expected)} there"
    )


# ---- comparison


def _compare(render: Render, draft: _Draft, text: str) -> None:
    """Raise ValueError if chat template and Go template differ on one of several conversations."""
    lead = draft.lead if not text.startswith(draft.lead) else ""  # Ollama adds the BOS
    contents = (QUESTION, ANSWER, LONG, LONG, NEXT)
    for system in (None, SYSTEM, LONG)[: 3 if draft.takes_system else 1]:
        for count in (1, 3, 5):
            messages = _conversation(*contents[:count], system=system)
            expected = render(messages)
            found = lead + ollama_text(text, messages, draft.system)
            if found != expected:
                at = next(
                    (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                    min(len(found), len(expected)),
                )
                raise ValueError(
                    f"Ollama: the chat template writes {_shown(expected[at:])} in a conversation "
                    f"of {len(messages)} messages, but its form {draft.form} has "
                    f"{_shown(found[at:])} there"
                )


def _notes(template: ChatTemplate, render: Render, draft: _Draft) -> tuple[str, ...]:
    """Return notes about the texts that Ollama's template gives differently."""
    notes = []
    if not draft.takes_system:
        notes.append("the chat template takes no system message, so Ollama leaves it out")
    first, second = (
        template.on(day).render(_conversation(QUESTION), add_generation_prompt=True) for day in DAYS
    )
    if first != second:
        notes.append("the chat template writes the day; the Modelfile has today's for good")
    if THOUGHT not in render(_conversation(QUESTION, THOUGHT + ANSWER, NEXT)):
        notes.append(
            "the chat template leaves the reasoning of earlier answers out; Ollama repeats it"
        )
    return tuple(notes)

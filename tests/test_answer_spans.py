"""Answers are located in every structure of chat templates, and lost texts are named."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from chat_forms import (
    TOOLS,
    answer,
    calls,
    conversation_of,
    forms,
    in_transformers,
    random_calls,
    reason,
    user,
)
from prefix_rule import differing_spans, random_conversation
from referees.chat_templates import compare_with_prefix_rule, table, verdict
from template_kinds import CALLS, NAMES, TEMPLATES, stops_of

from minitune.data.samples import Conversation
from minitune.data.templates.chat_template import ChatTemplate, dropped_text_notes
from minitune.data.templates.jinja_template import JinjaTemplate
from minitune.data.templates.messages import normal_message

PUBLISHED = os.environ.get("CHAT_TEMPLATES")  # the folder models/templates of llama.cpp's source


def template_of(kind: str) -> ChatTemplate:
    """Return the compiled template of a kind."""
    return ChatTemplate(TEMPLATES[kind], NAMES, stops_of(kind), ("<|end|>",))


def rendered_spans(kind: str, *messages: dict, trained=None, tools=None):
    """Return the rendering of messages, and the texts of its spans."""
    normal = [normal_message(message, i) for i, message in enumerate(messages, 1)]
    trained = trained or tuple(message["role"] == "assistant" for message in messages)
    rendered = template_of(kind).render_with_answers(Conversation(normal, tools, {}, trained))
    return rendered, [rendered.text[begin:end] for begin, end in rendered.spans]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_eighteen_forms_render_as_in_transformers_with_every_answer_located(kind):
    template, stops = template_of(kind), stops_of(kind)
    for name, form in forms(stops[0]).items():
        letter = verdict(template, TEMPLATES[kind], form, (*stops, "<|end|>", "</s>"))
        assert letter in ("=", "d", "s"), f"{name}: {letter}"


EXPECTED = {
    "keeps everything": ["A<|end|>", "B<|end|>"],
    "cuts the reasoning of history": ["A<|end|>", "<think>\n\n</think>\n\nB<|end|>"],
    "asks for reasoning in the prompt": ["A<|end|>", "B<|end|>"],
    "ends the text with the EOS": ["A<|end|>", "B<|end|>"],
    "ends earlier answers in another token": [
        "<|channel|>final<|message|>A<|end|>",
        "<|channel|>final<|message|>B<|return|>",
    ],
    "writes the stop token with the next turn": ["A<|stop|>", "B<|stop|>"],
    "has the next role as its stop token": ["A<|user|>", "B<|user|>"],
    "puts an empty channel into the prompt": ["A<end_of_turn>", "B<end_of_turn>"],
    "writes tools before the last question": ["A</s>", "B</s>"],
    "marks answers": ["A<|end|>", "B<|end|>"],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_answer_begins_after_the_prompt_and_ends_with_its_stop_token(kind):
    def message(role, content):
        return {"role": role, "content": content}

    _, spans = rendered_spans(
        kind,
        message("user", "a"),
        message("assistant", "A"),
        message("user", "b"),
        message("assistant", "B"),
    )
    assert spans == EXPECTED[kind]


def test_a_stop_token_that_the_template_leaves_out_at_the_end_is_added_and_said():
    rendered, _ = rendered_spans("has the next role as its stop token", user(1), answer(1))
    assert rendered.text.endswith("seven of them.<|user|>")
    assert rendered.notes == ("the chat template ends without a stop token; <|user|> is added",)


def test_an_answer_that_ends_in_a_token_at_which_generation_goes_on_is_said():
    template = ChatTemplate(TEMPLATES["keeps everything"], NAMES, ("</s>",), ("<|end|>",))
    messages = [user(1), answer(1)]
    rendered = template.render_with_answers(Conversation(messages, None, {}, (False, True)))
    begin, end = rendered.spans[0]
    assert rendered.text[begin:end] == "Reply1, seven of them.<|end|>"
    assert rendered.notes == ("answers end in <|end|>, at which generation does not stop",)


def test_an_answer_may_hold_stop_tokens_and_equal_the_question():
    text = "<|end|>\n<|assistant|>\nsame<|end|>"
    same = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    for kind in ("keeps everything", "cuts the reasoning of history"):
        rendered, spans = rendered_spans(kind, *same, *same)
        assert [span.removeprefix("<think>\n\n</think>\n\n") for span in spans] == [
            f"{text}<|end|>"
        ] * 2
        assert rendered.dropped == ()


def test_each_text_that_a_template_leaves_out_is_named():
    conversation = conversation_of(forms("")["tools"])
    messages = [{"role": "system", "content": "Rule1"}, *conversation.messages]
    messages[2] |= {"reasoning_content": reason(2), "thinking": reason(2)}
    trained = (False, *conversation.trained)
    rendered = template_of("knows only contents").render_with_answers(
        Conversation(messages, TOOLS, {}, trained)
    )
    assert rendered.dropped == (
        "the tools",
        "the reasoning of message 3",
        "the tool calls of message 3",
    )
    lost = rendered.spans[0]
    assert lost[0] == lost[1], "an answer that is left out is not trained on as a mere stop token"
    nemo = template_of("writes tools before the last question")
    assert nemo.render_with_answers(
        Conversation(messages[:2] + messages[4:], None, {}, trained[:2] + trained[4:])
    ).dropped == ("the content of message 1 (system)",)


def test_a_text_that_occurs_twice_does_not_hide_that_one_of_them_is_left_out():
    twin = {"role": "assistant", "content": "<think>\nseven\n</think>\n\nseven"}
    rendered, _ = rendered_spans("asks for reasoning in the prompt", user(1), twin)
    assert rendered.dropped == ("the reasoning of message 2",)


def test_dropped_texts_are_refused_by_name_or_become_one_note_a_kind():
    dropped = ("the reasoning of message 2", "the reasoning of message 4", "the tools")
    with pytest.raises(ValueError, match=r"leaves out the reasoning of message 2, .*, the tools;"):
        dropped_text_notes(dropped, "error")
    assert dropped_text_notes(dropped, "warn") == (
        "the chat template leaves out the reasoning",
        "the chat template leaves out the tools",
    )


def test_split_turns_render_each_answer_as_inference_does():
    kind = "cuts the reasoning of history"
    template, conversation = template_of(kind), conversation_of(forms("")["<think>"])
    assert template.drops_history(conversation)
    parts = template.split_turns(conversation)
    for i, part in zip((1, 3), parts, strict=True):
        messages = conversation.messages[: i + 1]
        assert part.text == in_transformers(TEMPLATES[kind], messages, None, False, **NAMES)
        begin, end = part.spans[0]
        assert part.text[begin:end].startswith(f"<think>\nReason{(i + 1) // 2}:")
        assert (end, part.dropped) == (len(part.text) - 1, ())
    whole = template.render_with_answers(conversation)
    assert whole.dropped == ("the reasoning of message 2",)


@pytest.mark.parametrize("kind", ["keeps everything", "knows only contents"])
def test_history_is_whole_if_the_template_keeps_reasoning_or_never_knew_it(kind):
    assert not template_of(kind).drops_history(conversation_of(forms("")["reasoning"]))


def test_a_message_excluded_from_the_loss_has_no_span():
    turns = (user(1), answer(1), user(2), answer(2))
    for kind in ("keeps everything", "marks answers"):
        _, spans = rendered_spans(kind, *turns, trained=(False, False, False, True))
        assert spans == ["Reply2, seven of them.<|end|>"]


def test_a_completion_reaches_from_its_first_message_to_the_stop_token():
    conversation = conversation_of(forms("")["tools"])
    rendered = template_of("keeps everything").render_with_completion(conversation, 3)
    begin, end = rendered.spans[0]
    assert rendered.text[:begin].endswith("Result3: rain<|end|>\n<|assistant|>\n")
    assert rendered.text[begin:end].startswith("Reply2")
    assert rendered.text[end:] == "\n"


def test_random_hostile_conversations_have_the_spans_of_the_prefix_rule():
    rng = random.Random(1)
    kinds = [kind for kind in TEMPLATES if kind != "marks answers"]
    templates = {
        kind: ChatTemplate(TEMPLATES[kind], NAMES, stops_of(kind)[:1], ("<|end|>",))
        for kind in kinds
    }
    compared = 0
    for _ in range(300):
        kind = rng.choice(kinds)
        stops = stops_of(kind)[:1]
        conversation = random_conversation(rng, stops)
        rendered = templates[kind].render_with_answers(conversation)
        shared, differing = differing_spans(templates[kind], conversation, rendered, stops)
        assert not differing, f"{kind}, {conversation.messages}"
        compared += shared
    assert compared > 300


@pytest.mark.parametrize("kind", TEMPLATES)
def test_random_calls_and_reasoning_are_located_and_what_is_lost_is_named(kind):
    rng = random.Random(3)
    template, stops = template_of(kind), stops_of(kind)
    for _ in range(25):
        form = random_calls(rng)
        letter = verdict(template, TEMPLATES[kind], form, (*stops, "<|end|>", "</s>"))
        assert letter in ("=", "d", "s"), f"{letter}: {form.messages}"


def test_a_result_inside_of_the_turn_that_calls_is_not_trained_on():
    turns = calls({"town": "Town2"})
    turns[1]["content"] = "Reply2 comes late"
    rendered, spans = rendered_spans("writes results inside the calling turn", *turns, tools=TOOLS)
    assert spans[0] == '<call>get_weather{"town": "Town2"}</call><result>'
    assert "the chat template writes an answer on behind a result; not trained there" in (
        rendered.notes
    )
    turns[1]["content"] = ""
    rendered, spans = rendered_spans("writes results inside the calling turn", *turns, tools=TOOLS)
    assert spans == [
        '<call>get_weather{"town": "Town2"}</call><result>',
        "Reply2, seven of them.<end>",
        "Reply3, seven of them.<end>",
    ]


def test_a_name_of_a_call_that_is_repeated_before_its_result_does_not_move_the_answer():
    repeats = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }}="
        "{% endif %}{{ m.content }}" + CALLS + "<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = ChatTemplate(repeats, {}, ("<|end|>",))
    conversation = conversation_of(forms("")["tools"])
    rendered = template.render_with_answers(conversation)
    begin, end = rendered.spans[0]
    assert rendered.text[begin:end].startswith("<call>get_weather{")
    assert rendered.text[begin:end].endswith("}</call><|end|>")


def test_a_long_chat_is_rendered_a_few_times_only(monkeypatch):
    renderings = []
    render = JinjaTemplate.render

    def counted(self, conversation, length, *rest):
        renderings.append(length)
        return render(self, conversation, length, *rest)

    monkeypatch.setattr(JinjaTemplate, "render", counted)
    turns = [message for n in range(100) for message in (user(n), answer(n))]
    for kind in ("keeps everything", "cuts the reasoning of history"):
        renderings.clear()
        _, spans = rendered_spans(kind, *turns)
        assert len(spans) == 100
        assert spans[57] == "Reply57, seven of them.<|end|>"
        assert len(renderings) < 10


def test_named_templates_serve_conversations_with_and_without_tools():
    named = {"default": "plain", "tool_use": "tools", "rag": "{% not read %}"}
    template = ChatTemplate(named, {})
    assert (template.render([user(1)]), template.render([user(1)], tools=TOOLS)) == (
        "plain",
        "tools",
    )
    with pytest.raises(ValueError, match="no chat template is named 'default'; the names are 'a'"):
        ChatTemplate({"a": "text"}, {})


def test_variables_of_a_record_reach_the_template_but_replace_none_of_the_trainers():
    template = ChatTemplate("{{ enable_thinking }}{{ messages[0].content }}", {})
    assert template.render([user(1)], enable_thinking=False).startswith("FalseAsk1")
    with pytest.raises(TypeError, match="the chat template reads no variable 'enable_thinkin'"):
        template.render([user(1)], enable_thinkin=False)
    conversation = Conversation([user(1)], None, {"messages": []}, (False,))
    with pytest.raises(ValueError, match="chat_template_kwargs cannot set 'messages'"):
        template.render_with_answers(conversation)


def test_the_day_of_a_template_can_be_fixed():
    template = ChatTemplate("{{ strftime_now('%d %B %Y, %H') }}", {})
    assert template.on("2024-02-29").render([]) == "29 February 2024, 00"
    assert template.on(None) is template


def test_a_template_that_renders_differently_each_time_is_refused():
    changing = "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}"
    template = ChatTemplate(changing, {}, ("</s>",))
    with pytest.raises(ValueError, match="depends on the length of its texts"):
        template.render_with_answers(Conversation([user(1), answer(1)], None, {}, (False, True)))


def test_a_message_that_is_nested_too_deeply_is_a_value_error():
    deep = "bottom"
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="message 1 is nested too deeply"):
        template_of("keeps everything").render([{**user(1), "extra": deep}])


def test_reasoning_in_parts_reaches_templates_of_both_forms():
    form = forms("")["thinking parts"]
    reads_parts = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'thinking' %}({{ part.thinking }})"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}|{% endfor %}"
    )
    assert ChatTemplate(reads_parts, {}).render(form.messages[:2]) == (
        "Ask1: how many chairs are left?|(Reason1: twelve less five.)Reply1, seven of them.|"
    )
    rendered, _ = rendered_spans("keeps everything", *form.messages)
    assert "<think>Reason2: twelve less five.</think>Reply2, seven of them." in rendered.text


def test_a_conversation_without_trained_messages_has_no_span_but_names_what_is_lost():
    conversation = replace(conversation_of(forms("")["tools"]), trained=(False,) * 6)
    rendered = template_of("knows only contents").render_with_answers(conversation)
    assert (rendered.spans, rendered.dropped) == ([], ("the tools", "the tool calls of message 2"))


@pytest.mark.slow
@pytest.mark.skipif(PUBLISHED is None, reason="CHAT_TEMPLATES names no folder of templates")
def test_published_templates_render_as_in_transformers_with_every_answer_located(capsys):
    verdicts = table(Path(PUBLISHED))
    wrong = [
        f"{name}, {form}: {letter}"
        for name, row in verdicts.items()
        for form, letter in row.items()
        if letter[0] in "XR"
    ]
    assert len(verdicts) >= 60
    assert not wrong
    compare_with_prefix_rule(Path(PUBLISHED), 300, seed=2)
    assert " 0 spans that differ" in capsys.readouterr().out

"""The end of an answer in a chat template, found by rendering a short conversation.

    <|im_start|>user\nA question?<|im_end|>\n<|im_start|>assistant\nAn answer.<|im_end|>\n
                                                                    behind it: <|im_end|>\n

A model that was trained on the template ends its answers so, whatever its files name as EOS.
"""

from collections.abc import Callable

ANSWER, NEXT_QUESTION = "An answer.", "And now?"
TURNS = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": ANSWER}]
SYSTEM = {"role": "system", "content": "Be brief."}  # some templates need one


def text_behind_answer(render: Callable[[list[dict]], str]) -> str:
    """Return the text that a chat template writes behind an answer, or "".

    A template that ends all answers except the last one shows the end before a further question.
    If only the opening of that question stands there, there is no end.

    render: returns a conversation as text; a ValueError refuses it.
    """
    for turns in (TURNS, [SYSTEM, *TURNS]):
        before, answer, behind = _rendered(render, turns).rpartition(ANSWER)
        if answer:
            break
    if behind.strip() or not answer:
        return behind
    longer = _rendered(render, [*turns, {"role": "user", "content": NEXT_QUESTION}])
    between = longer.rpartition(ANSWER)[2].partition(NEXT_QUESTION)[0].strip()
    opening = before.partition(TURNS[0]["content"])[0].strip()
    return "" if opening.endswith(between) else between


def _rendered(render: Callable[[list[dict]], str], messages: list[dict]) -> str:
    """Return a conversation as text, or "" if the template refuses it."""
    try:
        return render(messages)
    except ValueError:
        return ""

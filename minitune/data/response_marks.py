"""Labels of plain texts from two marks: one before each instruction, one before each answer.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n...
    ~~~~~~~~~~~~~~~~ instruction   ~~~~~~~~~~~~~~~~~~~~~ response

An answer is all text after a response mark, up to the next instruction mark or the end of the text.
Its stop token is in it, and so is white space before the next mark. A response mark inside an
answer belongs to the answer. This is Unsloth's meaning of train_on_responses_only. The marks are
searched for in the text and not among the tokens, so a token across the border of a mark belongs to
the answer.
"""

from collections.abc import Iterable

from minitune.data.samples import Span

SHOWN_CHARACTERS = 300  # of the text in an error


def response_spans(text: str, instruction_part: str, response_part: str) -> list[Span]:
    """Return the characters of the answers in a text, in order.

    instruction_part, response_part: the marks before each instruction and each answer.
    """
    spans, end = [], 0
    while (found := text.find(response_part, end)) >= 0:
        begin = found + len(response_part)
        end = text.find(instruction_part, begin)
        if end < 0:
            return [*spans, (begin, len(text))]
        spans.append((begin, end))
    return spans


def check_marks(texts: Iterable[str], instruction_part: str, response_part: str) -> None:
    """Check that each mark occurs in one of some texts.

    texts: samples, with their special tokens.

    Raises: ValueError that shows the first text, if a mark does not occur.
    """
    texts = list(texts)
    for name, mark in (("instruction_part", instruction_part), ("response_part", response_part)):
        if not mark:
            raise ValueError(f"{name} is empty; give the text before each of them")
        if not any(mark in text for text in texts):
            raise ValueError(
                f"{name} {mark!r} occurs in none of the first {len(texts)} samples; copy it from "
                f"the text that is trained on: {texts[0][:SHOWN_CHARACTERS]!r}"
            )

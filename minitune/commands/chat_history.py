"""The conversation of a chat, which has to fit into the model's context.

A prompt leaves room for an answer of max_new_tokens, at most half of the context. If the whole
conversation is longer, the oldest question is left out for good, with its answer, then the next
one; the system message stays. A single question that is too long is refused.
"""

from typing import NamedTuple

from minitune.data.records.prompt_records import render_prompt
from minitune.data.samples import Conversation
from minitune.data.tokenization.tokenizer import Tokenizer


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class ChatHistory:
    """The system message and the turns of a chat.

    context: the tokens that prompt and answer may take together.
    max_new_tokens: length of an answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: int, max_new_tokens: int, system: str | None = None
    ):
        self.tokenizer, self.system = tokenizer, system
        self.turns: list[Turn] = []
        self._context = context
        self._longest = context - min(max_new_tokens, context // 2)  # tokens of a prompt

    def text_of(self, question: str) -> str:
        """Return the conversation up to a question, as the model sees it.

        Raises: ValueError if the chat template refuses the conversation.
        """
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": question})
        return render_prompt(Conversation(messages), self.tokenizer)

    def ids_of(self, question: str) -> list[int]:
        """Return the token ids of `text_of`."""
        return self.tokenizer.encode(self.text_of(question), add_special_tokens=False)

    def make_room_(self, question: str) -> list[Turn]:
        """Leave out and return the oldest turns until a question fits.

        Raises: ValueError if it does not fit alone, or the chat template refuses it. All turns then
            stay.
        """
        kept, dropped = list(self.turns), []
        try:
            while (length := len(self.ids_of(question))) > self._longest and self.turns:
                dropped.append(self.turns.pop(0))
            if length >= self._context:
                raise ValueError(
                    f"the question takes {length:,} tokens with the chat template, but prompt and "
                    f"answer together may take {self._context:,}; shorten it, or start the chat "
                    "with minitune generate --max-seq-length N"
                )
        except ValueError:
            self.turns = kept
            raise
        return dropped

"""Conversations for the templates of Ollama, and a tokenizer that has a chat template alone."""

from minitune.data.templates.chat_template import ChatTemplate

BOS, EOS = "<s>", "</s>"
SYSTEM = {"role": "system", "content": "Answer in one sentence.\nBe kind."}
TEXTS = (
    "Where is the lamp?",
    "In the hall, beside the {{ door }}.",
    'Say "hello" in two lines:\n\n1. hel\n2. lo',
    "hel\nlo",
    "größer ≥ 3 & <b>bold</b>?",
    "Yes: 100 %.",
    "{% if x %}",
)


def chat(turns: int) -> list[dict]:
    """Return a conversation of questions and answers in turn, which ends with a question."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": TEXTS[i]} for i in range(turns)]


CONVERSATIONS = [[*system, *chat(turns)] for system in ([], [SYSTEM]) for turns in (1, 3, 5, 7)]


class TokenizerOfTemplate:
    """The part of a Tokenizer that the template for Ollama needs."""

    bos_token_id, eos_token_ids, eos_token = 1, (2,), EOS

    def __init__(self, source: str):
        self.template = ChatTemplate(source, {"bos_token": BOS, "eos_token": EOS})

    def id_to_token(self, index: int) -> str:
        return {1: BOS, 2: EOS}[index]


def refuses(tokenizer: TokenizerOfTemplate, messages: list[dict]) -> bool:
    """Return True if the chat template refuses a conversation."""
    try:
        tokenizer.template.render(messages, add_generation_prompt=True)
    except ValueError:
        return True
    return False


def with_default(messages: list[dict], system: str) -> list[dict]:
    """Return the messages that Ollama's template gets, with the SYSTEM text of the Modelfile."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]

"""Random records of every shape whose texts are sentinels: words that occur nowhere else.

    maker = RecordMaker(seed, faulty=True)
    record, sentinels = maker.record()

A sentinel knows the keys that lead to it, and if a trained span has to hold it.
"""

import json
import random
from dataclasses import dataclass

SHAPES = (
    "messages",
    "conversations",
    "prompt/completion",
    "texts",
    "instruction",
    "text",
    "input_ids",
)
UNKNOWN_KEYS = ("mesages", "sytem", "comment", "expected", "notes", "inputs", "chosen", "images")
HARMLESS_KEYS = ("id", "source", "category", "metadata", "model", "url")
SPEAKERS = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


@dataclass
class Sentinel:
    """A word of a record.

    path: the keys that lead to the word.
    trained: True if a trained span holds it, False if none does, None if that is open.
    """

    word: str
    path: tuple[str, ...]
    trained: bool | None = None


class RecordMaker:
    """A source of random records.

    faulty: True if some records hold a key that nothing reads, two shapes, or one fact twice.
    """

    def __init__(self, seed: int, faulty: bool):
        self.random = random.Random(seed)
        self.faulty = faulty
        self.sentinels: list[Sentinel] = []
        self.count = 0

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self.random.random() < probability

    def fault(self, probability: float) -> bool:
        """Return True with a probability, if records may be faulty."""
        return self.faulty and self.chance(probability)

    def word(self, *path: str, trained: bool | None = None) -> str:
        """Return a new sentinel at a path."""
        self.count += 1
        self.sentinels.append(Sentinel(f"zq{self.count}x", path, trained))
        return self.sentinels[-1].word

    def record(self) -> tuple[dict, list[Sentinel]]:
        """Return a record and its sentinels."""
        self.sentinels = []
        shape = self.random.choice(SHAPES)
        record = getattr(self, "_" + shape.replace("/", "_"))()
        for keys, is_added in ((UNKNOWN_KEYS, self.fault(0.08)), (HARMLESS_KEYS, self.chance(0.3))):
            if is_added:
                key = self.random.choice(keys)
                record[key] = self._value(key)
        if self.fault(0.05):
            second = self.random.choice(("text", "messages", "output", "label"))
            if second not in record:
                record[second] = self._value(second)
        items = list(record.items())
        self.random.shuffle(items)
        return dict(items), self.sentinels

    def _value(self, *path: str, depth: int = 2) -> object:
        """Return a text, or a list or an object that holds texts, nulls and numbers."""
        kind = self.random.randrange(5) if depth else 0
        if kind == 1:
            return [self._value(*path, depth=depth - 1) for _ in range(self.random.randrange(1, 3))]
        if kind == 2:
            names = ("city", "days", "when")[: self.random.randrange(1, 4)]
            return {name: self._value(*path, name, depth=depth - 1) for name in names} | {
                "none": None,
                "number": 3,
            }
        return self.word(*path)

    # ---- columns beside a conversation

    def _beside(self, record: dict) -> dict:
        """Return a record with some of the columns that belong to conversations."""
        if self.fault(0.15):
            record["system"] = self.word("system", trained=False)
        if self.chance(0.25):
            key = self.random.choice(("tools", "tools", "functions"))
            functions = [self._function(key) for _ in range(self.random.randrange(1, 3))]
            if key == "tools":
                functions = [{"type": "function", "function": item} for item in functions]
            record[key] = json.dumps(functions) if self.chance(0.5) else functions
        if self.chance(0.1):
            record["chat_template_kwargs"] = {"persona": self.word("chat_template_kwargs")}
        return record

    def _function(self, key: str) -> dict:
        city = {"type": "string", "description": self.word(key, "description", trained=False)}
        if self.chance(0.5):
            city["enum"] = [self.word(key, "enum", trained=False), None]
        return {
            "name": self.word(key, "name", trained=False),
            "description": self.word(key, "description", trained=False),
            "parameters": {"type": "object", "properties": {"city": city, "other": None}},
        }

    # ---- messages

    def _turns(self, key: str, trains: bool = True, begin: str = "") -> list[dict]:
        """Return messages in OpenAI's words.

        trains: True if the shape trains on the assistant's messages among them.
        """
        roles = [begin] if begin else []
        if not begin and self.chance(0.3):
            roles.append(self.random.choice(("system", "developer")))
        for _ in range(self.random.randrange(1, 4)):
            roles += ["user", "assistant"]
            if self.chance(0.2):
                roles += ["tool", "assistant"]
        messages = []
        for i, role in enumerate(roles):
            calls = i + 1 < len(roles) and roles[i + 1] == "tool"
            messages.append(self._message(key, role, calls, trains))
        return messages

    def _message(self, key: str, role: str, calls: bool, trains: bool) -> dict:
        excluded = role == "assistant" and self.chance(0.1)
        trained = role == "assistant" and trains and not excluded
        message = {"role": role, "content": self.word(key, "content", trained=trained)}
        if self.chance(0.15) and role != "tool":
            message["content"] = [{"type": "text", "text": message["content"], "image": None}]
            if self.fault(0.2):
                message["content"][0]["note"] = self.word(key, "content", "note")
        if excluded:
            message[self.random.choice(("weight", "train"))] = 0
        if role == "assistant" and self.chance(0.2):
            name = self.random.choice(("reasoning_content", "reasoning", "thinking"))
            message[name] = self.word(key, name, trained=trained)
        if calls:
            self._add_call(message, key, trained)
        if self.chance(0.3):
            message |= dict.fromkeys(("tool_calls", "name", "refusal"), None) | message
        if self.fault(0.03):
            name = self.random.choice(("name", "comment", "mood", "audio", "text"))
            message[name] = self.word(key, name)
        if self.chance(0.05):
            message["id"] = self.word(key, "id")
        return message

    def _add_call(self, message: dict, key: str, trained: bool) -> None:
        path = (key, "tool_calls")
        name = self.word(*path, "name", trained=trained)
        arguments = {"city": self.word(*path, "arguments", trained=trained), "days": None}
        if self.chance(0.3):
            arguments["more"] = {"list": [self.word(*path, "arguments", trained=trained)]}
        call = {"name": name, "arguments": arguments}
        if self.chance(0.5):
            call["arguments"] = json.dumps(arguments)
        if self.fault(0.05):
            call["why"] = self.word(*path, "why")
        if self.chance(0.2):
            message["function_call"] = call
        else:
            outer = {"id": self.word(*path, "id"), "type": "function", "function": call}
            message["tool_calls"] = [outer]
        if self.chance(0.5):
            kept = message.pop("content")
            word = kept[0]["text"] if isinstance(kept, list) else kept
            self.sentinels = [item for item in self.sentinels if item.word != word]
            if isinstance(kept, list) and "note" in kept[0]:
                self.sentinels = [s for s in self.sentinels if s.word != kept[0]["note"]]
            message["content"] = None

    # ---- shapes

    def _messages(self) -> dict:
        begin = "assistant" if self.chance(0.05) else ""
        return self._beside({"messages": self._turns("messages", begin=begin)})

    def _conversations(self) -> dict:
        turns = []
        for message in self._turns("conversations"):
            calls = message.pop("tool_calls", None)
            role = message.pop("role")
            turn = {"from": SPEAKERS.get(role, role), "value": message.pop("content"), **message}
            if calls and turn["value"] is None and "reasoning" not in str(list(message)):
                turn |= {"from": "function_call", "value": json.dumps(calls[0]["function"])}
                self.sentinels = [s for s in self.sentinels if s.word != calls[0]["id"]]
            elif calls:
                turn["tool_calls"] = calls
            turns.append(turn)
        return self._beside({"conversations": turns})

    def _prompt_completion(self) -> dict:
        prompt = self._turns("prompt", trains=False)
        prompt.append(self._message("prompt", "user", False, False))
        completion = [self._message("completion", "assistant", False, True)]
        return self._beside({"prompt": prompt, "completion": completion})

    def _texts(self) -> dict:
        prompt, completion = (
            self.word("prompt", trained=False),
            self.word("completion", trained=True),
        )
        record = {"prompt": prompt + " ", "completion": completion}
        return self._beside(record) if self.fault(0.1) else record

    def _instruction(self) -> dict:
        record = {
            "instruction": self.word("instruction", trained=False),
            "output": self.word("output", trained=True),
        }
        if self.chance(0.5):
            record["input"] = self.random.choice(("", None, self.word("input", trained=False)))
            if not record["input"]:
                self.sentinels.pop()
        if self.chance(0.3):
            asked, answered = (
                self.word("history", trained=False),
                self.word("history", trained=True),
            )
            record["history"] = [[asked, answered]]
        return self._beside(record)

    def _text(self) -> dict:
        record = {"text": self.word("text", trained=True)}
        return self._beside(record) if self.fault(0.05) else record

    def _input_ids(self) -> dict:
        return {"input_ids": [5, 6, 7], "labels": self.random.choice((None, [-100, 6, 7]))}

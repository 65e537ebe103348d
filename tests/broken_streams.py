"""Streams that are missing or fail, and a program that uses every public call."""

import functools
import io

from training_runs import RECORDS

from minitune import FastLanguageModel, SFTConfig, SFTTrainer, TextStreamer, get_chat_template


class Failing:
    """A stream like a window that was destroyed: it only has `write`, which raises."""

    def write(self, text):
        raise RuntimeError("the window was destroyed")


class Terminal(io.StringIO):
    """A terminal that keeps its text."""

    def isatty(self):
        return True


class FailingTerminal(Terminal):
    """A terminal that is gone."""

    def write(self, text):
        raise OSError(5, "Input/output error")


class DeletedTerminal(Terminal):
    """A terminal of which one attribute raises, like an object of Qt that was deleted."""

    def __init__(self, name):
        super().__init__()
        self._name = name

    def __getattribute__(self, name):
        if name == super().__getattribute__("_name"):
            raise RuntimeError("the object has been deleted")
        return super().__getattribute__(name)


class UnknownEncoding(Terminal):
    """A terminal whose encoding Python does not have."""

    encoding = "no-such-codec"


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def detached():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


BROKEN = {
    "none": lambda: None,
    "closed": closed,
    "detached": detached,
    "failing": Failing,
    "gone": FailingTerminal,
    "codec": UnknownEncoding,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
}
BROKEN |= {
    f"deleted {name}": functools.partial(DeletedTerminal, name)
    for name in ("closed", "isatty", "encoding", "fileno", "write", "flush")
}


def work(folder, output, verify=True):
    """Load, train, evaluate, answer, and save in every form."""
    model, tokenizer = FastLanguageModel.from_pretrained(folder, 128, device="cpu", progress=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    FastLanguageModel.get_peft_model(model, r=4)  # a warning
    tokenizer = get_chat_template(tokenizer, "chatml")
    args = SFTConfig(output / "run", max_steps=2, logging_steps=1, sample_prompts=("Grüße",))
    trainer = SFTTrainer(model, args, RECORDS, RECORDS[:2], tokenizer)
    trainer.train()
    trainer.evaluate()
    inputs = tokenizer("Grüße aus Köln", return_tensors="pt")
    streamer = TextStreamer(tokenizer)
    answer = model.generate(**inputs, max_new_tokens=2, streamer=streamer)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    model.print_trainable_parameters()
    model.save_pretrained(output / "adapter")
    model.save_pretrained_merged(output / "merged", tokenizer)
    model.save_pretrained_gguf(output / "gguf", tokenizer, progress=True, verify=verify)
    model.save_pretrained_gguf(output / "lora", tokenizer, save_method="lora")
    model.load_adapter(output / "adapter", tokenizer)

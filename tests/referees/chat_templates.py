"""Render eighteen conversations with published chat templates, and locate every answer in them.

    python tests/referees/chat_templates.py FOLDER [--random 5000] [--seed 0]

FOLDER holds the *.jinja files of llama.cpp's source package (models/templates). A row of the table
is a template, a column a form of tests/chat_forms.py:

    =  equal to transformers' rendering, every answer located with its stop token
    d  the same, and the template leaves out texts, all of them named
    s  the same, and the stop token is missing in the template, which is said
    r  refused by the template, in transformers too
    R  refused here only;  X  wrong

--random also compares the spans of random hostile conversations with the prefix rule's.
"""

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from chat_forms import (
    Form,
    conversation_of,
    fault_of_begin,
    fault_of_dropped,
    fault_of_spans,
    forms,
    in_transformers,
)

from minitune.data.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# The tokens at which the published models stop, by the beginning of the file's name.
STOPS = {
    "Apertus": "<|assistant_end|>",
    "Apriel": "<|end|>",
    "ByteDance": "<seed:eos>",
    "Cohere": "<|END_OF_TURN_TOKEN|>",
    "GLM": "<|endoftext|> <|user|> <|observation|>",
    "GigaChat": "<|message_sep|>",
    "Kimi-K3": "<|end_of_msg|>",
    "MiniMax-M1": "<end_of_sentence>",
    "MiniMax": "[e~[",
    "Mistral": "</s>",
    "NVIDIA-Nemotron-Nano": "<SPECIAL_12>",
    "Reka": "<sep>",
    "Spark": "<｜end▁of▁sentence｜>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "google-gemma-2": "<eos> <end_of_turn>",
    "google-gemma-4": "<eos> <turn|> <|tool_response>",
    "ibm": "<|end_of_text|>",
    "inclusionai": "<|role_end|>",
    "llama-cpp-deepseek": "<｜end▁of▁sentence｜>",
    "llama-cpp-rwkv": "</s>",
    "meetkai": "<|eot_id|> <|eom_id|>",
    "meta": "<|eot_id|> <|eom_id|> <|end_of_text|>",
    "microsoft": "<|endoftext|> <|end|>",
    "mistralai": "</s>",
    "muse": "<|eot|> <|eom|>",
    "openai": "<|return|> <|endoftext|> <|call|>",
    "poolside": "</assistant>",
    "tencent": "<｜hy_eos:opensource｜>",
    "unsloth-Apriel": "<|end|>",
    "unsloth-mistral": "</s>",
    "upstage": "<|end|>",
    "": "<|im_end|> <|endoftext|>",
}
NEEDS_OWN_VARIABLES = "fireworks-ai-llama-3-firefunction-v2"
CONTROL = re.compile(r"<[|｜][^<>|｜]+[|｜]>")


def stops_of(name: str) -> tuple[str, ...]:
    """Return the stop tokens of a published model."""
    return tuple(next(stops for start, stops in STOPS.items() if name.startswith(start)).split())


def verdict(template: ChatTemplate, source: str, form: Form, ends: tuple[str, ...]) -> str:
    """Return the letter of one form, and after a wrong one the fault."""
    ours, expected = [], []
    has_parts = any(isinstance(message["content"], list) for message in form.messages)
    reads_parts = has_parts and template.reads_thinking(form.tools)
    messages = form.messages if reads_parts else form.referee or form.messages
    for prompt in (False, True):
        try:
            ours.append(template.render(form.messages, prompt, form.tools))
        except ValueError as error:
            ours.append(str(error))
        try:
            expected.append(in_transformers(source, messages, form.tools, prompt, **SPECIAL))
        except Exception as error:  # templates raise errors of every kind
            expected.append(error)
    refused = [isinstance(item, Exception) for item in expected]
    if refused[0]:
        return "r" if ours[0].startswith("the chat template refuses") else "X rendered here only"
    pairs = zip(ours, expected, strict=True)
    if any(isinstance(item, str) and text != item for text, item in pairs):
        return "X another rendering"
    conversation = conversation_of(form)
    try:
        rendered = template.render_with_answers(conversation)
    except ValueError as error:
        return f"R {error}"
    fault = (
        fault_of_spans(conversation, rendered, ends)
        or fault_of_dropped(conversation, rendered)
        or fault_of_begin(template, conversation, rendered)
    )
    if fault:
        return f"X {fault}"
    if not rendered.text.startswith(expected[0]):
        return "X another text"
    if any("stop token" in note for note in rendered.notes):
        return "s"
    return "d" if rendered.dropped else "="


def table(folder: Path) -> dict[str, dict[str, str]]:
    """Return the verdict of each template and form."""
    verdicts = {}
    for path in sorted(folder.glob("*.jinja")):
        if path.stem == NEEDS_OWN_VARIABLES:
            continue
        source = path.read_text(encoding="utf-8")
        stops = stops_of(path.stem)
        control = tuple(dict.fromkeys(CONTROL.findall(source)))
        template = ChatTemplate(source, SPECIAL, stops, control)
        ends = (*stops, *control, "</s>")
        verdicts[path.stem] = {
            name: verdict(template, source, form, ends) for name, form in forms(stops[0]).items()
        }
    return verdicts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    verdicts = table(options.folder)
    names = list(forms(""))
    for number, name in enumerate(names, 1):
        print(f"{number:>3} {name}")
    print(f"{'':48}{' '.join(f'{number:>2}' for number in range(1, len(names) + 1))}")
    for template, row in verdicts.items():
        print(f"{template:48}{' '.join(f'{row[name][0]:>2}' for name in names)}")
    for template, row in verdicts.items():
        for name, letter in row.items():
            if letter[0] in "XR":
                print(f"{template}, {name}: {letter[2:]}")
    counts = Counter(letter[0] for row in verdicts.values() for letter in row.values())
    right = sum(all(letter[0] in "=dsr" for letter in row.values()) for row in verdicts.values())
    print(", ".join(f"{letter} {count}" for letter, count in counts.most_common()))
    print(f"{right} of {len(verdicts)} templates right, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

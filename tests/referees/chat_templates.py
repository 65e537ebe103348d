"""Render eighteen conversations with published chat templates, and locate every answer in them.

    python tests/referees/chat_templates.py FOLDER [--random 5000] [--seed 0]

FOLDER holds the *.jinja files of llama.cpp's source package (models/templates). A row of the table
is a template, a column a form of tests/chat_forms.py:

    =  equal to transformers' rendering, every answer located with its stop token
    d  the same, and the template leaves out texts, all of them named
    s  the same, and the stop token is missing in the template, which is said
    r  refused by the template, in transformers too
    R  refused here only;  X  wrong

--random compares the spans of random hostile conversations with the prefix rule's instead
(tests/prefix_rule.py), and judges a tenth as many random conversations with calls.
"""

import argparse
import random
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
    random_calls,
)
from prefix_rule import differing_spans, random_conversation

from minitune.data.templates.chat_template import ChatTemplate

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
    "upstage": "<|end|> <|calls|>",
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


def template_of(path: Path) -> tuple[ChatTemplate, str, tuple[str, ...], tuple[str, ...]]:
    """Return the template of a file, its text, its stop tokens, and all tokens that end answers."""
    source = path.read_text(encoding="utf-8")
    stops = stops_of(path.stem)
    control = tuple(dict.fromkeys(CONTROL.findall(source)))
    return ChatTemplate(source, SPECIAL, stops, control), source, stops, (*stops, *control, "</s>")


def published(folder: Path) -> list[Path]:
    """Return the files of the published templates, without one that needs further variables."""
    return [path for path in sorted(folder.glob("*.jinja")) if path.stem != NEEDS_OWN_VARIABLES]


def table(folder: Path) -> dict[str, dict[str, str]]:
    """Return the verdict of each template and form."""
    verdicts = {}
    for path in published(folder):
        template, source, stops, ends = template_of(path)
        verdicts[path.stem] = {
            name: verdict(template, source, form, ends) for name, form in forms(stops[0]).items()
        }
    return verdicts


def compare_with_prefix_rule(folder: Path, conversations: int, seed: int) -> None:
    """Print the spans of random hostile conversations that differ from the prefix rule's.

    conversations: number of conversations, each rendered with a template drawn at random.
    """
    rng = random.Random(seed)
    # The block of a marked answer is the template's own word, and Phi's text ends in two stop
    # tokens, of which only the first is ever generated.
    loaded = [template_of(path) for path in published(folder) if "Phi" not in path.stem]
    loaded = [item for item in loaded if not item[0].marks_answers()]
    counts = Counter()
    for _ in range(conversations):
        template, _, stops, _ = rng.choice(loaded)
        conversation = random_conversation(rng, stops)
        try:
            template.render(conversation.messages)
        except ValueError:
            counts["conversations refused by the template"] += 1
            continue
        try:
            rendered = template.render_with_answers(conversation)
        except ValueError as error:
            counts["conversations refused here"] += 1
            print(f"refused: {error}: {conversation.messages}")
            continue
        shared, differing = differing_spans(template, conversation, rendered, stops)
        counts["spans"] += len(rendered.spans)
        counts["spans that the prefix rule gives, too"] += shared
        counts["spans that differ"] += len(differing)
        for text in differing:
            print(f"{text}: {conversation.messages}")
    for _ in range(conversations // 10):
        template, source, stops, ends = rng.choice(loaded)
        form = random_calls(rng)
        letter = verdict(template, source, form, ends)
        counts[f"conversations with calls: {letter[0]}"] += 1
        if letter[0] in "XR":
            print(f"{letter}: {form.messages}")
    print(", ".join(f"{count} {name}" for name, count in counts.items()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=int, help="compare so many conversations, no table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.random:
        compare_with_prefix_rule(options.folder, options.random, options.seed)
        return
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

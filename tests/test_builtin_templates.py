"""Named chat templates render the text of their families."""

from pathlib import Path

import pytest
from chat_forms import in_transformers
from tokenizer_files import write_chat_tokenizer, write_json

import minitune
from minitune.data.templates.builtin_templates import ALPACA_SYSTEM, BUILTIN_TEMPLATES
from minitune.data.templates.chat_template import ChatTemplate
from minitune.data.templates.named_template import get_chat_template
from minitune.data.tokenization.tokenizer import Tokenizer

trl = pytest.importorskip("trl")
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "How many? "},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "\nAnd now?"},
    {"role": "assistant", "content": "Five é."},
]
TRL = {
    "llama-3": "llama3",
    "llama-3.1": "llama3_1",
    "qwen": "qwen2_5",
    "gemma": "gemma3",
    "phi": "phi3_5",
}
# As the model cards write them.
WRITTEN = {
    "chatml": "<|im_start|>user\nHow many? <|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n",
    "mistral": "<s>[INST] How many? [/INST] Four.</s>",
    "phi-4": "<|im_start|>user<|im_sep|>How many? <|im_end|>"
    "<|im_start|>assistant<|im_sep|>Four.<|im_end|>",
    "alpaca": f"<s>{ALPACA_SYSTEM}\n\n### Instruction:\nHow many? \n\n### Response:\nFour.</s>\n\n",
    "zephyr": "<|user|>\nHow many? </s>\n<|assistant|>\nFour.</s>\n",
}


@pytest.mark.parametrize("name", TRL)
def test_a_named_template_renders_as_the_published_one(name):
    published = Path(trl.__file__).parent / "chat_templates" / f"{TRL[name]}.jinja"
    source = published.read_text(encoding="utf-8")
    template = ChatTemplate(BUILTIN_TEMPLATES[name].source, NAMES)
    for messages in (TURNS, TURNS[:1], [SYSTEM, *TURNS]):
        for prompt in (False, True):
            expected = in_transformers(source, messages, None, prompt, **NAMES)
            assert template.render(messages, prompt) == expected


@pytest.mark.parametrize("name", WRITTEN)
def test_a_named_template_renders_the_text_of_its_model_card(name):
    template = ChatTemplate(BUILTIN_TEMPLATES[name].source, NAMES)
    assert template.render(TURNS[:2]) == WRITTEN[name]


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_conversation_with_its_answer(name):
    template = ChatTemplate(BUILTIN_TEMPLATES[name].source, NAMES)
    for messages in (TURNS, [SYSTEM, *TURNS]):
        whole = template.render(messages)
        assert whole.startswith(template.render(messages[:-1], add_generation_prompt=True))
        if messages[0] is SYSTEM:
            assert whole.count("Be brief.") == 1


def test_a_named_template_takes_effect_at_once_and_stops_at_its_end_of_turn(tmp_path):
    write_chat_tokenizer(tmp_path, None)
    write_json(tmp_path / "added_tokens.json", {"<|im_start|>": 295, "<|im_end|>": 296})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert minitune.get_chat_template(tokenizer, "chatml") is tokenizer
    assert tokenizer.apply_chat_template(TURNS[:2], tokenize=False) == WRITTEN["chatml"]
    assert 296 in tokenizer.eos_token_ids


def test_a_named_template_that_does_not_fit_is_refused(tmp_path):
    tokenizer = Tokenizer.from_folder(write_chat_tokenizer(tmp_path, None))
    with pytest.raises(ValueError, match="no chat template is named 'chat'; choose from chatml, "):
        get_chat_template(tokenizer, "chat")
    with pytest.raises(ValueError, match=r"the vocabulary lacks <\|im_start\|>, <\|im_end\|>, wh"):
        get_chat_template(tokenizer, "qwen")
    assert tokenizer.chat_template is None
    assert get_chat_template(tokenizer, "alpaca").chat_template.count("### Response:") == 2

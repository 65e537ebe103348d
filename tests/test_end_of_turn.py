"""Generation ends at the end of turn of the chat template, whatever token the files name."""

import json
import warnings

import pytest
import torch
from tiny import CHATML, make_tiny_model
from tokenizer_files import write_json_tokenizer

from minitune import FastLanguageModel, Tokenizer
from minitune.data.templates.end_of_turn import text_behind_answer

END = 2  # <|im_end|>, in which answers of CHATML end
STOP = "<|im_end|>"
SEPARATED = (  # ends every turn except the last one
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
)
OPENED = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"


def write_model(folder, template):
    """Write a model whose files name token 0 as EOS, in all places."""
    make_tiny_model(folder, dtype=torch.float32)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "eos_token_id": 0}))
    path = folder / "tokenizer_config.json"
    named = {"eos_token": "<|endoftext|>", "chat_template": template}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return folder


def load(folder):
    return FastLanguageModel.from_pretrained(folder, device="cpu", load_in_4bit=False)


def prompt_that_ends(model):
    """Return a prompt whose greedy answer holds END within it, and the answer up to there."""
    for token in range(3, 400):
        (answer,) = model.generate([[token, 7]], max_new_tokens=16, eos_token_ids=[])
        if END in answer[1:] and 0 not in answer[: answer.index(END)]:
            return [token, 7], answer[: answer.index(END)]
    raise AssertionError("no prompt ends")


def test_generation_stops_at_the_end_of_turn_and_a_warning_says_so(tmp_path):
    folder = write_model(tmp_path, CHATML)
    with pytest.warns(UserWarning, match=r"end in <\|im_end\|>, but the files name <\|endoftext"):
        model, tokenizer = load(folder)
    prompt, expected = prompt_that_ends(model)
    assert model.generate([prompt], max_new_tokens=16) == [expected]
    # the files' token alone lets the answer run on, as in programs that read these files only
    longer = model.generate([prompt], max_new_tokens=16, eos_token_ids=tokenizer.eos_token_id)[0]
    assert longer[: len(expected) + 1] == [*expected, END]


def test_generation_follows_a_template_that_is_set_after_loading(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # answers that end in the EOS token need no warning
        model, tokenizer = load(write_model(tmp_path, CHATML.replace(STOP, "<|endoftext|>")))
    prompt, expected = prompt_that_ends(model)
    longer = model.generate([prompt], max_new_tokens=16)[0]
    assert longer[: len(expected) + 1] == [*expected, END]
    tokenizer.chat_template = CHATML
    assert model.generate([prompt], max_new_tokens=16) == [expected]
    model.eos_token_ids = [0]  # an assigned value stays
    tokenizer.chat_template = CHATML
    assert model.generate([prompt], max_new_tokens=16) == [longer]


def test_an_end_of_turn_that_is_no_token_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"end in '\[/TURN\]', which is no token of the voc"):
        load(write_model(tmp_path, CHATML.replace(STOP, " [/TURN]")))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, STOP),
        (SEPARATED, STOP),
        (OPENED, ""),
        ("{{ raise_exception('a system message first') if messages[0].role != 'system' }}"
         + CHATML, STOP),
        ("{{ raise_exception('never') }}", ""),
    ],
)  # fmt: skip
def test_the_end_is_found_in_each_form_of_a_template(tmp_path, template, end):
    tokenizer = Tokenizer.from_folder(write_json_tokenizer(tmp_path))
    tokenizer.chat_template = template
    assert text_behind_answer(tokenizer.template.render).strip().startswith(end or "")
    assert bool(text_behind_answer(tokenizer.template.render)) == bool(end)

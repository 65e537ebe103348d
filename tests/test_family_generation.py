"""Greedy answers of each model family equal those of transformers, in batches and alone.

transformers reads each prompt and our answer in one pass without a cache. If its most likely token
is ours at each place, its greedy answer is ours too: each token follows from those before.
"""

import pytest
import torch
from family_configs import FAMILIES
from tiny import make_tiny_model
from tiny_families import make_tiny_family
from transformers_twin import hf_twin, load

NEW_TOKENS = 64
# The cache has pages of 64 tokens. One answer begins and ends in the first two pages, one crosses
# a border soon, and one prompt is longer than a page. Every answer passes the sliding windows.
PROMPT_LENGTHS = (3, 60, 90)
SMALLEST_LEAD = 1e-5  # of the most likely token, relative to the logits' standard deviation


def greedy(model, prompts):
    return model.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)


def transformers_choices(hf, prompt, answer):
    """Return transformers' most likely token at each place of the answer, and its least lead."""
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    best, tokens = logits.topk(2, dim=-1)
    return tokens[:, 0].tolist(), (best[:, 0] - best[:, 1]).min() / logits.std()


def shrink_embedding_(*tables):
    """Make embeddings small beside the output of layers: tied models then repeat no token."""
    with torch.no_grad():
        for table in tables:
            table.mul_(1 / 64)


@pytest.mark.parametrize("case", ["llama", *FAMILIES])
def test_greedy_answers_of_a_batch_equal_those_of_transformers(tmp_path, case):
    if case == "llama":
        folder = make_tiny_model(tmp_path / "m")
    else:
        folder = make_tiny_family(tmp_path / "m", case)
    model, _ = load(folder, load_in_4bit=False)
    hf = hf_twin(model, folder).eval()
    if model.config.tie_word_embeddings:
        shrink_embedding_(model.model.embed_tokens.weight, hf.get_input_embeddings().weight)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    answers = greedy(model, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, lead = transformers_choices(hf, prompt, answer)
        assert answer == expected
        assert lead > SMALLEST_LEAD  # so that rounding on another machine changes no token
    # A wrong mask or position would change a token, because the answers do not repeat one.
    assert len(set().union(*answers)) > 20

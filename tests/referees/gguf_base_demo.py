"""Serve a GGUF base with an adapter in llama.cpp, and compare its answers with ours.

    python scripts/demonstration/smollm2.py --gguf
    python scripts/train.py --demo --model models/SmolLM2-135M-Instruct.Q4_1.gguf
    python tests/referees/gguf_base_demo.py models/SmolLM2-135M-Instruct.Q4_1.gguf runs/demo

The questions are the held-out texts of the demonstration. Both sides choose the likeliest token.
model.generate computes in float32 on the CPU from the blocks of the file. llama.cpp runs two bases
with the adapter beside them:

    as trained    the file itself: llama.cpp rounds the inputs of quantised weights to 8 bits
    in float32    the same weights dequantised into a file of float32: nothing is rounded

For each different answer a line shows the first token that differs, and how much likelier each
engine finds its own token than the other's, in nats. The rounding explains a difference whose
margins are small and whose answer is equal in float32.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402
from demonstration import demo  # noqa: E402
from gguf_files import dequantised  # noqa: E402

from minitune import FastLanguageModel  # noqa: E402
from minitune.data.sources.sources import load_dataset  # noqa: E402
from minitune.gguf.lora_adapter import save_gguf_adapter  # noqa: E402
from minitune.language_model import LanguageModel  # noqa: E402
from referees.llama_cpp import LlamaCpp  # noqa: E402

TOKENS = 48  # of the longest answer
LIKELIEST = 40  # tokens that llama.cpp reports at a step


def main() -> None:
    """Print the counts of equal answers, and the different ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path, help="GGUF file that the adapter was trained on")
    parser.add_argument("adapter", type=Path, help="folder of the run or the adapter")
    parser.add_argument("--limit", type=int, help="number of held-out texts")
    options = parser.parse_args()
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.base,
        adapter=options.adapter,
        max_seq_length=512,
        dtype=torch.float32,
        device="cpu",
    )
    records = [record for _, record in load_dataset(demo.DATA / "heldout.jsonl")][: options.limit]
    prompts, expected = [], []
    for record in records:
        *messages, answer = record["messages"]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        expected.append(answer["content"])
    ends = tokenizer.eos_token_ids
    ours = model.generate(prompts, max_new_tokens=TOKENS, eos_token_ids=ends)
    texts = [text.strip() for text in tokenizer.batch_decode(ours, skip_special_tokens=True)]
    print(f"{'model.generate':<16}right {matches(texts, expected)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        adapter = save_gguf_adapter(model, Path(temporary) / "adapter.gguf", tokenizer)
        in_float32 = dequantised(options.base, Path(temporary) / "float32.gguf")
        for label, base in (("as trained", options.base), ("in float32", in_float32)):
            llama_cpp = LlamaCpp(base, adapter)
            answers = [llama_cpp.answer(ids, TOKENS).strip() for ids in prompts]
            equal, right = matches(answers, texts), matches(answers, expected)
            print(f"{label:<16}equal to ours {equal}; right {right}", flush=True)
            for row, (answer, text) in enumerate(zip(answers, texts, strict=True)):
                if answer != text:
                    print(f"  {row}: {answer}\n      not {text}")
                    line = difference(llama_cpp, model, prompts[row], ours[row])
                    print(f"      {line}", flush=True)


def difference(
    llama_cpp: LlamaCpp, model: LanguageModel, prompt: list[int], answer: list[int]
) -> str:
    """Return the first token of our answer that is not llama.cpp's likeliest, and both margins."""
    for place, token in enumerate(answer):
        ids = [*prompt, *answer[:place]]
        theirs = llama_cpp.likeliest(ids, LIKELIEST)
        other = max(theirs, key=theirs.__getitem__)
        if other == token:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        our_margin = (logits[token] - logits[other]).item()
        their_margin = theirs[other] - theirs.get(token, -torch.inf)
        return (
            f"token {place}: {other} instead of {token}; margin of ours {our_margin:.3f}, of "
            f"llama.cpp's {their_margin:.3f}; the engines differ by {our_margin + their_margin:.3f}"
        )
    return "every token of our answer is llama.cpp's likeliest too"


def matches(answers: list[str], expected: list[str]) -> str:
    """Return the number of equal answers and the number of all answers in words."""
    equal = sum(ours == theirs for ours, theirs in zip(answers, expected, strict=True))
    return f"{equal} of {len(answers)}"


if __name__ == "__main__":
    main()

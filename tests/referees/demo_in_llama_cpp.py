"""Ask llama.cpp the demonstration's held-out texts and count the answers that equal ours.

    python scripts/train.py --demo && python tests/referees/demo_in_llama_cpp.py

A GGUF file merged onto the NF4 base holds the trained model itself. One merged onto the original
weights differs from it by the error of the quantisation.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demonstration import demo
from demonstration.smollm2 import DEFAULT

from minitune import FastLanguageModel
from minitune.data.sources.sources import load_dataset
from referees.llama_cpp import LlamaCpp

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Print the counts of our answers and of llama.cpp's for two merge bases and two types."""
    model, tokenizer = FastLanguageModel.from_pretrained(ROOT / DEFAULT, max_seq_length=512)
    model.load_adapter(ROOT / demo.OUTPUT / "adapter")
    records = [record for _, record in load_dataset(demo.DATA / "heldout.jsonl")]
    prompts, expected = [], []
    for record in records:
        *messages, answer = record["messages"]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        expected.append(answer["content"])
    ours = demo.ask(model, tokenizer, records)
    print(f"{'model.generate':<18}{'':24}right {matches(ours, expected)}")
    for merge_base in ("nf4", "original"):
        for method in ("f16", "q8_0"):
            with tempfile.TemporaryDirectory() as folder:
                path = model.save_pretrained_gguf(folder, tokenizer, method, merge_base)
                llama = LlamaCpp(path)
                answers = [llama.answer(ids, 48).strip() for ids in prompts]
            equal, right = matches(answers, ours), matches(answers, expected)
            label = f"{merge_base} {method}"
            print(f"{label:<18}equal to ours {equal:<10}right {right}", flush=True)


def matches(answers: list[str], expected: list[str]) -> str:
    """Return the number of equal answers and the number of all answers in words."""
    equal = sum(ours == theirs for ours, theirs in zip(answers, expected, strict=True))
    return f"{equal} of {len(answers)}"


if __name__ == "__main__":
    main()

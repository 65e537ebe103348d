"""Ask llama.cpp the demonstration's held-out texts and count the answers that equal our own, letter for letter.

    python scripts/train.py --demo && python tests/referees/demo_in_llama_cpp.py

Merged onto the NF4 base, the GGUF holds the model that was trained; onto the original weights, a close relative.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from demonstration import demo  # noqa: E402
from demonstration.smollm2 import DEFAULT  # noqa: E402

from minitune import FastLanguageModel  # noqa: E402
from minitune.data.jsonl import load_dataset  # noqa: E402
from referees.llama_cpp import LlamaCpp  # noqa: E402


def main() -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(ROOT / DEFAULT, max_seq_length=512)
    model.load_adapter(ROOT / demo.OUTPUT / "adapter")
    records = [record for _, record in load_dataset(demo.DATA / "heldout.jsonl")]
    expected = [record["messages"][-1]["content"] for record in records]
    prompts = [
        tokenizer.apply_chat_template(r["messages"][:-1], add_generation_prompt=True)
        for r in records
    ]
    ours = demo.ask(model, tokenizer, records)
    print(f"{'model.generate':<18}{'':24}right {matches(ours, expected)}")
    for merge_base in ("nf4", "original"):
        for method in ("f16", "q8_0"):
            with tempfile.TemporaryDirectory() as folder:
                path = model.save_pretrained_gguf(folder, tokenizer, method, merge_base)
                llama = LlamaCpp(path)
                answers = [llama.answer(ids, 48).strip() for ids in prompts]
            equal, right = matches(answers, ours), matches(answers, expected)
            print(
                f"{merge_base + ' ' + method:<18}equal to ours {equal:<10}right {right}", flush=True
            )


def matches(a: list[str], b: list[str]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)}"


if __name__ == "__main__":
    main()

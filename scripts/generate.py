"""Talk to a model, with or without an adapter; the answer appears as it is decoded.

python scripts/generate.py --model DIR [--adapter runs/1/adapter] --prompt "What is the capital of France?"
python scripts/generate.py --model DIR --adapter runs/1/adapter         a line at a time, until an empty one
"""

import argparse
import sys
from collections.abc import Iterator

from minitune.api import FastLanguageModel
from minitune.data.tokenizer import Tokenizer
from minitune.model.causal_lm import CausalLM


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Generate text with a model, with or without an adapter."
    )
    parser.add_argument(
        "--model", required=True, help="model folder, or org/name in the local Hugging Face cache"
    )
    parser.add_argument("--adapter", help="folder of an adapter")
    parser.add_argument(
        "--prompt", help="what to answer; without it, lines are read from the terminal"
    )
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--max-seq-length", type=int, help="prompt and answer together, in tokens (default: 2048)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="length of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the fewest tokens with this probability"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from the likeliest tokens only; 0: all (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--no-load-in-4bit", action="store_true", help="keep the linears in 16 bit")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one"
    )
    arguments = parser.parse_args()
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            arguments.model,
            max_seq_length=arguments.max_seq_length,
            load_in_4bit=not arguments.no_load_in_4bit,
            device=arguments.device,
            progress=True,
        )
        if arguments.adapter:
            model.load_adapter(arguments.adapter)
        for text in [arguments.prompt] if arguments.prompt is not None else typed():
            answer(model, tokenizer, text, arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"generate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def typed() -> Iterator[str]:
    """Lines from the terminal until an empty one, or those of a pipe that are not empty."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (terminal and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def answer(model: CausalLM, tokenizer: Tokenizer, text: str, arguments: argparse.Namespace) -> None:
    """Decode the answer to one text onto stdout, token by token."""
    if arguments.raw:
        prompt = tokenizer.encode(text)
    else:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        messages = [*system, {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids: list[int] = []
    shown = ""

    def show(_: int, token: int) -> None:
        nonlocal shown
        ids.append(token)
        decoded = tokenizer.decode(ids)
        if not decoded.endswith("\ufffd"):  # a character whose other bytes are still to come
            print(decoded[len(shown) :], end="", flush=True)
            shown = decoded

    model.generate(
        [prompt],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        on_token=show,
    )
    print(tokenizer.decode(ids)[len(shown) :])


if __name__ == "__main__":
    sys.exit(main())

"""Run `minitune generate` from a checkout: chat with a model, or answer prompts.

    python scripts/generate.py --model DIR [--adapter runs/1/adapter]
    python scripts/generate.py --model DIR --prompt "..."
    python scripts/generate.py --model DIR --input prompts.jsonl --output answers.jsonl

The package is found in the checkout and needs no installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minitune.commands.generate import main

if __name__ == "__main__":
    sys.exit(main(program="generate.py"))

"""Run `minitune generate` from a checkout: generate text with a model.

python scripts/generate.py --model DIR [--adapter runs/1/adapter] --prompt "..."
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, without installation

from minitune.commands.generate import main

if __name__ == "__main__":
    sys.exit(main(program="generate.py"))

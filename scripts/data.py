"""Run `minitune data` from a checkout: show the trained-on tokens of a dataset and its numbers.

    python scripts/data.py show --model DIR --data FILE [--n 5] [--html FILE]

The package is found in the checkout and needs no installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minitune.commands.data import main

if __name__ == "__main__":
    sys.exit(main(program="data.py"))

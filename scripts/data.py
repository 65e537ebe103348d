"""Run `minitune data` from a checkout: count a dataset's tokens and show the trained-on ones.

    python scripts/data.py --model DIR --data FILE [--show 3]

The package is found in the checkout and needs no installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minitune.commands.data import main

if __name__ == "__main__":
    sys.exit(main(program="data.py"))

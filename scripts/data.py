"""Run `minitune data` from a checkout: count a dataset's tokens and show the trained-on ones.

python scripts/data.py --model DIR --data FILE [--show 3]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, without installation

from minitune.commands.data import main

if __name__ == "__main__":
    sys.exit(main(program="data.py"))

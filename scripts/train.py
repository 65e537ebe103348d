"""Run `minitune train` from a checkout, and the demonstration with --demo.

    python scripts/train.py --model DIR --data FILE --output-dir DIR
    python scripts/train.py --demo    fetch a small model and train it on a shipped task

The package is found in the checkout and needs no installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demonstration import demo

from minitune.commands.train import Demonstration, main

if __name__ == "__main__":
    demonstration = Demonstration(demo.DEFAULTS, demo.run)
    sys.exit(main(program="train.py", demonstration=demonstration))

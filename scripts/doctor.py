"""Run `minitune doctor` from a checkout: check this machine and a model.

    python scripts/doctor.py [--model DIR|FILE.gguf|runs/1] [--json]

The package is found in the checkout and needs no installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minitune.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main(program="doctor.py"))

"""Run `minitune report` from a checkout: write the report of a run, or of two, as a page.

    python scripts/report.py runs/1 [runs/2] [--output FILE]

The package is found in the checkout and needs no installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minitune.commands.report import main

if __name__ == "__main__":
    sys.exit(main(program="report.py"))

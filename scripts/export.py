"""Run `minitune export` from a checkout: write a trained model as GGUF or merged safetensors.

    python scripts/export.py --model DIR --adapter runs/1/adapter --output model.gguf

The package is found in the checkout and needs no installation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minitune.commands.export import main

if __name__ == "__main__":
    sys.exit(main(program="export.py"))

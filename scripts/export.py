"""Write a trained model as GGUF for llama.cpp, as a merged folder for any other library, or both.

    python scripts/export.py --model DIR --adapter runs/1/adapter --output model.gguf
    python scripts/export.py --model DIR --adapter runs/1/adapter --merged merged/
    python scripts/export.py --model merged/ --output model.gguf --quantization-method f16

Without --adapter the model itself is written.
"""

import argparse
import sys
from pathlib import Path

from minitune.api import FastLanguageModel
from minitune.checkpoints.merge import MERGE_BASES, merge_to_folder
from minitune.checkpoints.safetensors_folder import resolve_model
from minitune.config.model_config import ModelConfig
from minitune.config.training_config import GGUF_METHODS
from minitune.gguf.export import convert_folder, export_gguf


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a model, with its adapter merged in, as GGUF or safetensors."
    )
    parser.add_argument(
        "--model", required=True, help="model folder, or org/name in the local Hugging Face cache"
    )
    parser.add_argument("--adapter", type=Path, help="folder of the adapter to merge in")
    parser.add_argument(
        "--output", type=Path, help="GGUF file (ending in .gguf), or a folder for one"
    )
    parser.add_argument(
        "--quantization-method", choices=GGUF_METHODS, default="q8_0", help="default: q8_0"
    )
    parser.add_argument("--merged", type=Path, help="folder for merged 16-bit safetensors")
    parser.add_argument(
        "--merge-base",
        choices=MERGE_BASES,
        default="auto",
        help="weights to merge onto; auto: original, where there",
    )
    arguments = parser.parse_args()
    try:
        for path in export(arguments):
            print(path)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"export.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def export(arguments: argparse.Namespace) -> list[Path]:
    """What the command line asks for; the paths written."""
    method, output, merged = arguments.quantization_method, arguments.output, arguments.merged
    if output is None and merged is None:
        raise ValueError(
            "nothing to write: give --output for a GGUF file, --merged for a folder, or both"
        )
    folder = resolve_model(arguments.model)
    quantized = "quantization_config" in ModelConfig.from_folder(folder).raw
    if (
        arguments.adapter is None
        and merged is None
        and not quantized
        and arguments.merge_base != "nf4"
    ):
        return [
            convert_folder(folder, output, method)
        ]  # tensor by tensor, without a model in memory
    # 16-bit weights stay in their files until they are merged, one at a time; quantising is quicker on a GPU
    nf4 = arguments.merge_base == "nf4"
    model, tokenizer = FastLanguageModel.from_pretrained(
        arguments.model, max_seq_length=None, load_in_4bit=nf4, device=None if nf4 else "cpu"
    )
    if arguments.adapter is not None:
        model.load_adapter(arguments.adapter)
    paths = []
    if merged is not None:
        paths.append(merge_to_folder(model, merged, tokenizer, arguments.merge_base))
    if output is not None:
        paths.append(export_gguf(model, output, tokenizer, method, arguments.merge_base))
    return paths


if __name__ == "__main__":
    sys.exit(main())

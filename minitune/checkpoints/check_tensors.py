"""The check of a model folder's tensors against its config.json, before anything is built.

It reads the heads of the files only.
"""

import re

from minitune.checkpoints.bitsandbytes_nf4 import quantized_linears
from minitune.checkpoints.safetensors_folder import SafetensorsFolder
from minitune.config.model_config import ModelConfig

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_tensors(stored: SafetensorsFolder, config: ModelConfig) -> None:
    """Check the number of layers and the shapes of the tensors that the model needs.

    The shapes of quantised linears are checked as they are read.

    Raises: ValueError that names config.json or the tensor at fault.
    """
    found = {match[1] for name in stored.names() if (match := LAYER.match(name))}
    if 0 < len(found) < config.num_hidden_layers:
        raise ValueError(
            f"{stored.folder}/config.json: num_hidden_layers is {config.num_hidden_layers}, but "
            f"the files hold {len(found)} layers; get the files of one model"
        )
    quantized = {f"{linear}.weight" for linear in quantized_linears(stored)}
    for name, shape in config.tensor_shapes().items():
        stored.check_shape(name, None if name in quantized else shape)

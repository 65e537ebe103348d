"""The check of a GGUF file's tensors against the model that its keys describe."""

from gguf import GGMLQuantizationType as GGMLType

from minitune.config.model_config import ModelConfig
from minitune.gguf.model_metadata import gguf_name
from minitune.gguf.reader import GgufReader

TOKENS = "tokenizer.ggml.tokens"


def check_tensors(
    reader: GgufReader, config: ModelConfig, additional: dict[str, tuple[int, ...]]
) -> None:
    """Check names, shapes and types of the tensors, and the number of tokens.

    additional: shapes of the tensors that Hugging Face's files lack.

    Raises: ValueError that names the tensor if one is missing, has another shape or does not belong
        to the model, or if the embedding has not a row for each token.
    """
    family = config.architecture
    expected = {gguf_name(name, family): shape for name, shape in config.tensor_shapes().items()}
    expected |= additional
    for name in {**expected, **reader.tensors}:
        if name not in reader.tensors:
            raise ValueError(f"the tensor {name} is missing")
        if name not in expected:
            raise ValueError(f"the tensor {name} does not belong to the model")
        tensor = reader.tensors[name]
        if tensor.shape != expected[name]:
            raise ValueError(f"{name} has the shape {tensor.shape}; expected {expected[name]}")
        if len(tensor.shape) == 1 and tensor.type != GGMLType.F32:
            raise ValueError(f"{name} is {tensor.type.name}; llama.cpp expects F32")
    tokens = reader.metadata.get(TOKENS)
    count = len(tokens) if isinstance(tokens, list) else 0
    if count != config.vocab_size:
        raise ValueError(
            f"there are {count} tokens, but the embedding has {config.vocab_size} rows"
        )

"""The next-token distributions of a model in a GGUF file, computed layer by layer.

So the distributions of any model that was written can be compared with llama.cpp's, whatever its
size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitune.config.model_config import EMBEDDING
from minitune.gguf.file_weights import FileWeights
from minitune.gguf.streamed_model import StreamedModel


@torch.no_grad()
def next_token_log_probabilities(
    weights: FileWeights, prompts: Sequence[list[int]], device: torch.device
) -> Tensor:
    """Return the log probabilities of the token after each prompt, float32 (prompts, V) on the CPU.

    prompts: token ids, at least one each.
    """

    def load(name: str) -> Tensor:
        return weights.load(name, device)

    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    last = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    model = StreamedModel(weights.config, positions, device)
    with model.shell.as_current_device():
        ids = [id for prompt in prompts for id in prompt]
        rows = [weights.load_rows(EMBEDDING, slice(id, id + 1), device) for id in ids]
        s = model.embed(torch.cat(rows))
        for layer in range(model.layers):
            model.run_layer_(layer, s, load)
        logits, _ = model.head(load).logits(s[last.to(device)])
        return logits.log_softmax(-1).cpu()

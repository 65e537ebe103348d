"""The next-token distributions of a model in a GGUF file, computed layer by layer.

One layer is in memory at a time, in float32. So the distributions of any model that was written can
be compared with llama.cpp's, whatever its size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minitune.gguf.file_weights import FileWeights
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import CausalLM
from minitune.model.layers import new_residual
from minitune.model.packed_sequences import PackedSequences

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@torch.no_grad()
def next_token_log_probabilities(
    weights: FileWeights, prompts: Sequence[list[int]], device: torch.device
) -> Tensor:
    """Return the log probabilities of the token after each prompt, float32 (prompts, V) on the CPU.

    prompts: token ids, at least one each.
    """
    config = weights.config
    longest = max(map(len, prompts))
    model = CausalLM(
        config,
        dtype=torch.float32,
        device=device,
        max_seq_length=longest,
        planner=None,
        attention="triton",
    )
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    last = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    with model.as_current_device():
        packed = PackedSequences.from_positions(positions, model.windows).to(device)
        s = _embed(model, weights, prompts)
        for i, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{i}."
            names = [name for name in config.tensor_shapes() if name.startswith(prefix)]
            _fill(model, weights, names)
            s = layer(s, packed, model.layer_context, SaveLevel.INPUT, None)
            _empty(model, names)
        return _head(model, weights, s[last.to(device)])


def _embed(model: CausalLM, weights: FileWeights, prompts: Sequence[list[int]]) -> Tensor:
    """Return the residual stream (N, D) before the first layer."""
    ids = [id for prompt in prompts for id in prompt]
    rows = [weights.load_rows(EMBEDDING, slice(id, id + 1), model.device) for id in ids]
    return new_residual(torch.cat(rows) * model.model.embed_tokens.multiplier)


def _head(model: CausalLM, weights: FileWeights, s: Tensor) -> Tensor:
    """Return the log probabilities of the residual stream s (n, D)."""
    _fill(model, weights, ["model.norm.weight"])
    name = EMBEDDING if model.config.tie_word_embeddings else HEAD
    model.lm_head.weight = _frozen(weights.load(name, model.device))
    logits, _ = model.head().logits(s)
    return logits.log_softmax(-1).cpu()


def _fill(model: CausalLM, weights: FileWeights, names: list[str]) -> None:
    for name in names:
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, _frozen(weights.load(name, model.device)))


def _empty(model: CausalLM, names: list[str]) -> None:
    for name in names:
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, None)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)

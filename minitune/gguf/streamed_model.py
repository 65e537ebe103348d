"""A model in float32 whose weights come layer by layer, from anywhere.

One layer is in memory at a time. So a model of any size can be computed in float32 with the weights
of a file, or with several versions of its weights in turn.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minitune.config.model_config import EMBEDDING, HEAD, NORM, ModelConfig
from minitune.model.activations import SaveLevel
from minitune.model.causal_lm import EVALUATION_TILE_ROWS, CausalLM
from minitune.model.layers import new_residual
from minitune.model.loss import Head
from minitune.model.norms import RMSNorm
from minitune.model.packed_sequences import PackedSequences

Load = Callable[[str], Tensor]  # Hugging Face's name -> tensor on the device


class StreamedModel:
    """A float32 model without weights, for samples that are packed side by side.

    config: the shape of the model.
    positions: int64 (N,) on the host; they restart at 0 in each sample.
    """

    def __init__(self, config: ModelConfig, positions: Tensor, device: torch.device):
        self.shell = CausalLM(
            config,
            dtype=torch.float32,
            device=device,
            max_seq_length=int(positions.max()) + 1,
            planner=None,
            attention="triton",
        )
        self.head_name = EMBEDDING if config.tie_word_embeddings else HEAD
        self._packed = PackedSequences.from_positions(positions, self.shell.windows).to(device)

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return len(self.shell.model.layers)

    def layer_names(self, layer: int) -> list[str]:
        """Return the names of a layer's tensors, in the model's order."""
        prefix = f"model.layers.{layer}."
        return [name for name in self.shell.config.tensor_shapes() if name.startswith(prefix)]

    def embed(self, rows: Tensor) -> Tensor:
        """Return the residual stream (N, D) before the first layer, from rows of the embedding."""
        return new_residual(rows.float() * self.shell.model.embed_tokens.multiplier)

    @torch.no_grad()
    def run_layer_(self, layer: int, s: Tensor, load: Load) -> None:
        """Run a layer forward with the weights that `load` returns.

        s: the residual stream (N, D), which the layer adds to in place.
        """
        module, context = self.shell.model.layers[layer], self.shell.layer_context
        names = self.layer_names(layer)
        for name in names:
            self._set(name, _frozen(load(name)))
        with self.shell.as_current_device():
            module.forward_saving_(s, self._packed, context, SaveLevel.INPUT, EVALUATION_TILE_ROWS)
        for name in names:
            self._set(name, None)

    def head(self, load: Load) -> Head:
        """Return the final norm and the head with the weights that `load` returns."""
        c = self.shell.config
        norm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.architecture.norm_offset)
        norm.weight = _frozen(load(NORM))
        weight = load(self.head_name).float()
        return Head(norm, weight, c.logit_multiplier, c.logit_softcap)

    def _set(self, name: str, value: nn.Parameter | None) -> None:
        module, _, kind = name.rpartition(".")
        setattr(self.shell.get_submodule(module), kind, value)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)

"""The part of the model below the head: embedding, decoder layers and final norm."""

from collections.abc import Sequence

from torch import nn

from minitune.config.layer_kinds import LayerKind
from minitune.config.model_config import ModelConfig
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.fixed_module import UnhookedModule
from minitune.model.layers import Embedding
from minitune.model.norms import RMSNorm


class Decoder(UnhookedModule):
    """Embedding, decoder layers and final norm, under the names of the checkpoint's tensors."""

    def __init__(self, c: ModelConfig, kinds: Sequence[LayerKind]):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.embedding_multiplier)
        self.layers = nn.ModuleList(DecoderLayer(c, kind) for kind in kinds)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.architecture.norm_offset)

"""Decoding with a key/value cache, to look at what was trained.

The prompts are read in one packed pass through the training kernels, which fills the cache; then every step moves one
token a prompt through the layers, whose attention is a few torch operations over the cache. Where memory allows, the
weights stay dequantised meanwhile: at one row a prompt, dequantising them would be nearly all of the time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minitune.kernels.attention import attention
from minitune.model.activations import Activations
from minitune.model.decoder_layer import DecoderLayer, new_residual
from minitune.model.packed_sequences import PackedSequences


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, given as lists of token ids or a tensor (B, T) without padding.

    An answer ends before one of `eos_token_ids` (by default those of the model), after `max_new_tokens`, or at the
    model's max_seq_length.

    temperature 0 takes the likeliest token; otherwise draws from softmax(logits / temperature), limited to the `top_k`
    likeliest (0: all) and to the fewest tokens that hold `top_p` of the probability.
    on_token(i, token) is called as each token of prompt i is chosen, the end's token left out.

    Raises ValueError for no or empty prompts, ones longer than max_seq_length, and settings out of range.
    """
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    eos_token_ids = model.eos_token_ids if eos_token_ids is None else eos_token_ids
    if not all(
        isinstance(p, Sequence) and all(isinstance(token, int) for token in p) for p in prompts
    ):
        raise ValueError(
            "prompts are lists of token ids, one a prompt, as tokenizer.apply_chat_template makes them"
        )
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("generate needs at least one prompt, and no empty one")
    if (max_seqlen := max(map(len, prompts))) >= model.max_seq_length:
        raise ValueError(
            f"a prompt has {max_seqlen} tokens, but the model was loaded for {model.max_seq_length}"
        )
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}, top_k {top_k}, max_new_tokens {max_new_tokens}: "
            "expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_new_tokens >= 1"
        )
    if wrong := [token for p in prompts for token in p if not 0 <= token < model.config.vocab_size]:
        raise ValueError(
            f"a prompt holds id {wrong[0]}, but the vocabulary has {model.config.vocab_size} rows"
        )
    capacity = min(max_seqlen + max_new_tokens, model.max_seq_length)
    generator = torch.Generator().manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    with model.resident_weights_if_they_fit(), model.as_current_device():
        cache = _Cache(model, len(prompts), capacity)
        logits = cache.prefill(prompts)
        while True:
            tokens = _choose(logits, temperature, top_p, top_k, generator)
            for i, token in enumerate(tokens):
                if not running[i]:
                    continue
                if token in eos_token_ids:
                    running[i] = False
                    continue
                answers[i].append(token)
                if on_token:
                    on_token(i, token)
                running[i] = len(answers[i]) < max_new_tokens and cache.lengths[i] + 1 < capacity
            if not any(running):
                return answers
            logits = cache.step(tokens, running)


def _choose(
    logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator
) -> list[int]:
    """One token a row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    values, order = (logits.float().cpu() / temperature).sort(-1, descending=True)
    if top_k:
        values, order = values[:, :top_k], order[:, :top_k]
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what likelier tokens hold already
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(1, probabilities.multinomial(1, generator=generator))[:, 0].tolist()


class _Cache:
    """Rotated keys, and values, of every layer: (B, capacity, G, K) each; `lengths` says how far each row is filled."""

    def __init__(self, model, rows: int, capacity: int):
        c = model.config
        shape = (c.num_hidden_layers, rows, capacity, c.num_key_value_heads, c.head_dim)
        self.model = model
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * rows

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts in one packed pass; logits (B, V) of what follows each."""
        self.lengths = [len(p) for p in prompts]
        positions = torch.cat([torch.arange(n) for n in self.lengths]).to(self.model.device)
        rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(self.lengths)).to(
            self.model.device
        )
        packed = PackedSequences.from_positions(positions)

        def attend(layer: DecoderLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[index, rows, positions], self.values[index, rows, positions] = k, v
            return attention(q, k, v, packed.start, packed.end, layer.self_attn.scale)[0]

        ids = [token for prompt in prompts for token in prompt]
        return self._logits(
            self._forward(ids, packed, attend)[torch.tensor(self.lengths).cumsum(0) - 1]
        )

    def step(self, tokens: list[int], running: list[bool]) -> Tensor:
        """Move one token a row; logits (B, V) of what follows. A row that has ended stays where it is."""
        positions = torch.tensor(
            [min(n, self.keys.shape[2] - 1) for n in self.lengths], device=self.model.device
        )
        rows = torch.arange(len(tokens), device=self.model.device)
        seen = int(positions.max()) + 1
        hidden = torch.arange(seen, device=self.model.device) > positions[:, None]  # (B, seen)

        def attend(layer: DecoderLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[index, rows, positions], self.values[index, rows, positions] = k, v
            keys, values = (
                cached[index, :, :seen].float() for cached in (self.keys, self.values)
            )  # (B, S, G, K)
            grouped = q.float().view(len(q), keys.shape[2], -1, q.shape[-1])  # (B, G, H/G, K)
            scores = torch.einsum("bghk,bsgk->bghs", grouped, keys) * layer.self_attn.scale
            weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
            return torch.einsum("bghs,bsgk->bghk", weights, values).view_as(q).to(q.dtype)

        # In this pass every row is a sample of a single token.
        packed = PackedSequences(positions.int(), start=rows, end=rows + 1)
        logits = self._logits(self._forward(tokens, packed, attend))
        self.lengths = [n + on for n, on in zip(self.lengths, running, strict=True)]
        return logits

    def _forward(self, ids: list[int], packed: PackedSequences, attend: Callable) -> Tensor:
        """Return the final residual stream (N, D); `attend` computes attention over the cache."""
        model, context = self.model, self.model.layer_context
        s = new_residual(
            model.model.embed_tokens(torch.tensor(ids, device=model.device), model.dtype)
        )
        for index, layer in enumerate(model.model.layers):
            with context.layer_pass(layer.fused_linears, packed) as p:
                a = Activations(s.to(model.dtype, copy=True))
                q, k, v = layer.self_attn.split_heads(layer.compute_qkv(a.x, p))
                a.attn = layer.o.new_input(a.x)
                layer.self_attn.query_heads(a.attn).copy_(attend(layer, index, q, k, v))
                layer.finish_rows_(s, a, p)
        return s

    def _logits(self, s: Tensor) -> Tensor:
        h, _ = self.model.model.norm.from_residual(s, self.model.dtype)
        return h @ self.model.lm_head.weight_as(self.model.dtype).T

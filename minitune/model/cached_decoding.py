"""Decoding with a key/value cache: prompts in, new tokens out.

One packed pass through the training kernels reads all prompts and fills the cache. After that each
step moves one token per prompt through the layers, and attention is a few torch operations over the
cache. If memory allows, the weights stay dequantised meanwhile: with one row per prompt,
dequantising them would take nearly all of the time.

This file knows token ids only. generate.py checks the request and gives the answer its form.
"""

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from minitune.kernels.attention import attention
from minitune.model.activations import Activations
from minitune.model.decoder_layer import DecoderLayer
from minitune.model.layers import new_residual
from minitune.model.packed_sequences import PackedSequences


@torch.no_grad()
def decode(
    model,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    choose: Callable[[Tensor], list[int]],
    end_tokens: Container[int],
    on_token: Callable[[int, int], None],
    keep_weights: bool = True,
) -> list[list[int]]:
    """Return the new tokens of each prompt, with the end token if the answer has one.

    prompts: token ids; prompt i and its answer fit into the model's max_seq_length.
    limits: the largest number of new tokens of each prompt, at least 1.
    choose: returns one token for each row of logits (B, V).
    on_token: called as on_token(i, token) for each new token of prompt i, as it is chosen.
    keep_weights: keep the weights dequantised meanwhile, if the memory allows.
    """
    capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    weights = model.resident_weights_if_they_fit() if keep_weights else nullcontext()
    with weights, model.as_current_device():
        cache = _KVCache(model, len(prompts), capacity)
        logits = cache.prefill(prompts)
        while True:
            tokens = choose(logits)
            for i, token in enumerate(tokens):
                if running[i]:
                    answers[i].append(token)
                    on_token(i, token)
                    running[i] = token not in end_tokens and len(answers[i]) < limits[i]
            if not any(running):
                return answers
            logits = cache.step(tokens, running)


class _KVCache:
    """The keys (after RoPE) and values of every layer, each (layers, B, capacity, G, K).

    lengths: number of tokens of each row that the cache holds.
    """

    def __init__(self, model, batch_size: int, capacity: int):
        c = model.config
        shape = (c.num_hidden_layers, batch_size, capacity, c.num_key_value_heads, c.head_dim)
        self.model = model
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch_size

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts in one packed pass, and return the logits (B, V) behind each."""
        device = self.model.device
        self.lengths = [len(prompt) for prompt in prompts]
        lengths = torch.tensor(self.lengths)
        positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device)  # (N,)
        rows = torch.repeat_interleave(torch.arange(len(prompts)), lengths).to(device)  # (N,)
        packed = PackedSequences.from_positions(positions, self.model.windows)

        def attend(layer: DecoderLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[index, rows, positions] = k
            self.values[index, rows, positions] = v
            heads = layer.self_attn
            seen = packed.seen_through(heads.window)
            out, _ = attention(q, k, v, seen.start, seen.end, heads.scale, softcap=heads.softcap)
            return out

        ids = [token for prompt in prompts for token in prompt]
        s = self._forward(ids, packed, attend)  # (N, D)
        return self._logits(s[lengths.cumsum(0) - 1])

    def step(self, tokens: list[int], running: list[bool]) -> Tensor:
        """Move one token of each row forward, and return the logits (B, V) behind it.

        A row that has ended still computes, but its length stays.
        """
        device, capacity = self.model.device, self.keys.shape[2]
        positions = torch.tensor([min(n, capacity - 1) for n in self.lengths], device=device)
        rows = torch.arange(len(tokens), device=device)
        S = int(positions.max()) + 1  # cached tokens that any row may see
        distance = positions[:, None] - torch.arange(S, device=device)  # (B, S)

        def attend(layer: DecoderLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[index, rows, positions] = k
            self.values[index, rows, positions] = v
            heads, window = layer.self_attn, layer.self_attn.window
            seen = (distance >= 0) & (distance < (S if window is None else window))  # (B, S)
            keys = self.keys[index, :, :S].float()  # (B, S, G, K)
            values = self.values[index, :, :S].float()
            grouped = q.float().view(len(q), keys.shape[2], -1, q.shape[-1])  # (B, G, H / G, K)
            scores = torch.einsum("bghk,bsgk->bghs", grouped, keys) * heads.scale
            if heads.softcap:
                scores = heads.softcap * torch.tanh(scores / heads.softcap)
            weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
            return torch.einsum("bghs,bsgk->bghk", weights, values).view_as(q).to(q.dtype)

        # In this pass every row is a sample of a single token.
        packed = PackedSequences(positions.int(), start=rows, end=rows + 1)
        logits = self._logits(self._forward(tokens, packed, attend))
        self.lengths = [n + on for n, on in zip(self.lengths, running, strict=True)]
        return logits

    def _forward(self, ids: list[int], packed: PackedSequences, attend: Callable) -> Tensor:
        """Return the residual stream (N, D) after the last layer.

        attend: attend(layer, index, q, k, v) caches k and v, and returns attention's (N, H, K).
        """
        model, context = self.model, self.model.layer_context
        ids_on_device = torch.tensor(ids, device=model.device)
        s = new_residual(model.model.embed_tokens(ids_on_device, model.dtype))
        for index, layer in enumerate(model.model.layers):
            with context.layer_pass(layer.fused_linears, packed) as p:
                a = Activations(s.to(model.dtype, copy=True))
                qkv = layer.compute_qkv(a.x, p)
                q, k, v = layer.self_attn.heads_of(qkv, p)
                a.attn = layer.o.new_input(a.x)  # (N, H K + R)
                layer.self_attn.query_heads(a.attn).copy_(attend(layer, index, q, k, v))
                layer.finish_rows_(s, a, p)
        return s

    def _logits(self, s: Tensor) -> Tensor:
        """Return the logits (B, V) of the residual stream s (B, D)."""
        return self.model.head().logits(s)[0]

"""A Llama with LoRA in plain torch operations under autograd: the reference of the written layers.

It shares only the dense weights and the adapter with minitune, and works in any dtype. It sees one
sample at a time, so it knows nothing of packing and sample borders.
"""

import torch
import torch.nn.functional as F


class PlainLlama:
    """A Llama with the dequantised weights and the adapter of a minitune model.

    adapter: name -> leaf tensor that requires a gradient.
    """

    def __init__(self, model, dtype: torch.dtype):
        self.c = model.config
        self.dtype = dtype
        self.ropes = model.layer_context.ropes
        self.weights = {
            n: p.detach().to(dtype) for n, p in model.named_parameters() if ".lora_" not in n
        }
        self.scaling = {}
        for name, linear in model.linears():
            # Take the values of the model's compute dtype, so that only the computation differs.
            self.weights[f"{name}.weight"] = linear.weight_as(model.dtype).to(dtype)
            self.scaling[name] = linear.scaling
        self.adapter = {
            n: p.detach().to(dtype).requires_grad_() for n, p in model.trainable_parameters()
        }

    def linear(self, name, x):
        y = F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        if f"{name}.lora_A.weight" in self.adapter:
            a, b = self.adapter[f"{name}.lora_A.weight"], self.adapter[f"{name}.lora_B.weight"]
            y = y + self.scaling[name] * (x @ a.T @ b.T)
        return y

    def norm(self, name, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps)
        return (x * self.weights[f"{name}.weight"]).to(self.dtype)

    def rotate(self, x, rope):
        """Return the heads x (T, heads, K) rotated by the index `rope` of their tables, or None."""
        if rope is None:
            return x
        tables = self.ropes[rope]
        x, rest = x.tensor_split([tables.rotary_dim], -1)
        a, b = x.chunk(2, -1)
        cos, sin = (t[: len(x), None].to(self.dtype) for t in (tables.cos, tables.sin))
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def projections(self, group, h):
        """Return the outputs of a group of linears, which a model may hold as one."""
        c, linears = self.c, self.c.linear_groups()[group]
        names = [f"{self.prefix}.{linear.name}" for linear in linears]
        sizes = [c.query_size, c.key_value_size, c.key_value_size]
        if group == "gate_up":
            sizes = [c.intermediate_size] * 2
        return torch.cat([self.linear(name, h) for name in names], -1).split(sizes, -1)

    def layer(self, i, x):
        self.prefix = p = f"model.layers.{i}"
        c = self.c
        H, G, K, T = c.num_attention_heads, c.num_key_value_heads, c.head_dim, len(x)
        window, rope = c.layer_kinds[i]
        h = self.norm(f"{p}.input_layernorm", x)
        q, k, v = (y.view(T, -1, K) for y in self.projections("qkv", h))
        if self.c.qk_norm:
            q, k = self.norm(f"{p}.self_attn.q_norm", q), self.norm(f"{p}.self_attn.k_norm", k)
        q, k = self.rotate(q, rope), self.rotate(k, rope)
        if rope is not None and (growth := self.ropes[rope].query_scale) is not None:
            q = q * growth[:T, None, None].to(self.dtype)
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) * c.attention_scale
        distance = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
        seen = (distance >= 0) & (distance < (window or T))
        attn = torch.einsum("hts,shk->thk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        o = self.linear(f"{p}.self_attn.o_proj", attn.reshape(T, -1))
        x = x + c.residual_multiplier * o
        h = self.norm(f"{p}.post_attention_layernorm", x)
        gate, up = self.projections("gate_up", h)
        down = self.linear(f"{p}.mlp.down_proj", F.silu(gate) * up)
        return x + c.residual_multiplier * down

    def logits(self, ids):
        """Return the logits (T, V) of one sample's ids (T,)."""
        x = self.weights["model.embed_tokens.weight"][ids] * self.c.embedding_multiplier
        for i in range(self.c.num_hidden_layers):
            x = self.layer(i, x)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm("model.norm", x) @ head.T * self.c.logit_multiplier

    def loss(self, samples):
        """Return the mean loss over the labels that count in a list of (ids, labels)."""
        total, count = 0, 0
        for ids, labels in samples:
            total = total + F.cross_entropy(
                self.logits(ids)[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            count += int((labels[1:] != -100).sum())
        return total / count

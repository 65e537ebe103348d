"""A model with LoRA in plain torch operations under autograd: the reference of the written layers.

It shares only the dense weights and the adapter with minitune, and works in any dtype. It sees one
sample at a time, so it knows nothing of packing and sample borders.
"""

import torch
import torch.nn.functional as F


def capped(x, bound):
    """Return bound * tanh(x / bound), or x if there is no bound."""
    return bound * torch.tanh(x / bound) if bound else x


class PlainLlama:
    """A model of any family with the dequantised weights and the adapter of a minitune model.

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
        """Return the norm of this name of x, or x if there is no name."""
        if name is None:
            return x
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps)
        weight = self.weights[f"{name}.weight"] + self.c.architecture.norm_offset
        return (x * weight).to(self.dtype)

    def normalised_heads(self, name, x):
        """Return the heads x (T, heads, K) behind the norm of this name, if the family has one."""
        if self.c.architecture.qk_norm == "projection":
            return self.norm(name, x.flatten(1)).view_as(x)
        return self.norm(name, x) if self.c.architecture.qk_norm == "head" else x

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
        c, self.prefix = self.c, f"model.layers.{i}"
        names = [name and f"{self.prefix}.{name}" for name in c.architecture.norms]
        attention_in, attention_out, mlp_in, mlp_out = names
        o = self.attention(i, self.norm(attention_in, x))
        x = x + c.residual_multiplier * self.norm(attention_out, o)
        gate, up = self.projections("gate_up", self.norm(mlp_in, x))
        is_gelu = c.architecture.activation == "gelu_tanh"
        gate = F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)
        down = self.linear(f"{self.prefix}.mlp.down_proj", gate * up)
        return x + c.residual_multiplier * self.norm(mlp_out, down)

    def attention(self, i, h):
        p, c, T = f"{self.prefix}.self_attn", self.c, len(h)
        H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        window, rope = c.layer_kinds[i]
        q, k, v = (y.view(T, -1, K) for y in self.projections("qkv", h))
        q = self.rotate(self.normalised_heads(f"{p}.q_norm", q), rope)
        k = self.rotate(self.normalised_heads(f"{p}.k_norm", k), rope)
        if rope is not None and (growth := self.ropes[rope].query_scale) is not None:
            q = q * growth[:T, None, None].to(self.dtype)
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
        scores = capped(torch.einsum("thk,shk->hts", q, k) * c.attention_scale, c.score_softcap)
        distance = torch.arange(T, device=h.device)[:, None] - torch.arange(T, device=h.device)
        seen = (distance >= 0) & (distance < (window or T))
        attn = torch.einsum("hts,shk->thk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        return self.linear(f"{p}.o_proj", attn.reshape(T, -1))

    def logits(self, ids):
        """Return the logits (T, V) of one sample's ids (T,)."""
        x = self.weights["model.embed_tokens.weight"][ids] * self.c.embedding_multiplier
        for i in range(self.c.num_hidden_layers):
            x = self.layer(i, x)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        logits = self.norm("model.norm", x) @ head.T * self.c.logit_multiplier
        return capped(logits, self.c.logit_softcap)

    def loss(self, samples):
        """Return the mean loss over the labels that count in a list of (ids, labels)."""
        total, count = 0, 0
        for ids, labels in samples:
            total = total + F.cross_entropy(
                self.logits(ids)[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            count += int((labels[1:] != -100).sum())
        return total / count

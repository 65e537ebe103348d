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
        rope = model.layer_context.rope
        self.cos, self.sin = rope.cos.to(dtype), rope.sin.to(dtype)
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

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[: len(x), None], self.sin[: len(x), None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def layer(self, p, x):
        H, G, K, T = self.c.num_attention_heads, self.c.num_key_value_heads, self.c.head_dim, len(x)
        h = self.norm(f"{p}.input_layernorm", x)
        q, k, v = (self.linear(f"{p}.self_attn.{n}_proj", h).view(T, -1, K) for n in "qkv")
        if self.c.qk_norm:
            q, k = self.norm(f"{p}.self_attn.q_norm", q), self.norm(f"{p}.self_attn.k_norm", k)
        q, k, v = self.rotate(q), *(t.repeat_interleave(H // G, 1) for t in (self.rotate(k), v))
        scores = torch.einsum("thk,shk->hts", q, k) * K**-0.5
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        attn = torch.einsum("hts,shk->thk", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)
        x = x + self.linear(f"{p}.self_attn.o_proj", attn.reshape(T, -1))
        h = self.norm(f"{p}.post_attention_layernorm", x)
        gate, up = self.linear(f"{p}.mlp.gate_proj", h), self.linear(f"{p}.mlp.up_proj", h)
        return x + self.linear(f"{p}.mlp.down_proj", F.silu(gate) * up)

    def logits(self, ids):
        """Return the logits (T, V) of one sample's ids (T,)."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(self.c.num_hidden_layers):
            x = self.layer(f"model.layers.{i}", x)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm("model.norm", x) @ head.T

    def loss(self, samples):
        """Return the mean loss over the labels that count in a list of (ids, labels)."""
        total, count = 0, 0
        for ids, labels in samples:
            total = total + F.cross_entropy(
                self.logits(ids)[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            count += int((labels[1:] != -100).sum())
        return total / count

"""The decoder layer, with its forward and backward written out over the kernels.

    h = norm(x)                       q, k, v = W_qkv h
    q, k = rope(q), rope(k)           attn = attention(q, k, v)
    o = W_o attn                      h_mid = norm(x + o)
    gate, up = W_gate_up h_mid        m = silu(gate) * up
    d = W_down m                      y = x + o + d

This is Llama's. The values of a family (config/architectures.py) may change the places of the norms
(norms.py), the heads (Attention in layers.py) and the activation, and scale o and d.

Each W is frozen and carries LoRA branches (linear.py). Neither direction depends on the autograd
engine; autograd.py wraps both for a training loop of the user's own.

The residual stream s runs through all layers. It is float32 from the embedding to the head, and
a layer adds o and W_down m to s in place. x is s rounded to the compute dtype when the layer
begins, and backward needs only x. Keeping s in float32 lowers the gradient error of a 1B model in
bf16 from 0.0325 to 0.0281 (README).

Attention is the only operation that mixes rows. Everything else runs on tiles of rows, in forward
and backward, so the wide tensors (h, gate, up, m and their gradients) exist for one tile at a time.

The dimension letters are those of minitune/model/__init__.py.
"""

import torch
from torch import Tensor, nn

from minitune.config.layer_kinds import LayerKind
from minitune.config.model_config import ModelConfig
from minitune.kernels.gated_activation import gated_activation, gated_activation_backward
from minitune.model.activations import Activations, SaveLevel, row_tiles
from minitune.model.autograd import DecoderLayerNode
from minitune.model.fixed_module import FixedModule, UnhookedModule
from minitune.model.layers import Attention, LayerContext, LayerPass
from minitune.model.linear import FusedLinear, Linear, LoraGradients
from minitune.model.norms import LayerNorms
from minitune.model.packed_sequences import PackedSequences


class DecoderLayer(FixedModule):
    """One decoder layer. The names of its modules are those of the checkpoint's tensors."""

    def __init__(self, c: ModelConfig, kind: LayerKind):
        super().__init__()
        self.D, self.F = c.hidden_size, c.intermediate_size
        self.self_attn = Attention(c, kind)
        self.mlp = UnhookedModule()  # of the linears mlp.*
        self.activation = c.architecture.activation
        self.norms = LayerNorms.add_to(self, c)

        groups: dict[str, list[Linear]] = {}
        for shape in c.linears():
            linear = Linear(shape.in_features, shape.out_features, shape.bias)
            module, name = shape.name.split(".")  # "self_attn.q_proj"
            self.get_submodule(module).add_module(name, linear)
            groups.setdefault(shape.group, []).append(linear)
        self.qkv = FusedLinear("qkv", groups["qkv"])
        self.o = FusedLinear("o", groups["o"], c.residual_multiplier)
        self.gate_up = FusedLinear("gate_up", groups["gate_up"])
        self.down = FusedLinear("down", groups["down"], c.residual_multiplier)

    @property
    def fused_linears(self) -> tuple[FusedLinear, ...]:
        """Return the four matmuls of the layer, in the order of forward."""
        return self.qkv, self.o, self.gate_up, self.down

    def lora_parameters(self) -> list[nn.Parameter]:
        """Return A and B of each adapted linear in turn, the order of `backward_`'s gradients."""
        linears = [linear for fused in self.fused_linears for linear in fused.adapted]
        return [p for linear in linears for p in (linear.lora_A.weight, linear.lora_B.weight)]

    def forward(
        self,
        s: Tensor,
        packed: PackedSequences,
        context: LayerContext,
        level: SaveLevel,
        tile_rows: int | None,
    ) -> Tensor:
        """Return the residual stream after the layer, for autograd. s (N, D) stays as it is."""
        parameters = self.lora_parameters()
        return DecoderLayerNode.apply(s, self, packed, context, level, tile_rows, *parameters)

    # ---- forward

    def forward_saving_(
        self,
        s: Tensor,
        packed: PackedSequences,
        context: LayerContext,
        level: SaveLevel,
        tile_rows: int | None = None,
    ) -> Activations:
        """Run the layer forward, adding to the residual stream s (N, D) in place.

        Return the activations that `level` saves for backward. Autograd does not see this pass.
        """
        x = s.to(context.dtype, copy=True)  # (N, D)
        a = Activations(
            x,
            qkv_lora=self.qkv.new_lora_activation(x),
            o_lora=self.o.new_lora_activation(x),
            gate_up_lora=self.gate_up.new_lora_activation(x),
            down_lora=self.down.new_lora_activation(x),
        )
        with context.layer_pass(self.fused_linears, packed, tile_rows) as p:
            a.qkv = self.compute_qkv(x, p, save_lora_to=a.qkv_lora)
            a.attn, a.lse = self.compute_attention(a.qkv, p)
            if level >= SaveLevel.QKV:
                a.o = torch.empty_like(x)
                a.d = torch.empty_like(x) if self.norms.mlp_out.is_norm else None
            if level >= SaveLevel.ALL:
                a.gate_up = self.gate_up.new_output(x)
            for rows in row_tiles(len(s), tile_rows):
                self.finish_rows_(s[rows], a.rows(rows), p)
        return a.saved_by(level)

    def compute_qkv(
        self,
        x: Tensor,
        p: LayerPass,
        *,
        saved_lora: Tensor | None = None,
        save_lora_to: Tensor | None = None,
    ) -> Tensor:
        """Return q, k and v of x (N, D) side by side: (N, (H + 2 G) K).

        q and k are rotated, except with norms of the heads, which come before RoPE.

        saved_lora, save_lora_to: LoRA activation (N, R) of W_qkv, as in FusedLinear.forward_.
        """
        qkv = self.qkv.new_output_without_lora(x)  # (N, (H + 2 G) K)
        for rows in row_tiles(len(x), p.tile_rows):
            h = self.qkv.new_input(x[rows])  # (n, D + R)
            self.norms.attention_in(x[rows], out=h[:, : self.D])
            self.qkv.forward_(
                h,
                p.weights[self.qkv],
                out=qkv[rows],
                saved_lora=None if saved_lora is None else saved_lora[rows],
                save_lora_to=None if save_lora_to is None else save_lora_to[rows],
            )
        self.self_attn.rotate_(qkv, p)
        return qkv

    def compute_attention(self, qkv: Tensor, p: LayerPass) -> tuple[Tensor, Tensor]:
        """Return attention's output (N, H K + R), with empty LoRA columns, and its logsumexp."""
        attn = self.o.new_input(qkv)
        return attn, self.self_attn.attend(qkv, p, out=self.self_attn.query_heads(attn))

    def finish_rows_(self, s: Tensor, a: Activations, p: LayerPass) -> None:
        """Add o and W_down m of some rows to the residual stream s (n, D) in place.

        a: x and attn of these rows. Every other activation of `a` that is not None is written.
        """
        m = self.compute_m(self.compute_gate_up_(s, a, p))  # (n, F + R)
        self.norms.mlp_out.add_output_(
            s, self.down, m, p.weights[self.down], out=a.d, save_lora_to=a.down_lora
        )

    def compute_gate_up_(self, s: Tensor, a: Activations, p: LayerPass) -> Tensor:
        """Add o of some rows to s (n, D) in place, and return their gate and up (n, 2 F + R)."""
        o = self.o.forward_(a.attn, p.weights[self.o], out=a.o, save_lora_to=a.o_lora)
        h_mid = self.gate_up.new_input(a.x)  # (n, D + R)
        o = self.norms.attention_out.of_output(o)
        self.norms.mlp_in.of_sum_(a.x, o, residual=s, out=h_mid[:, : self.D])
        gate_up = self.gate_up.new_output(a.x) if a.gate_up is None else a.gate_up
        self.gate_up.forward_(
            h_mid,
            p.weights[self.gate_up],
            out=gate_up[:, : 2 * self.F],
            save_lora_to=a.gate_up_lora,
        )
        return gate_up

    def compute_m(self, gate_up: Tensor) -> Tensor:
        """Return m (n, F + R), with empty LoRA columns."""
        m = self.down.new_input(gate_up)
        gate, up = self.split_gate_up(gate_up)
        gated_activation(gate, up, out=m[:, : self.F], activation=self.activation)
        return m

    def split_gate_up(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of gate and up, each (n, F), in a buffer (n, 2 F + R)."""
        return gate_up[:, : self.F], gate_up[:, self.F : 2 * self.F]

    # ---- backward

    def new_residual_gradient(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an empty `dresidual` (N, D + R) for `backward_`; R is the larger of o and down."""
        columns = self.D + max(self.o.lora_columns, self.down.lora_columns)
        return torch.empty((rows, columns), dtype=dtype, device=device)

    def backward_(
        self,
        dresidual: Tensor,
        a: Activations,
        packed: PackedSequences,
        context: LayerContext,
        tile_rows: int | None = None,
        need_dx: bool = True,
    ) -> list[Tensor | None]:
        """Turn dy into dx in place, and return dA and dB of each adapted linear in turn.

        A and B of a fused linear whose adapters are all frozen get None.

        dresidual: (N, D + R), from `new_residual_gradient`. Its first D columns hold dy before and
            dx after; in between they hold the gradient of x + o. The other columns are scratch.
        a: the saved activations. Missing ones are recomputed, and `a` is used up.
        need_dx: False in the first layer, below which nothing is trained.
        """
        with context.layer_pass(self.fused_linears, packed, tile_rows) as p:
            gradients = LoraGradients(self.fused_linears)
            if a.qkv is None:
                a.qkv = self.compute_qkv(a.x, p, saved_lora=a.qkv_lora)
            if a.attn is None:
                a.attn, a.lse = self.compute_attention(a.qkv, p)

            dattn = self.o.new_input_without_lora(dresidual)  # (N, H K)
            for rows in row_tiles(len(dresidual), tile_rows):
                self._backward_to_attention_(
                    dresidual[rows], dattn[rows], a.rows(rows), p, gradients
                )
            dqkv = self._backward_of_attention(dattn, a, p)  # (N, (H + 2 G) K + R)
            a.qkv = a.attn = dattn = None  # frees their memory
            for rows in row_tiles(len(dresidual), tile_rows):
                self._backward_to_input_(
                    dresidual[rows], dqkv[rows], a.rows(rows), p, gradients, need_dx
                )
        return gradients.in_turn()

    def _backward_to_attention_(
        self,
        dresidual: Tensor,
        dattn: Tensor,
        a: Activations,
        p: LayerPass,
        gradients: LoraGradients,
    ) -> None:
        """Turn dresidual (n, D + R) from dy into the gradient of x + o, and fill dattn (n, H K)."""
        D, F = self.D, self.F
        o, o_out, h_mid, rstd, gate_up = self._recompute_gate_up(a, p)

        # d = W_down m,  y = x + o + d
        #     dd = dy
        #     dm = W_down^T dd
        #     d(x + o) begins as dy, because the residual stream carries x + o past the MLP.
        d = self._recompute_d(gate_up, a, p)
        dd = self.norms.mlp_out.output_gradient(dresidual, d, self.down)  # (n, D + R)
        m = self.down.new_input(dd)  # (n, F + R); holds dm until m takes its place
        self.down.backward_(dd, p.weights[self.down], out=m[:, :F])

        # m = silu(gate) * up
        #     dgate = dm * up * silu'(gate)   through silu, which up scales
        #     dup = dm * silu(gate)           directly
        # A recomputed gate_up is not needed again, so its gradient overwrites it.
        dgate_up = gate_up if a.gate_up is None else torch.empty_like(gate_up)  # (n, 2 F + R)
        m_out = m[:, :F] if self.down.lora_columns else None  # only dA of W_down reads m
        gate_and_gradients = *self.split_gate_up(gate_up), *self.split_gate_up(dgate_up)
        gated_activation_backward(m[:, :F], *gate_and_gradients, m_out, self.activation)
        self.down.fill_lora_columns_(m, p.weights[self.down], a.down_lora)
        gradients.add(self.down, dd, m)
        del d, dd, m, m_out  # frees their memory: m_out is a view

        # gate, up = W_gate_up h_mid
        #     dh_mid = W_gate_up^T (dgate, dup)   the sum over both linears, in one matmul
        dh_mid = self.gate_up.backward_(dgate_up, p.weights[self.gate_up])  # (n, D)
        gradients.add(self.gate_up, dgate_up, h_mid)

        # h_mid = norm(x + o)
        #     d(x + o) = dy                    the residual stream
        #              + norm'(x + o) dh_mid   the MLP
        self.norms.mlp_in.backward(
            dh_mid, a.x, rstd, addend=o_out, dresidual=dresidual[:, :D], out=dresidual[:, :D]
        )

        # o = W_o attn
        #     do = d(x + o)        o enters only as a term of x + o
        #     dattn = W_o^T do
        do = self.norms.attention_out.output_gradient(dresidual, o, self.o)  # (n, D + R)
        self.o.backward_(do, p.weights[self.o], out=dattn)
        gradients.add(self.o, do, a.attn)

    def _recompute_gate_up(
        self, a: Activations, p: LayerPass
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return o before and behind its norm (n, D), h_mid (n, D + R), rstd (n,), and gate_up.

        rstd is that of h_mid's norm, gate_up is (n, 2 F + R). The LoRA columns of h_mid and of
        a.attn are filled. o, gate and up are recomputed only if `a` lacks them.
        """
        o = a.o
        if o is None:
            o = self.o.forward_(a.attn, p.weights[self.o], saved_lora=a.o_lora)
        h_mid = self.gate_up.new_input(a.x)
        o_out = self.norms.attention_out.of_output(o)
        _, rstd = self.norms.mlp_in.of_sum_(a.x, o_out, out=h_mid[:, : self.D])
        weight, gate_up = p.weights[self.gate_up], a.gate_up
        if gate_up is None:
            gate_up = self.gate_up.new_output(a.x)
            out = gate_up[:, : 2 * self.F]
            self.gate_up.forward_(h_mid, weight, out=out, saved_lora=a.gate_up_lora)
        else:
            self.gate_up.fill_lora_columns_(h_mid, weight, a.gate_up_lora)
        return o, o_out, h_mid, rstd, gate_up

    def _recompute_d(self, gate_up: Tensor, a: Activations, p: LayerPass) -> Tensor | None:
        """Return d (n, D), or None if no norm behind it needs d; recompute it if `a` lacks it."""
        if a.d is not None or not self.norms.mlp_out.is_norm:
            return a.d
        m = self.compute_m(gate_up)
        return self.down.forward_(m, p.weights[self.down], saved_lora=a.down_lora)

    def _backward_of_attention(self, dattn: Tensor, a: Activations, p: LayerPass) -> Tensor:
        """Return the gradient (N, (H + 2 G) K + R) of W_qkv's output, from dattn (N, H K)."""
        heads, dqkv = self.self_attn, self.qkv.new_output(dattn)
        out, dout = heads.query_heads(a.attn), heads.query_heads(dattn)  # (N, H, K)
        heads.attend_backward_(dout, out, a.lse, a.qkv, p, dqkv)
        return dqkv

    def _backward_to_input_(
        self,
        dresidual: Tensor,
        dqkv: Tensor,
        a: Activations,
        p: LayerPass,
        gradients: LoraGradients,
        need_dx: bool,
    ) -> None:
        """Turn dresidual (n, D + R) from the gradient of x + o into dx, with dqkv of these rows."""
        D = self.D
        # q, k, v = W_qkv h
        #     dh = W_qkv^T (dq, dk, dv)   the sum over three linears, in one matmul
        dh = self.qkv.backward_(dqkv, p.weights[self.qkv], need_dx=need_dx)  # (n, D)
        if need_dx or self.qkv.lora_columns:
            h = self.qkv.new_input(a.x)  # (n, D + R)
            _, rstd = self.norms.attention_in(a.x, out=h[:, :D])
            self.qkv.fill_lora_columns_(h, p.weights[self.qkv], a.qkv_lora)
            gradients.add(self.qkv, dqkv, h)
        if need_dx:
            # h = norm(x)
            #     dx = d(x + o)     the residual stream
            #        + norm'(x) dh  the attention block
            self.norms.attention_in.backward(
                dh, a.x, rstd, dresidual=dresidual[:, :D], out=dresidual[:, :D]
            )

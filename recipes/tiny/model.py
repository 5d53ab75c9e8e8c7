"""A Qwen2 model for training on a CPU: parameters with Hugging Face names, bfloat16 compute.

Weights, residual stream and norms are float32; matrix products and attention are bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BF16 = torch.bfloat16


@dataclass(frozen=True)
class TinyConfig:
    """Architecture. head_dim is 64, the smaller one of the two the GPU kernels cover."""

    vocab_size: int = 272
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def init_parameters(config: TinyConfig, seed: int) -> dict[str, Tensor]:
    """Returns freshly initialised float32 parameters."""
    hidden, inter, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (heads, hidden),
            prefix + "self_attn.q_proj.bias": (heads,),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.k_proj.bias": (kv,),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.bias": (kv,),
            prefix + "self_attn.o_proj.weight": (hidden, heads),
            prefix + "mlp.gate_proj.weight": (inter, hidden),
            prefix + "mlp.up_proj.weight": (inter, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inter),
        }
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes.items():
        if name.endswith("bias"):
            value = torch.zeros(shape)
        elif "norm" in name:
            value = torch.ones(shape)
        elif "embed" in name:
            value = torch.randn(shape, generator=generator) * 0.05
        else:
            value = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
            if "o_proj" in name or "down_proj" in name:
                value *= 0.5 / math.sqrt(config.num_hidden_layers)
        params[name] = value.requires_grad_()
    return params


def cos_sin(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns the RoPE tables [positions, dim]; phases are float64, DCA tests compare with them."""
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    phase = positions.double()[:, None] * inv_freq
    phase = torch.cat([phase, phase], -1)
    return phase.cos().float(), phase.sin().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(BF16), None if bias is None else bias.to(BF16))


# The three functions below see all tokens of a batch as one flat axis: their shapes do not depend
# on the sequence length, so torch.compile compiles each of them once for the whole curriculum.


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, q_w: Tensor, q_b: Tensor, k_w: Tensor,
    k_b: Tensor, v_w: Tensor, v_b: Tensor, dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h = rms_norm(x, norm).to(BF16)
    q = linear(h, q_w, q_b).view(x.shape[0], -1, dim)
    k = linear(h, k_w, k_b).view(x.shape[0], -1, dim)
    v = linear(h, v_w, v_b).view(x.shape[0], -1, dim)
    cos, sin = cos[:, None], sin[:, None]
    return rotate(q.float(), cos, sin).to(BF16), rotate(k.float(), cos, sin).to(BF16), v


def after_attention(
    x: Tensor, attended: Tensor, o_w: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    x = x + linear(attended, o_w).float()
    h = rms_norm(x, norm).to(BF16)
    h = F.silu(linear(h, gate).float()).to(BF16) * linear(h, up)
    return x + linear(h, down).float()


def head_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weighted sum of the losses, the losses and which tokens were predicted."""
    logits = linear(rms_norm(x, norm).to(BF16), embedding).float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum(), losses, logits.argmax(-1) == labels


class _ShortAttention(torch.autograd.Function):
    """Causal attention with explicit matrices.

    For 256 tokens forward and backward take 32 ms instead of 76 ms of the CPU flash attention
    (8192 tokens, 4 heads, 2 cores); from 512 tokens on flash is the faster one.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):  # type: ignore[no-untyped-def]
        p = torch.softmax(torch.matmul(q * scale, k.transpose(-1, -2)) + mask, -1)
        out = torch.matmul(p, v)
        ctx.save_for_backward(q, k, v, p, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        q, k, v, p, out = ctx.saved_tensors
        grad_v = torch.matmul(p.transpose(-1, -2), grad)
        delta = (grad.float() * out.float()).sum(-1, keepdim=True).to(BF16)
        grad_s = (torch.matmul(grad, v.transpose(-1, -2)) - delta).mul_(p)
        grad_q = torch.matmul(grad_s, k) * ctx.scale
        return grad_q, torch.matmul(grad_s.transpose(-1, -2), q) * ctx.scale, grad_v, None, None


class TinyModel:
    """The training forward pass.

    Args:
        config: Architecture.
        params: Parameters by their Hugging Face names.
        compile: Whether to fuse the element-wise work with torch.compile (needs a C++ compiler).
    """

    def __init__(
        self, config: TinyConfig, params: dict[str, Tensor], *, compile: bool = False
    ) -> None:
        self.config, self.params = config, params
        self._masks: dict[int, Tensor] = {}
        functions: list[Callable[..., object]] = [before_attention, after_attention, head_loss]
        if compile:
            functions = [torch.compile(function, dynamic=False) for function in functions]
        self._before, self._after, self._head = functions

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        length = q.shape[2]
        if length > 256:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        if length not in self._masks:
            self._masks[length] = torch.full((length, length), -1e9).triu(1).to(BF16)
        return _ShortAttention.apply(q, k, v, self._masks[length], scale)

    def loss(
        self, ids: Tensor, labels: Tensor, weights: Tensor, cos: Tensor, sin: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns head_loss of a batch.

        Args:
            ids: [batch, length].
            labels: [batch * length].
            weights: Weight of each label.
            cos: [batch * length, head_dim], RoPE table.
            sin: The same.
            temperature: Factor of the attention logits.
        """
        batch, length = ids.shape
        dim = self.config.head_dim
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        embedding = self.params["model.embed_tokens.weight"]
        x = F.embedding(ids.reshape(-1), embedding)
        for index in range(self.config.num_hidden_layers):
            layer = _Layer(self.params, index)
            q, k, v = (
                t.view(batch, length, -1, dim).transpose(1, 2)
                for t in self._before(
                    x, cos, sin, layer["input_layernorm.weight"],
                    *(layer[f"self_attn.{p}_proj.{w}"] for p in "qkv" for w in ("weight", "bias")),
                    dim,
                )
            )  # fmt: skip
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
            out = self._attention(q, k, v, temperature / math.sqrt(dim))
            x = self._after(
                x, out.transpose(1, 2).reshape(batch * length, -1),
                layer["self_attn.o_proj.weight"], layer["post_attention_layernorm.weight"],
                layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"],
                layer["mlp.down_proj.weight"],
            )  # fmt: skip
        return self._head(x, self.params["model.norm.weight"], embedding, labels, weights)


class _Layer:
    """The parameters of one layer by their short names."""

    def __init__(self, params: dict[str, Tensor], index: int) -> None:
        self._params, self._prefix = params, f"model.layers.{index}."

    def __getitem__(self, name: str) -> Tensor:
        return self._params[self._prefix + name]

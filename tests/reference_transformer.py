"""Transformers written out a second time, with the rules of AttnLRP or CP-LRP written into them.

Each function takes the weights of a model of the transformers library and runs its architecture from
the formulas: no module of that library, and no rule of ours, is called. Where a rule differs from
the gradient, parts are detached by hand, so that input × gradient is the relevance.

Source: Achtibat et al. 2024 (AttnLRP); Ali et al. 2022 (CP-LRP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class By:
    """The rules.

    Attributes:
        constant: Whether attention weights and gates are constant: CP-LRP; else AttnLRP.
        single: Whether attention weights are computed in single precision, as some models do.
    """

    constant: bool
    single: bool = False

    def product(self, a: Tensor, b: Tensor, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``f(a, b)``, half of whose relevance goes to each."""
        return 0.5 * f(a, b.detach()) + 0.5 * f(a.detach(), b)

    def weights(self, scores: Tensor) -> Tensor:
        """Softmax of scores ``[..., query, key]``."""
        if self.single:  # to its last bit
            return scores.float().softmax(-1).to(scores.dtype)
        e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        return e / e.sum(-1, keepdim=True)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Of queries, keys and values ``[B, heads, T, size]``."""
        n = q.shape[1] // k.shape[1]
        k, v = (torch.stack([t] * n, 2).flatten(1, 2) for t in (k, v))
        scores = self.product(q, k, lambda a, b: a @ b.transpose(-1, -2)) / q.shape[-1] ** 0.5
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        if self.constant:
            return self.weights(scores).detach() @ v
        return self.product(self.weights(scores), v, torch.matmul)

    def gated(self, gate: Tensor, signal: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """``activation(gate) · signal``."""
        opened = passed(gate, activation)
        if self.constant:
            return opened.detach() * signal
        return self.product(opened, signal, torch.mul)


def passed(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """An activation, the identity to relevance."""
    return x * (activation(x) / x).detach()


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def layer_norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    std = (centred**2).mean(-1, keepdim=True).add(eps).sqrt().detach()
    return centred / std * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x: Tensor, scale: Tensor, eps: float, inside: bool) -> Tensor:
    """In single precision, to its last bit; ``inside``: the scale is multiplied there, too."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps).detach()
    return (y * scale).to(x.dtype) if inside else y.to(x.dtype) * scale


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def by_head(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def gpt2(w: Weights, config, x: Tensor, by: By, activation=gelu_tanh, prefix="") -> Tensor:
    """From embeddings ``[B, T, E]`` to the last hidden states."""
    heads, eps = config.n_head, config.layer_norm_epsilon

    def conv(x: Tensor, name: str) -> Tensor:  # weights are transposed in this model
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = x + w[f"{prefix}wpe.weight"][: x.shape[1]]
    for i in range(config.n_layer):
        block = f"{prefix}h.{i}"
        y = conv(layer_norm(x, w, f"{block}.ln_1", eps), f"{block}.attn.c_attn")
        q, k, v = (by_head(part, heads) for part in y.split(x.shape[-1], -1))
        x = x + conv(together(by.attention(q, k, v, causal=True)), f"{block}.attn.c_proj")
        y = conv(layer_norm(x, w, f"{block}.ln_2", eps), f"{block}.mlp.c_fc")
        x = x + conv(passed(y, activation), f"{block}.mlp.c_proj")
    return layer_norm(x, w, f"{prefix}ln_f", eps)


def gpt2_logits(w: Weights, config, x: Tensor, by: By) -> Tensor:
    return linear(gpt2(w, config, x, by, prefix="transformer."), w, "lm_head")


def bert_logits(w: Weights, config, x: Tensor, by: By) -> Tensor:
    heads, eps, name = config.num_attention_heads, config.layer_norm_eps, "bert.embeddings"
    x = x + w[f"{name}.token_type_embeddings.weight"][0]
    x = x + w[f"{name}.position_embeddings.weight"][: x.shape[1]]
    x = layer_norm(x, w, f"{name}.LayerNorm", eps)
    for i in range(config.num_hidden_layers):
        block = f"bert.encoder.layer.{i}"
        own = f"{block}.attention"
        q, k, v = (
            by_head(linear(x, w, f"{own}.self.{part}"), heads) for part in ("query", "key", "value")
        )
        y = linear(together(by.attention(q, k, v, causal=False)), w, f"{own}.output.dense")
        x = layer_norm(x + y, w, f"{own}.output.LayerNorm", eps)
        y = passed(linear(x, w, f"{block}.intermediate.dense"), gelu)
        y = linear(y, w, f"{block}.output.dense")
        x = layer_norm(x + y, w, f"{block}.output.LayerNorm", eps)
    pooled = passed(linear(x[:, 0], w, "bert.pooler.dense"), torch.tanh)
    return linear(pooled, w, "classifier")


def rotated(x: Tensor, base: float) -> Tensor:
    """Rotary positions of ``[B, heads, T, size]``; angles are single precision in the models."""
    half = x.shape[-1] // 2
    speed = base ** -(torch.arange(0, 2 * half, 2).float() / (2 * half))
    angle = torch.arange(x.shape[-2]).float()[:, None] * speed
    cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def llama_logits(w: Weights, config, x: Tensor, by: By) -> Tensor:
    """Llama, Qwen2 and Gemma, which scales its norms by ``1 + w`` and gates by GELU."""
    gemma = config.model_type == "gemma"
    activation = gelu_tanh if gemma else silu
    base = config.rope_parameters["rope_theta"]

    def norm(x: Tensor, name: str) -> Tensor:
        scale = w[f"{name}.weight"]
        return rms_norm(x, 1 + scale.float() if gemma else scale, config.rms_norm_eps, inside=gemma)

    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}"
        y, own = norm(x, f"{block}.input_layernorm"), f"{block}.self_attn"
        q = by_head(linear(y, w, f"{own}.q_proj"), config.num_attention_heads)
        k = by_head(linear(y, w, f"{own}.k_proj"), config.num_key_value_heads)
        v = by_head(linear(y, w, f"{own}.v_proj"), config.num_key_value_heads)
        y = by.attention(rotated(q, base), rotated(k, base), v, causal=True)
        x = x + linear(together(y), w, f"{own}.o_proj")
        y, own = norm(x, f"{block}.post_attention_layernorm"), f"{block}.mlp"
        y = by.gated(linear(y, w, f"{own}.gate_proj"), linear(y, w, f"{own}.up_proj"), activation)
        x = x + linear(y, w, f"{own}.down_proj")
    return linear(norm(x, "model.norm"), w, "lm_head")


def vit_logits(w: Weights, config, x: Tensor, by: By) -> Tensor:
    """From pixels ``[B, channels, height, width]``."""
    size, eps, name = config.patch_size, config.layer_norm_eps, "vit.embeddings"
    patches = x.unfold(2, size, size).unfold(3, size, size)  # [B, C, rows, columns, size, size]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    projection = f"{name}.patch_embeddings.projection"
    x = patches @ w[f"{projection}.weight"].flatten(1).T + w[f"{projection}.bias"]
    x = torch.cat([w[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + w[f"{name}.position_embeddings"]
    for i in range(config.num_hidden_layers):
        block = f"vit.layers.{i}"
        y, own = layer_norm(x, w, f"{block}.layernorm_before", eps), f"{block}.attention"
        q, k, v = (
            by_head(linear(y, w, f"{own}.{part}_proj"), config.num_attention_heads)
            for part in "qkv"
        )
        x = x + linear(together(by.attention(q, k, v, causal=False)), w, f"{own}.o_proj")
        y = linear(layer_norm(x, w, f"{block}.layernorm_after", eps), w, f"{block}.mlp.fc1")
        x = x + linear(passed(y, gelu), w, f"{block}.mlp.fc2")
    return linear(layer_norm(x, w, "vit.layernorm", eps)[:, 0], w, "classifier")


def decision(w: Weights, config, inputs: list[Tensor], by: By) -> Tensor:
    """torchrl's decision transformer, from observation, action and return to hidden states."""
    observation, action, returns = inputs
    parts = (("return", returns), ("state", observation), ("action", action))
    x = torch.stack([linear(x, w, f"embed_{name}") for name, x in parts], 2).flatten(1, 2)
    x = layer_norm(x, w, "embed_ln", 1e-5)
    y = gpt2(w, config, x, by, activation=torch.relu, prefix="transformer.")
    return y.unflatten(1, (-1, 3))[:, :, 1]

"""LRP of torchrl's networks, slowly: relevance carried back by hand, in float64, agent by agent.

Nothing here calls the library. Networks whose parameters are stacked, shared or computed are first
turned into plain layers, one stack of them for each agent or member.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import NoisyLinear
from torchrl.modules.models.utils import SquashDims

import reference_lrp as ref
from rule_references import Reference, affine

Layers = Sequence[nn.Module]

AFFINE = (nn.Linear, nn.Conv2d)
EPSILON: Reference = affine(ref.epsilon)
ZPLUS: Reference = affine(ref.zplus)


# --- plain layers ---------------------------------------------------------------------------------


def plain_layers(net: nn.Module, weights: Callable[[str], Tensor] | None = None) -> list[nn.Module]:
    """The layers of a torchrl MLP or ConvNet as plain modules with weights of their own, in float64.

    Args:
        net: What the layers are read off.
        weights: From a parameter's path in ``net`` to its value; the net's own by default.
    """
    own = dict(net.named_parameters())
    weights = weights or (lambda path: own[path])
    return [
        _plain(path, layer, weights)
        for path, layer in net.named_modules()
        if not layer._modules or isinstance(layer, NoisyLinear)
    ]


def _plain(path: str, layer: nn.Module, weights: Callable[[str], Tensor]) -> nn.Module:
    if isinstance(layer, SquashDims):
        return nn.Flatten()
    twin: Any
    if isinstance(layer, NoisyLinear):
        twin = nn.Linear(layer.in_features, layer.out_features)
        given = noisy_weights(layer)
    elif isinstance(layer, nn.Linear):
        twin = nn.Linear(layer.in_features, layer.out_features)
        given = weights(f"{path}.weight"), weights(f"{path}.bias")
    elif isinstance(layer, nn.Conv2d):
        size: Any = layer.kernel_size
        twin = nn.Conv2d(layer.in_channels, layer.out_channels, size, stride=layer.stride[0])
        given = weights(f"{path}.weight"), weights(f"{path}.bias")
    else:
        assert not list(layer.parameters())
        return copy.deepcopy(layer)
    twin.double()
    for parameter, value in zip((twin.weight, twin.bias), given, strict=True):
        parameter.data = value.detach().double().clone()
    return twin


def noisy_weights(layer: Any) -> tuple[Tensor, Tensor]:
    """Fortunato et al. 2018, eq. 9: ``μ + σ ⊙ ε`` while exploring, ``μ`` otherwise."""
    if exploration_type() is not ExplorationType.RANDOM:
        return layer.weight_mu, layer.bias_mu
    weight = layer.weight_mu + layer.weight_sigma * layer.weight_epsilon
    return weight, layer.bias_mu + layer.bias_sigma * layer.bias_epsilon


def by_agent(net: Any) -> list[list[nn.Module]]:
    """The plain layers of each agent of a MultiAgentMLP or MultiAgentConvNet."""
    shared = bool(net.share_params)
    return [
        plain_layers(
            net._empty_net, lambda path, i=i: member(net.params, path, None if shared else i)
        )
        for i in range(net.n_agents)
    ]


def member(params: TensorDictBase, path: str, index: int | None) -> Tensor:
    """One member's parameter out of stacked ones, or the only one's."""
    value = params.get(tuple(path.split(".")))
    return value.data if index is None else value.data[index]


def values(layers: Layers, x: Tensor) -> list[Tensor]:
    """What goes into each layer, and what comes out of the last one."""
    found = [x.detach().double()]
    with torch.no_grad():
        for layer in layers:
            found.append(layer(found[-1]))
    return found


def output(layers: Layers, x: Tensor) -> Tensor:
    """What a stack of layers gives."""
    return values(layers, x)[-1]


def relevance(
    layers: Layers, x: Tensor, R: Tensor, dense: Reference = EPSILON, conv: Reference = ZPLUS
) -> Tensor:
    """Relevance of a stack's input ``[B, ...]``, given that of its output.

    Args:
        layers: Affine layers, and others that relevance passes.
        x: The input.
        R: Relevance of the output.
        dense: The rule of dense layers.
        conv: The rule of convolutions.
    """
    inputs = values(layers, x)[:-1]
    R = R.double()
    for layer, at in reversed(list(zip(layers, inputs, strict=True))):
        if not isinstance(layer, AFFINE):
            R = R.reshape(at.shape)
            continue
        if isinstance(layer, nn.Linear):
            (found,) = dense(layer, [at.flatten(0, -2)], R.flatten(0, -2))
        else:
            (found,) = conv(layer, [at], R)
        R = found.reshape(at.shape)
    return R


def at_entry(y: Tensor, *index: int) -> Tensor:
    """Relevance that starts at one entry of an output, with its value."""
    R = torch.zeros_like(y)
    R[(..., *index)] = y[(..., *index)]
    return R


# --- heads ----------------------------------------------------------------------------------------


def dueling(
    features: Layers, advantage: Layers, value: Layers, x: Tensor, actions: Tensor
) -> Tensor:
    """``Q_a = V + A_a - mean A`` (Wang et al. 2016, eq. 9), explained at the actions ``[B]``.

    Each summand of the Q-value gets itself as its relevance, and the features get the sum of what
    both heads give back.
    """
    hidden = output(features, x)
    each, state = output(advantage, hidden), output(value, hidden)
    n = each.shape[-1]
    chosen = nn.functional.one_hot(actions, n).double()
    R = relevance(advantage, hidden, each * (chosen - 1 / n)) + relevance(value, hidden, state)
    return relevance(features, x, R)


def distributional(layers: Layers, x: Tensor, support: Tensor, actions: Tensor) -> Tensor:
    """The expected value ``E = Σ p_k s_k`` over atoms, explained at the actions ``[B]``.

    A logit's relevance is itself times the slope of E, which is ``p_k (s_k - E)``.
    """
    logits = output(layers, x)  # [B, atoms · actions]
    shaped = logits.reshape(len(x), len(support), -1)
    p = shaped.softmax(1)
    slope = p * (support[:, None] - (p * support[:, None]).sum(1, keepdim=True))
    chosen = nn.functional.one_hot(actions, shaped.shape[-1]).double()
    return relevance(layers, x, (shaped * slope * chosen[:, None]).reshape(logits.shape))


def qmix(mixer: Any, q: Tensor, state: Tensor, *, alone: bool) -> tuple[Tensor, Tensor]:
    """Relevance of the agents' Q-values ``[B, n]`` and of the state ``[B, S]`` under QMIX.

    ``Q = elu(q |W(s)| + b(s)) · |w(s)| + V(s)`` (Rashid et al. 2018, fig. 2). Sums share by
    contribution, the elu passes, and both factors of a product get half (Achtibat et al. 2024,
    eq. 15), or where the state is ``alone`` in not being explained, the Q-values and hidden units
    get all.
    """
    half = 1.0 if alone else 0.5
    state = state.double()
    hyper_w, hyper_b, hyper_v = mixer.hyper_w_1, mixer.hyper_b_1, mixer.hyper_w_final
    with torch.no_grad():
        W = hyper_w(state).reshape(len(q), q.shape[1], -1)
        b, w, v = hyper_b(state), hyper_v(state), mixer.V(state)
    parts = q.double()[:, :, None] * W.abs()
    before = parts.sum(1) + b
    hidden = torch.where(before > 0, before, torch.expm1(before))
    at_product = hidden * w.abs()
    R_hidden = half * at_product
    shares = parts / before[:, None] * R_hidden[:, None]
    R_q = half * shares.sum(2)
    if alone:
        return R_q, torch.zeros_like(state)
    R_state = relevance([hyper_w], state, half * shares.reshape(len(q), -1))
    R_state = R_state + relevance([hyper_b], state, b / before * R_hidden)
    R_state = R_state + relevance([hyper_v], state, half * at_product)
    return R_q, R_state + relevance(list(mixer.V), state, v)


# --- the decision transformer ---------------------------------------------------------------------


def decision_transformer(
    actor: Any, inputs: tuple[Tensor, Tensor, Tensor], step: int, action: int, *, fixed: bool
) -> list[Tensor]:
    """AttnLRP (``fixed``: CP-LRP) of one number of one step's action, in torchrl's DTActor.

    The net of Chen et al. 2021: tokens (return, state, action) for each step, a GPT-2, a linear
    head on the states' tokens. Relevance of observation, action and return-to-go.
    """
    net = actor.transformer
    observation, acted, to_go = (t.double() for t in inputs)
    embeddings = (net.embed_return, net.embed_state, net.embed_action)
    with torch.no_grad():
        each = [e(t) for e, t in zip(embeddings, (to_go, observation, acted), strict=True)]
        tokens = torch.stack(each, 2).flatten(1, 2)  # [B, 3T, width]
        normed = net.embed_ln(tokens)
        x = normed + net.transformer.wpe.weight[: tokens.shape[1]]
        inside = [x]
        for block in net.transformer.h:
            inside.append(_block(block, inside[-1]))
        last = net.transformer.ln_f(inside[-1])
        hidden = last[:, 1::3]
        y = actor.action_layer(hidden)
    R = relevance([actor.action_layer], hidden, at_entry(y, step, action))
    R_last = torch.zeros_like(last)
    R_last[:, 1::3] = R
    R = ref.layer_norm(net.transformer.ln_f, inside[-1], R_last)
    for block, x in zip(reversed(net.transformer.h), reversed(inside[:-1]), strict=True):
        R = _block_back(block, x, R, fixed)
    R = R * normed / inside[0]  # positions take their part
    R = ref.layer_norm(net.embed_ln, tokens, R).unflatten(1, (-1, 3))
    found = [
        relevance([e], t, R[:, :, i])
        for i, (e, t) in enumerate(zip(embeddings, (to_go, observation, acted), strict=True))
    ]
    return [found[1], found[2], found[0]]


def _block(block: Any, x: Tensor) -> Tensor:
    """One block of GPT-2 in evaluation mode, spelled out."""
    middle = x + _dense(block.attn.c_proj)(_attended(block, x)[0])
    return middle + _dense(block.mlp.c_proj)(_dense(block.mlp.c_fc)(block.ln_2(middle)).relu())


def _dense(layer: Any) -> nn.Linear:
    """GPT-2's Conv1D, a dense layer with its weights transposed."""
    twin = nn.Linear(*layer.weight.shape).double()
    twin.weight.data, twin.bias.data = layer.weight.data.T.clone(), layer.bias.data.clone()
    return twin


def _attended(block: Any, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """What the heads give, side by side; their queries, keys and values; scores and weights."""
    heads = block.attn.num_heads
    three = _dense(block.attn.c_attn)(block.ln_1(x)).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in three)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    given = torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2)
    return given, [q, k, v], scores, weights


def _block_back(block: Any, x: Tensor, R: Tensor, fixed: bool) -> Tensor:
    with torch.no_grad():
        given, (q, k, v), scores, weights = _attended(block, x)
        attended = _dense(block.attn.c_proj)(given)
        middle = x + attended
        mlp: Layers = [_dense(block.mlp.c_fc), nn.ReLU(), _dense(block.mlp.c_proj)]
        normed = block.ln_2(middle)
        added = output(mlp, normed)
    # Sums share by contribution.
    total = middle + added
    R_middle = R * middle / total
    R_middle = R_middle + ref.layer_norm(
        block.ln_2, middle, _exactly(mlp, normed, R * added / total)
    )
    R_x, R_attended = R_middle * x / middle, R_middle * attended / middle
    R_given = _exactly([_dense(block.attn.c_proj)], given, R_attended)
    R_given = R_given.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
    # o_id = Σ_j a_ij v_jd: every term gets its part, and gives half to either factor, or all to v.
    terms = torch.einsum("bhij,bhjd->bhijd", weights, v)
    shares = terms / terms.sum(3, keepdim=True) * R_given[:, :, :, None]
    half = 1.0 if fixed else 0.5
    R_q, R_k, R_v = torch.zeros_like(q), torch.zeros_like(k), half * shares.sum(2)
    if not fixed:
        R_weights = half * shares.sum(-1)
        R_scores = scores * (R_weights - weights * R_weights.sum(-1, keepdim=True))
        terms = torch.einsum("bhid,bhjd->bhijd", q, k) / math.sqrt(q.shape[-1])
        shares = terms / scores[..., None] * R_scores[..., None]
        R_q, R_k = half * shares.sum(3), half * shares.sum(2)
    R_three = torch.cat([t.transpose(1, 2).flatten(2) for t in (R_q, R_k, R_v)], -1)
    R_normed = _exactly([_dense(block.attn.c_attn)], block.ln_1(x).detach(), R_three)
    return R_x + ref.layer_norm(block.ln_1, x, R_normed)


def _exactly(layers: Layers, x: Tensor, R: Tensor) -> Tensor:
    """Without a stabiliser: GPT-2's dense layers are calls of a function to the library."""
    return relevance(layers, x, R, dense=affine(ref.epsilon, eps=0.0))

"""Trains the shipped CartPole policy: `python -m tdhook_like.demo.train_cartpole`.

Proximal policy optimisation (Schulman et al. 2017) with TorchRL's collector, estimator and loss,
and one addition: an L1 penalty on the weights of the first layers. Nothing in the policy gradient
makes the initial random weights of a useless input go away; it only averages to zero on them. So
without a penalty the network goes on reading the distractors, attribution methods rightly say so,
and the demo's truth "the distractors do not matter" would hold for the return but not for the
logits. The penalty treats all inputs alike; only those that earn something keep their weights.

Takes one to three minutes, then measures what the policy relies on and writes the weights and a
record beside this file.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium
import tensordict
import torch
import torchrl
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import SerialEnv
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from tqdm import tqdm

from tdhook_like.demo.cartpole import (
    DISTRACTORS,
    EPISODE,
    KEYS,
    greedy_play,
    make_env,
    permuted_return,
)
from tdhook_like.demo.policy import WEIGHTS, KeyedMLP, make_actor, make_critic

with warnings.catch_warnings():
    # torchrl 0.14 warns about its own classes when its collectors are imported.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torchrl.collectors import Collector


@dataclass(frozen=True)
class Config:
    """Everything that settles a training run."""

    seed: int = 0
    batches: int = 100
    batch: int = 2048
    envs: int = 8
    epochs: int = 8
    minibatch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.01
    l1: float = 1e-3
    gamma: float = 0.99
    lmbda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    max_norm: float = 0.5


def first_weights(*networks: nn.Module) -> list[Tensor]:
    """The weights that meet the observation, one tensor per network."""
    found = [m for network in networks for m in network.modules() if isinstance(m, KeyedMLP)]
    return [cast(nn.Linear, m.layers[0]).weight for m in found]


def learn(
    data: TensorDictBase,
    loss: ClipPPOLoss,
    penalised: list[Tensor],
    optimiser: torch.optim.Optimizer,
    config: Config,
) -> None:
    """One epoch over a batch of experience, batch size [steps]."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for rows in torch.randperm(len(data)).split(config.minibatch):
        losses = loss(data[rows])
        total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
        total = total + config.l1 * sum(weight.abs().sum() for weight in penalised)
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, config.max_norm)
        optimiser.step()


def train(config: Config) -> tuple[ProbabilisticActor, ValueOperator]:
    """Trains from scratch, under a progress bar."""
    torch.manual_seed(config.seed)
    actor, critic = make_actor(), make_critic()
    env = SerialEnv(config.envs, make_env)
    env.set_seed(config.seed)
    frames = config.batches * config.batch
    collector = Collector(
        env,
        actor,
        frames_per_batch=config.batch,
        total_frames=frames,
        auto_register_policy_transforms=False,
    )
    advantage = GAE(gamma=config.gamma, lmbda=config.lmbda, value_network=critic, average_gae=True)
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=config.clip, entropy_coeff=config.entropy, critic_coeff=0.5
    )
    penalised = first_weights(actor, critic)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, config.batches)
    with tqdm(total=frames, unit="step", unit_scale=True) as bar:
        for data in collector:
            for _ in range(config.epochs):
                advantage(data)
                learn(data.reshape(-1), loss, penalised, optimiser, config)
            schedule.step()
            ended = data["next", "done"].sum().clamp(min=1)
            bar.set_postfix(length=f"{data.numel() / ended:.0f}")
            bar.update(data.numel())
    collector.shutdown()
    return actor, critic


def logit_shares(
    actor: ProbabilisticActor, states: TensorDictBase
) -> tuple[dict[str, float], float]:
    """Plain input × gradient of "this action rather than the other", key by key.

    Returns:
        each key's share of the absolute relevance, and in how many of the states, as a fraction,
        the key with the largest relevance is a true one.
    """
    inputs = [states[key].clone().requires_grad_() for key in KEYS]
    logits = cast(KeyedMLP, actor[0].module)(*inputs)
    margin = logits.max(-1).values - logits.min(-1).values
    gradients = torch.autograd.grad(margin.sum(), inputs)
    relevance = [(g * x).detach() for g, x in zip(gradients, inputs, strict=True)]
    absolute = torch.stack([r.abs().sum(-1) for r in relevance], -1)
    by_key = torch.stack([r.sum(-1) for r in relevance], -1).abs()
    shares = absolute.sum(0) / absolute.sum()
    true_on_top = by_key.argmax(-1) < len(KEYS) - len(DISTRACTORS)
    return dict(zip(KEYS, shares.tolist(), strict=True)), true_on_top.float().mean().item()


def measure(actor: ProbabilisticActor) -> dict[str, Any]:
    """What the policy earns, and what it relies on, over 100 fresh episodes each."""
    states, returns = greedy_play(actor, episodes=100, seed=1000)
    without = {
        key: permuted_return(actor, key, episodes=100, seed=2000, donors=states).mean().item()
        for key in KEYS
    }
    shares, true_on_top = logit_shares(actor, states)
    pole, echo = states["pole"][:, 0], states["echo"].unbind(-1)
    return {
        "return": returns.mean().item(),
        "lowest return": returns.min().item(),
        "return without": without,
        "share of input x gradient": shares,
        "true key on top": true_on_top,
        "correlation of echo and angle": [
            torch.corrcoef(torch.stack([pole, e]))[0, 1].item() for e in echo
        ],
    }


def main() -> None:
    """Trains, measures, and writes the weights and the record, if the policy is a perfect one."""
    # Networks this small gain nothing from a second thread, and sums keep their order.
    torch.set_num_threads(1)
    config = Config()
    actor, critic = train(config)
    measured = measure(actor)
    print(json.dumps(measured, indent=2))
    if measured["lowest return"] < EPISODE:
        raise SystemExit("the policy is not perfect: nothing was written; try another seed")
    here = Path(__file__).parent
    weights = {
        name: {key: value.detach().clone() for key, value in network.state_dict().items()}
        for name, network in (("actor", actor), ("critic", critic))
    }
    torch.save(weights, here / WEIGHTS)
    packages = (torch, tensordict, torchrl, gymnasium)
    record = {
        "frames": config.batches * config.batch,
        "measured over 100 episodes": measured,
        "config": asdict(config),
        "versions": {package.__name__: str(package.__version__) for package in packages},
    }
    (here / WEIGHTS).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The main job: a trained policy in its environment, explained per key, checked against the cause.

Run it as ``python -m tdhook_like demo``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import ExplorationType, set_exploration_type
from tqdm import tqdm

from tdhook_like import LRP, InputXGradient, IntegratedGradients, Method, Taken
from tdhook_like.attribution.lrp import EpsilonPlus, GammaRule, Rule
from tdhook_like.demo.cartpole import (
    CAUSES,
    EPISODE,
    FEATURES,
    KEYS,
    greedy_play,
    make_env,
    permuted_return,
)
from tdhook_like.demo.policy import load_policy
from tdhook_like.metrics import KeyShares, key_shares

__all__ = ["Findings", "explain", "main", "report"]

TARGET = Taken("logits").against_rest()
"""Why this action rather than the other one: the logit's lead."""

LEAD = "the lead of the action taken"
"""The target in words, for pictures."""


def gamma_below(path: str, module: nn.Module) -> Rule | None:
    """Gamma on all dense layers but the last: epsilon alone is input × gradient on a ReLU net."""
    return GammaRule(0.25) if isinstance(module, nn.Linear) and module.out_features > 2 else None


METHODS: dict[str, Method] = {
    "LRP": LRP(EpsilonPlus(rule_mapper=gamma_below), TARGET),
    "integrated gradients": IntegratedGradients(TARGET, n_steps=64),
    "input × gradient": InputXGradient(TARGET),
}

MATTERS = 0.9
"""A key whose exchange leaves less than this share of the return is one that the policy needs."""


@dataclass
class Findings:
    """What the demo found.

    Attributes:
        rollout: The episodes, ``[episodes, steps]``, with attributions under ``(method, "attr")``.
        shares: Each method's shares per key.
        gap: Mean size of the completeness gap of integrated gradients, over that of the scores.
        returns: The return, undisturbed.
        without: The return when a key's values are exchanged, by key.
        unchanged: Whether the model's bytes are the same before and after.
        same_trajectory: Whether the plain policy plays the same episodes, bit for bit.
    """

    rollout: TensorDictBase
    shares: dict[str, KeyShares]
    gap: float
    returns: float
    without: dict[str, float]
    unchanged: bool
    same_trajectory: bool

    @property
    def needed(self) -> set[str]:
        """The keys that the policy needs, by the ground truth."""
        return {key for key, value in self.without.items() if value < MATTERS * self.returns}

    def agrees(self, method: str) -> bool:
        """Whether a method ranks every needed key before every other one."""
        share = {key: self.shares[method].summary[key].share for key in KEYS}
        others = set(KEYS) - self.needed
        return min(share[key] for key in self.needed) > max(share[key] for key in others)

    @property
    def passed(self) -> bool:
        """Whether attribution and ground truth agree, and nothing was changed."""
        agree = all(self.agrees(method) for method in self.shares)
        return agree and self.needed == set(CAUSES) and self.unchanged and self.same_trajectory


def fingerprint(module: nn.Module) -> str:
    """A digest of every parameter and buffer of a module."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def play(policy: nn.Module, episodes: int, seed: int, label: str) -> TensorDictBase:
    """Greedy episodes in torchrl's environment, ``[episodes, steps]``, under a progress bar."""
    rollouts = []
    with tqdm(total=episodes * EPISODE, desc=label, unit="step") as bar:
        for i in range(episodes):
            with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
                env = make_env(seed + i)
                rollouts.append(
                    env.rollout(EPISODE, policy=cast(Any, policy), callback=lambda *_: bar.update())
                )
                env.close()
    return cast(TensorDict, torch.stack([r[: min(map(len, rollouts))] for r in rollouts]))


def explain(episodes: int = 4, seed: int = 0) -> Findings:
    """Plays, explains, and measures the cause.

    Args:
        episodes: How many episodes are explained, and how many the ground truth is averaged over.
        seed: Settles starts, gusts and distractors.
    """
    policy = load_policy()
    before = fingerprint(policy)
    with METHODS["LRP"].prepare(policy) as hooked:
        td = play(hooked, episodes, seed, "LRP, driving")
    plain = play(policy, episodes, seed, "plain")
    names = [("action",), ("next", "reward"), *((key,) for key in KEYS)]
    same = all(torch.equal(td[name], plain[name]) for name in names)

    results = TensorDict({"LRP": td.select("attr")}, td.batch_size)
    for name, method in tqdm(METHODS.items(), desc="explaining the record", unit="method"):
        if name == "LRP":
            continue
        with method.prepare(policy) as hooked:
            found = hooked.observe(td.select(*KEYS, "action"))
        results[name] = found.select("attr", "attr_gap", strict=False)
    rollout = td.select(*KEYS, "action", "logits", ("next", "reward"))
    rollout.names = [None, "time"]
    for name in results.keys():  # noqa: SIM118 (a TensorDict is not a dict)
        rollout[name] = results[name]

    donors, returns = greedy_play(policy, episodes=20, seed=seed + 100)
    without = {}
    for key in tqdm(KEYS, desc="exchanging keys", unit="key"):
        found = permuted_return(policy, key, episodes=20, seed=seed + 100, donors=donors)
        without[key] = found.mean().item()
    logits = rollout["logits"]
    chosen = logits.gather(-1, rollout["action"].unsqueeze(-1)).squeeze(-1)
    scores = 2 * chosen - logits.sum(-1)
    gap = rollout["integrated gradients", "attr_gap"].abs().mean() / scores.abs().mean()
    return Findings(
        rollout=rollout,
        shares={name: key_shares(rollout, root=(name, "attr")) for name in METHODS},
        gap=gap.item(),
        returns=returns.mean().item(),
        without=without,
        unchanged=fingerprint(policy) == before,
        same_trajectory=same,
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, the first column left, the others right.

    >>> print(table([["key", "share"], ["cart", "38 %"]]))
    key   share
    cart   38 %
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def report(found: Findings) -> str:
    """What was found, as text."""
    head = ["key", *(f"{name}" for name in found.shares), "return without it"]
    rows = [head]
    for key in KEYS:
        cells = []
        for shares in found.shares.values():
            low, high = shares.summary[key].share_interval
            cells.append(f"{shares.summary[key].share:6.1%} [{low:.1%}, {high:.1%}]")
        rows.append([key, *cells, f"{found.without[key]:.0f} of {found.returns:.0f}"])
    n = next(iter(found.shares.values())).n_elements
    first = {name: s.first_rate(list(CAUSES)) for name, s in found.shares.items()}
    agreed = [name for name in found.shares if found.agrees(name)]
    lines = [
        f"Why this action rather than the other: share of absolute relevance, {n} decisions",
        "",
        table(rows),
        "",
        "a true key ranks first   " + ", ".join(f"{name} {r:.1%}" for name, r in first.items()),
        f"completeness gap         {found.gap:.2%} of the score (integrated gradients, mean)",
        f"needed by the policy     {', '.join(sorted(found.needed))} (exchanging them costs return)",
        f"methods that agree       {', '.join(agreed) or 'none'}",
        f"model unchanged          {'yes, every byte' if found.unchanged else 'NO'}",
        f"trajectory unchanged     {'yes, bit for bit' if found.same_trajectory else 'NO'}",
    ]
    return "\n".join(lines)


def features(rollout: TensorDictBase, method: str, index: tuple[int, ...]) -> dict[str, float]:
    """One decision's relevance by feature."""
    found: Mapping[str, Tensor] = {key: rollout[method, "attr", key][index] for key in KEYS}
    return {
        f"{key}: {name}": value.item()
        for key in KEYS
        for name, value in zip(FEATURES[key], found[key], strict=True)
    }


def draw(found: Findings, folder: Path) -> list[Path]:
    """The pictures: per-key bars, an episode as a heat map, one decision as a waterfall."""
    from tdhook_like.viz import episode_heatmap, key_bars, waterfall

    truth = {key: found.returns - value for key, value in found.without.items()}
    paths = [folder / name for name in ("keys.png", "episode.png", "decision.png")]
    key_bars(
        found.shares, target=LEAD, truth=truth, truth_label="return lost without it", path=paths[0]
    )
    episode = {key: found.rollout["LRP", "attr", key][0] for key in KEYS}
    episode_heatmap(
        episode,
        found.rollout["action"][0],
        target=LEAD,
        feature_names=FEATURES,
        action_names=["push left", "push right"],
        path=paths[1],
    )
    logits, action = found.rollout["logits"], found.rollout["action"]
    scores = 2 * logits.gather(-1, action.unsqueeze(-1)).squeeze(-1) - logits.sum(-1)
    step = int(scores[0].argmax())
    parts = features(found.rollout, "LRP", (0, step))
    total = scores[0, step].item()
    waterfall(
        parts,
        total=total,
        target=f"{LEAD} (episode 0, step {step})",
        bias=total - sum(parts.values()),
        path=paths[2],
    )
    return paths


def main(folder: str = "demo_out", episodes: int = 4, seed: int = 0) -> int:
    """Runs the demo, prints and writes what it finds.

    Args:
        folder: Where the attributions (a memory-mapped TensorDict) and the pictures go.
        episodes: How many episodes are explained.
        seed: Settles the episodes.

    Returns:
        The exit status: 0 if attribution and ground truth agree and nothing was changed.
    """
    found = explain(episodes, seed)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    found.rollout.memmap(str(out / "attributions"), copy_existing=True)
    loaded = TensorDict.load_memmap(str(out / "attributions"))
    whole = all(torch.equal(loaded[k], v) for k, v in found.rollout.items(True, True))
    pictures = draw(found, out)
    print("\n" + report(found))
    print(
        f"attributions             {out / 'attributions'} ({'loads back' if whole else 'DAMAGED'})"
    )
    print(f"pictures                 {', '.join(str(path) for path in pictures)}")
    verdict = found.passed and whole
    print("\n" + ("Attribution and ground truth agree." if verdict else "THEY DO NOT AGREE."))
    return 0 if verdict else 1

"""The networks that the benchmark explains: sizes as in practice, random weights, plain torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn


def mlp(outputs: int) -> nn.Module:
    """A policy as PPO trains it on a state of 64 numbers."""
    return nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, outputs),
    )


def nature(outputs: int) -> nn.Module:
    """The Atari network of Mnih et al. 2015: four stacked frames of 84 × 84."""
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, outputs),
    )


def vgg(outputs: int) -> nn.Module:
    """Configuration A (11 weight layers) of Simonyan & Zisserman 2015, for images of 64 × 64."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 2 * 2, 4096), nn.ReLU()]
    layers += [nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, outputs)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Two convolutions and a shortcut that is added functionally, as most code does it."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to [B, width, H / stride, W / stride]."""
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(outputs: int) -> nn.Module:
    """The 18-layer network of He et al. 2016, batch norms in evaluation mode."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(channels, width, stride), Residual(width, width, 1)]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs)]
    return nn.Sequential(*layers)


class LastToken(nn.Module):
    """A language model's logits at the last position, from embedded tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, features] to [B, vocabulary]."""
        return self.model(inputs_embeds=x).logits[:, -1]


def gpt2(outputs: int) -> nn.Module:
    """A small GPT-2 of Hugging Face's, as it is: four blocks, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=256, n_layer=4, n_head=4, n_positions=64, vocab_size=outputs, use_cache=False
    )
    return LastToken(GPT2LMHeadModel(config))


def chain(outputs: int) -> nn.Module:
    """Five hundred modules that compute nothing: what is left is the cost of reaching them."""
    del outputs
    return nn.Sequential(*(nn.Identity() for _ in range(500)))


_MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (64,)),
    "nature": (nature, (4, 84, 84)),
    "vgg": (vgg, (3, 64, 64)),
    "resnet": (resnet, (3, 64, 64)),
    "gpt2": (gpt2, (64, 256)),
    "chain": (chain, (16,)),
}
NEEDS = {"gpt2": "transformers"}
MODELS = tuple(_MODELS)


def available(name: str) -> bool:
    """Tell whether what a model needs is installed."""
    return importlib.util.find_spec(NEEDS[name]) is not None


def build(name: str, batch: int, outputs: int) -> tuple[nn.Module, Tensor]:
    """Give the named network in evaluation mode and a batch of inputs for it."""
    torch.manual_seed(0)
    make, shape = _MODELS[name]
    return make(outputs).eval(), torch.rand(batch, *shape)

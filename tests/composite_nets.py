"""Small nets of each kind that composites are for."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """A residual block; the sum is a function."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 1, bias=not norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.bn1(self.conv1(x))))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
    )


def vgg() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU()),
        *(nn.MaxPool2d(3, 1), nn.AvgPool2d(1), nn.Flatten()),
        *(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2)),
    )


def resnet(norm: bool = True) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 2), nn.ReLU(), Block(2, norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)),
    )

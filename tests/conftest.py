"""What every test gets: one thread, a seed of its own, every device that is present."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Parallel workers share few cores, and one thread sums in one order.
torch.set_num_threads(1)

# The same examples on every run, and no deadline: a loaded machine is slow, not wrong.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _seed_of_its_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed from the test's name, so that neither order nor selection changes what it sees."""
    seed = zlib.crc32(request.node.name.encode())
    random.seed(seed)
    torch.manual_seed(seed)
    yield


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has."""
    return torch.device(request.param)

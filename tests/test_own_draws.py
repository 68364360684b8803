"""Draws from private generators: the same numbers, and nobody else's generator moves."""

from __future__ import annotations

import random

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from tdhook_like.randomness import ForeignDraws, OwnDraws, moved, restore_rng, rng_state


def drawn() -> list[Tensor]:
    """Operations that take a generator, that have a variant with one, and that have none."""
    x = torch.ones(50)
    return [
        torch.rand(3),
        F.dropout(x, 0.5, training=True),
        torch.randint(9, (4,)),
        torch.normal(0.0, 1.0, (3,)),
        torch.bernoulli(x / 2),
        torch.multinomial(x, 5),
        F.rrelu(-x, training=True),
        torch.empty(4).uniform_(),
        torch.randperm(7),
        torch.native_dropout(x, 0.5, True)[0],
        torch.native_dropout(x, 0.5, True)[0],
    ]


def test_what_is_drawn_is_what_the_shared_generator_would_have_given():
    state = torch.get_rng_state()
    with OwnDraws() as draws:
        found = drawn()
    assert draws.drew and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(found, drawn(), strict=True))


def test_a_block_may_begin_elsewhere_and_blocks_go_on_where_they_ended():
    start = rng_state([])
    first, second = drawn(), drawn()
    assert moved(start)
    draws = OwnDraws(start)
    for expected in (first, second):
        with draws:
            assert all(torch.equal(a, b) for a, b in zip(drawn(), expected, strict=True))
    restore_rng(start)
    assert not moved(start) and torch.equal(drawn()[0], first[0])


def test_a_generator_that_is_given_is_the_one_that_is_drawn_from():
    def generators() -> tuple[torch.Generator, torch.Generator]:
        return torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)

    given, twin = generators()
    with OwnDraws():
        found = [torch.rand(3, generator=given), torch.empty(3).normal_(generator=given)]
    expected = [torch.rand(3, generator=twin), torch.empty(3).normal_(generator=twin)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(given.get_state(), twin.get_state())


def test_what_draws_nothing_is_known_to():
    with OwnDraws() as draws:
        torch.ones(3).cumsum(0)
    assert not draws.drew


def test_pythons_and_numpys_generators_are_put_back_if_they_moved():
    python, array = random.getstate(), numpy.random.get_state()
    with ForeignDraws():
        random.random()
        numpy.random.seed(1)  # another state at the same position
        numpy.random.rand(3)
    assert random.getstate() == python
    now = numpy.random.get_state()
    assert (now[1] == array[1]).all() and now[2] == array[2]


def test_numpys_generator_is_put_back_also_where_its_position_is_the_same():
    numpy.random.seed(0)
    before = numpy.random.get_state()
    with ForeignDraws():
        numpy.random.seed(1)
    assert (numpy.random.get_state()[1] == before[1]).all()

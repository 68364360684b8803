"""Rules are on for one call, in one thread; on every way out nothing of them is left in torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from pristine import assert_same, snapshot
from tdhook_like.hooks.functional import Functions
from tdhook_like.hooks.installation import Installation

TABLES = [name for name in vars(nn_module) if name.startswith("_global") and name.endswith("hooks")]
TABLES += ["_global_forward_hooks_always_called", "_global_forward_hooks_with_kwargs"]


def doubled(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output * 2


def ignored(*_: Any) -> None:
    """A handler without an opinion."""


def on(*pairs: Any) -> list[Any]:
    """Modules and their handlers, as an installation takes them."""
    return list(pairs)


@pytest.fixture(autouse=True)
def _no_residue() -> Iterator[None]:
    before = {name: dict(getattr(nn_module, name)) for name in TABLES}
    photograph = snapshot()
    yield
    assert {name: dict(getattr(nn_module, name)) for name in TABLES} == before
    assert_same(photograph, snapshot(), ignoring=["random state"])


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


def test_a_handler_sees_the_call_and_replaces_its_output(net):
    seen: list[Any] = []

    def handler(module, args, kwargs, output):
        seen.append((module, args, kwargs, output))
        return output * 2

    x = torch.randn(2, 3)
    plain = net[0](x)
    with Installation(on((net[0], handler))):
        assert torch.equal(net[0](x), plain * 2)
        net[0](input=x)
    assert torch.equal(net[0](x), plain)
    module, args, kwargs, output = seen[0]
    assert module is net[0] and args[0] is x and kwargs == {} and torch.equal(output, plain)
    assert seen[1][1] == () and seen[1][2]["input"] is x


def test_a_handler_without_an_opinion_leaves_the_output_itself(net):
    x = torch.randn(2, 3)
    outputs = []
    with Installation(on((net, lambda m, a, k, output: outputs.append(output)))):
        assert net(x) is outputs[0]


def test_an_observer_sees_the_call_ahead_of_it(net):
    seen: list[Any] = []
    x = torch.randn(2, 3)
    with Installation([], on((net[1], lambda module, args: seen.append(args[0])))):
        y = net(x)
    assert torch.equal(seen[0], net[0](x)) and torch.equal(y, net(x))


def test_no_module_carries_anything_while_rules_are_on(net):
    before = snapshot(net)
    with Installation(on((net[0], doubled), (net, ignored)), on((net[1], ignored))):
        net(torch.randn(2, 3))
        assert_same(before, snapshot(net), ignoring=["torch: ", "python: "])
    assert_same(before, snapshot(net), ignoring=["random state"])


def test_only_the_named_module_is_answered_whatever_it_takes_itself_for():
    class Same(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Same)

        def __hash__(self) -> int:
            return 0

    one, other, third = Same(3, 3), Same(3, 3), Same(3, 3)
    x = torch.randn(3)
    with Installation(on((one, doubled))):
        assert torch.equal(one(x), one.forward(x) * 2)
        assert torch.equal(other(x), other.forward(x))
    with Installation(on((one, doubled), (other, lambda m, a, k, output: output * 3))):
        assert torch.equal(one(x), one.forward(x) * 2)
        assert torch.equal(other(x), other.forward(x) * 3)
        assert torch.equal(third(x), third.forward(x))


def test_two_installations_in_one_another_each_answer_and_may_end_in_any_order(net):
    x = torch.randn(3)
    plain = net[0](x)
    first, second = Installation(on((net[0], doubled))), Installation(on((net[0], doubled)))
    first.__enter__()
    second.__enter__()
    assert torch.equal(net[0](x), plain * 4)
    first.__exit__(None, None, None)
    assert torch.equal(net[0](x), plain * 2)
    second.__exit__(None, None, None)
    assert torch.equal(net[0](x), plain)


def test_ending_twice_does_nothing_and_an_installation_can_be_used_again(net):
    x = torch.randn(3)
    installation = Installation(on((net[0], doubled)))
    for _ in range(2):
        with installation:
            assert torch.equal(net[0](x), net[0].forward(x) * 2)
        installation.__exit__(None, None, None)


# --- ways out -------------------------------------------------------------------------------------


class Trouble(BaseException):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, GeneratorExit, RuntimeError])
@pytest.mark.parametrize("place", ["the block", "a handler", "an observer", "the model"])
def test_an_error_anywhere_takes_everything_off(net, place, error):
    def raises(*_: Any) -> None:
        raise error

    if place == "the model":
        net[1].forward = raises
    after = on((net[2], raises if place == "a handler" else ignored))
    before = on((net[0], raises if place == "an observer" else ignored))
    with pytest.raises(error), Installation(after, before):
        if place == "the block":
            raise error
        net(torch.randn(3))


def doubling(function: Any) -> Any:
    """Doubles what relu gives."""
    if function is not torch.relu:
        return None
    return lambda func, args, kwargs: 2 * func(*args, **kwargs)


def test_functions_are_replaced_while_the_model_runs_and_not_after_an_error():
    mode, one = Functions(doubling), torch.ones(1)
    with contextlib.suppress(Trouble), Installation([], functions=mode):
        assert torch.relu(one) == 1  # nothing runs yet
        mode.running += 1
        assert torch.relu(one) == 2
        raise Trouble
    assert torch.relu(one) == 1


def test_functions_are_left_alone_inside_modules_that_answer_for_themselves():
    class Rectified(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such input")

    mode, one = Functions(doubling), torch.ones(1)
    closed, other, failing = Rectified(), Rectified(), Failing()
    with Installation([], functions=mode, closed=[closed, failing]):
        mode.running += 1
        assert closed(one) == 1 and other(one) == 2
        with pytest.raises(ValueError):
            failing(one)
        assert other(one) == 2  # a module that failed is not inside any more


def test_a_mode_that_cannot_be_entered_takes_the_rules_off(net):
    class Refusing(Functions):
        def __enter__(self) -> Any:
            raise Trouble

    with pytest.raises(Trouble):
        Installation(on((net[0], doubled)), functions=Refusing(doubling)).__enter__()
    x = torch.ones(3)
    assert torch.equal(net[0](x), net[0].forward(x))


def test_a_generator_that_is_dropped_half_way_takes_its_rules_off(net):
    def steps() -> Iterator[Tensor]:
        with Installation(on((net[0], doubled))):
            while True:
                yield net[0](torch.ones(3))

    walking = steps()
    assert torch.equal(next(walking), net[0].forward(torch.ones(3)) * 2)
    del walking
    assert torch.equal(net[0](torch.ones(3)), net[0].forward(torch.ones(3)))


def test_global_hooks_of_others_stay_where_they_are(net):
    seen: list[nn.Module] = []
    handle = nn_module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        with Installation(on((net[0], doubled))):
            net[0](torch.ones(3))
        net[0](torch.ones(3))
        assert seen == [net[0], net[0]]
    finally:
        handle.remove()


# --- threads --------------------------------------------------------------------------------------


def in_another_thread(call: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_calls_in_other_threads_see_nothing_of_it(net):
    x = torch.randn(3)
    observed: list[Any] = []
    with Installation(on((net[0], doubled)), on((net[0], lambda m, a: observed.append(a)))):
        assert torch.equal(in_another_thread(lambda: net[0](x)), net[0].forward(x))
        assert observed == []
        assert torch.equal(net[0](x), net[0].forward(x) * 2)


def test_each_thread_has_its_own_rules_on_the_same_module(net):
    x = torch.randn(3)
    plain = net[0].forward(x)
    barrier, found = threading.Barrier(4), {}

    def work(factor: int) -> None:
        with Installation(on((net[0], lambda m, a, k, output: output * factor))):
            barrier.wait()
            found[factor] = [net[0](x) for _ in range(50)]
            barrier.wait()

    threads = [threading.Thread(target=work, args=(factor,)) for factor in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor, values in found.items():
        assert all(torch.equal(value, plain * factor) for value in values)
    assert len(found) == 4

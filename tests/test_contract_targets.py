"""The contract about targets: every form against plain autograd, all from one forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from heads_model import METHODS, inputs, model, reference, rest, taken
from tdhook_like import (
    LRP,
    Contrast,
    Each,
    Function,
    Greedy,
    IntegratedGradients,
    Output,
    Saliency,
    Taken,
    TargetError,
)
from tdhook_like.attribution.lrp import Rule

# A target, and the number per element that it means, from the outputs.
FORMS: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
    "a key": ("state_value", lambda td: td["state_value"]),
    "a key of numbers": ("square", lambda td: td["square"]),
    "a key and an index": (("logits", 2), lambda td: td["logits"][..., 2]),
    "a negative index": (("logits", -3), lambda td: td["logits"][..., 0]),
    "a nested key and indices": (
        ("agents", "table", 1, 2), lambda td: td["agents", "table"][..., 1, 2],
    ),
    "an ellipsis": ((("agents", "table"), 0, ..., 1), lambda td: td["agents", "table"][..., 0, 1]),
    "an output": (Output("logits", 1), lambda td: td["logits"][..., 1]),
    "an output's entry": (Output("logits")[1], lambda td: td["logits"][..., 1]),
    "the action taken": (Taken("logits"), taken),
    "an index with a last one": (Taken("logits", "index"), taken),
    "a one-hot action": (Taken("logits", "one_hot"), taken),
    "a mask for an action": (Taken("logits", action="mask"), taken),
    "a floating one-hot action": (Taken("logits", action="float"), taken),
    "the greedy action": (Greedy("logits"), lambda td: td["logits"].max(-1).values),
    "greedy of each row": (
        Greedy(("agents", "table"))[1], lambda td: td["agents", "table"][..., 1, :].max(-1).values,
    ),
    "a contrast": (
        Contrast(Output("logits", 0), Output("logits", 2)),
        lambda td: td["logits"][..., 0] - td["logits"][..., 2],
    ),
    "a difference": (Taken("logits") - ("logits", 0), lambda td: taken(td) - td["logits"][..., 0]),
    "a difference from the left": (
        ("logits", 0) - Greedy("logits"),
        lambda td: td["logits"][..., 0] - td["logits"].max(-1).values,
    ),
    "a difference of values": (
        Output("state_value") - "square", lambda td: td["state_value"].squeeze(-1) - td["square"],
    ),
    "an entry against the rest": (
        Output("logits", 1).against_rest(), lambda td: td["logits"][..., 1] - rest(td, 1),
    ),
    "the taken action against the rest": (
        Taken("logits").against_rest(),
        lambda td: taken(td) - (td["logits"].sum(-1) - taken(td)) / 2,
    ),
    "the greedy action against the rest": (
        Greedy("logits").against_rest(),
        lambda td: 1.5 * td["logits"].max(-1).values - 0.5 * td["logits"].sum(-1),
    ),
    "an entry of a table against the rest of its row": (
        Output(("agents", "table"), 1, 0).against_rest(),
        lambda td: td["agents", "table"][..., 1, 0] - td["agents", "table"][..., 1, 1:].mean(-1),
    ),
    "a function": (lambda td: td["logits"].logsumexp(-1), lambda td: td["logits"].logsumexp(-1)),
    "a function with a last one": (
        Function(lambda td: td["state_value"] ** 3), lambda td: td["state_value"] ** 3,
    ),
    "a function of outputs and inputs": (
        lambda td: td["state_value"].squeeze(-1) * td["action"],
        lambda td: td["state_value"].squeeze(-1) * td["action"],
    ),
    "a contrast with a function": (
        Output("square") - (lambda td: td["logits"].mean(-1)),
        lambda td: td["square"] - td["logits"].mean(-1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch", [(5,), (), (2, 3), (1,)], ids=str)
@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("form", FORMS)
def test_a_target_is_the_number_that_it_names(form, drive, batch):
    target, number = FORMS[form]
    policy, td = model(), inputs(*batch)
    expected = reference(policy, td, number)
    with Saliency(target, abs=False).prepare(policy) as hooked:
        found = (hooked if drive else hooked.observe)(td)["attr", "observation"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_all_forms_together_are_what_they_are_apart(method):
    policy, td = model(), inputs(5)
    with METHODS[method]({name: form for name, (form, _) in FORMS.items()}).prepare(
        policy
    ) as hooked:
        together = hooked(td.clone())["attr"]
    for name, (form, _) in FORMS.items():
        with METHODS[method](form).prepare(policy) as hooked:
            apart = hooked(td.clone())["attr", "observation"]
        torch.testing.assert_close(together[name, "observation"], apart)


@pytest.mark.parametrize("drive", [True, False], ids=["driving", "observing"])
@pytest.mark.parametrize("method", METHODS)
def test_several_named_targets_take_as_many_forwards_as_one(method, drive):
    policy, td = model(), inputs(5)

    def forwards(target: Any) -> list[int]:
        with METHODS[method](target).prepare(policy) as hooked:
            call = hooked if drive else hooked.observe
            call(td.clone())  # which decides upon the layout
            policy.module.calls.rows.clear()
            call(td.clone())
        return list(policy.module.calls.rows)

    several = {"a": "state_value", "b": ("logits", 0), "c": Greedy("logits"), "d": Taken("logits")}
    entries = {"a": "state_value", "b": ("logits", 0), "c": ("logits", 1)}
    assert forwards(entries) == forwards("state_value") != []
    # Which entry is meant has to be looked up in a run, for several targets as for one.
    assert forwards(several) == forwards(Greedy("logits")) == forwards(Each("logits")) != []
    if method != "integrated gradients":
        assert forwards(several) == [5]


@pytest.mark.parametrize("batch", [(5,), (), (2, 3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_each_output_is_a_target_in_a_dimension_behind_the_batch(method, batch):
    policy, td = model(), inputs(*batch)
    with METHODS[method](Each("logits")).prepare(policy) as hooked:
        each = hooked(td.clone())
    assert each["attr", "observation"].shape == (*batch, 3, 4)
    for i in range(3):
        with METHODS[method](("logits", i)).prepare(policy) as hooked:
            one = hooked(td.clone())
        torch.testing.assert_close(
            each["attr", "observation"][..., i, :], one["attr", "observation"]
        )
        if method == "integrated gradients":
            assert each["attr_gap"].shape == (*batch, 3)
            torch.testing.assert_close(
                each["attr_gap"][..., i], one["attr_gap"], rtol=1e-3, atol=1e-6
            )


def test_each_stands_beside_other_targets_and_lays_a_table_out_row_by_row():
    policy, td = model(), inputs(5)
    targets = {
        "value": "state_value",
        "each": Each(("agents", "table")),
        "one": Each("state_value"),
    }
    with Saliency(targets, abs=False).prepare(policy) as hooked:
        hooked(td)
    assert td["attr", "value", "observation"].shape == (5, 4)
    assert td["attr", "one", "observation"].shape == (5, 1, 4)
    assert td["attr", "each", "observation"].shape == (5, 6, 4)
    expected = reference(policy, td, lambda out: out["agents", "table"][:, 1, 0])
    torch.testing.assert_close(td["attr", "each", "observation"][:, 3], expected)


def test_each_of_a_difference_is_a_target_per_entry():
    policy, td = model(), inputs(5)
    each = Each(lambda out: out["logits"] - out["state_value"])
    with Saliency(each, abs=False).prepare(policy) as hooked:
        hooked(td)
    expected = reference(policy, td, lambda out: out["logits"][:, 2] - out["state_value"][:, 0])
    torch.testing.assert_close(td["attr", "observation"][:, 2], expected)


def test_a_contrast_of_several_numbers_with_one_never_mixes_batch_elements():
    policy, td = model(), inputs(3)  # as many elements as logits
    method = Saliency(Each(Output("logits") - Greedy("logits")), abs=False)
    with method.prepare(policy) as hooked, pytest.raises(TargetError, match=r"\(3, 3\).*\(3,\)"):
        hooked(td)


class Crossing(nn.Module):
    """Two logits; which one is greedy changes between zero and one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.square().sum(-1), (0.5 * x).sum(-1) + 0.2], -1)


def test_the_greedy_action_is_held_fixed_along_a_path():
    policy = TensorDictModule(Crossing(), ["observation"], ["logits"])
    td = TensorDict({"observation": torch.ones(1, 2)}, [1])
    assert policy(td.clone())["logits"].argmax(-1) == 0
    assert policy(TensorDict({"observation": torch.zeros(1, 2)}, [1]))["logits"].argmax(-1) == 1
    with IntegratedGradients(Greedy("logits")).prepare(policy) as hooked:
        hooked(td)
        seen = hooked.observe(td.select("observation"))
    for found in (td, seen):
        torch.testing.assert_close(found["attr", "observation"], torch.ones(1, 2))
        assert found["attr_gap"].abs() < 1e-5


def test_targets_print_compare_and_can_be_sent_to_another_process():
    for name, (form, _) in FORMS.items():
        if "function" in name:
            continue
        method = Saliency(form)
        assert copy.deepcopy(method) == method == pickle.loads(pickle.dumps(method))
        assert "object at" not in repr(method)


def test_a_target_is_bound_anew_for_another_batch_over_the_same_tensors():
    table = TensorDictModule(nn.Identity(), ["x"], ["y"])
    x = torch.randn(4, 3, 2)
    with Saliency(Each(("y", 1)), abs=False).prepare(table) as hooked:
        wide = hooked(TensorDict({"x": x}, [4, 3]))["attr", "x"]
        narrow = hooked(TensorDict({"x": x}, [4]))["attr", "x"]
    assert wide.shape == (4, 3, 1, 2) and wide.sum() == 12  # y[..., 1] of each element
    assert narrow.shape == (4, 2, 3, 2) and narrow.sum() == 8  # both numbers of y[:, 1]
    with Saliency(("y", 1), abs=False).prepare(table) as hooked:
        hooked(TensorDict({"x": x}, [4, 3]))
        with pytest.raises(TargetError, match="ambiguous"):
            hooked(TensorDict({"x": x}, [4]))


def test_several_targets_share_one_forward_and_one_batched_backward_while_they_are_small(
    monkeypatch,
):
    calls = []
    plain = torch.autograd.grad

    def counted(*args, **kwargs):
        calls.append(kwargs.get("is_grads_batched", False))
        return plain(*args, **kwargs)

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    td, seen = TensorDict({"observation": torch.randn(3, 4)}, [3]), []
    watch = net.register_forward_hook(lambda *_: seen.append(1))
    with LRP(target=Each("q")).prepare(net, ["observation"], ["q"]) as hooked:
        hooked(td.clone())
        seen.clear()
        monkeypatch.setattr(torch.autograd, "grad", counted)
        found = hooked(td.clone())["attr", "observation"]
    watch.remove()
    monkeypatch.undo()
    assert (len(seen), calls) == (1, [True])
    for i in range(6):
        with LRP(target=("q", i)).prepare(net, ["observation"], ["q"]) as hooked:
            one = hooked(td.clone())["attr", "observation"]
        torch.testing.assert_close(found[:, i], one)


def test_a_rule_that_cannot_be_batched_is_asked_for_one_target_at_a_time():
    class Halve(Rule):
        def relevance(self, module, inputs, output, R_out):
            return inputs[0] * (R_out @ module.weight) / 2

    net, td = nn.Linear(4, 6), TensorDict({"observation": torch.randn(3, 4)}, [3])
    with LRP(lambda name, m: Halve(), Each("q")).prepare(net, ["observation"], ["q"]) as hooked:
        found = hooked(td)["attr", "observation"]
    expected = td["observation"][:, None] * td["q"][..., None] * net.weight / 2
    torch.testing.assert_close(found, expected.detach())

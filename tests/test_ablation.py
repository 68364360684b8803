"""Feature ablation and permutation: closed forms, slow loops, and what groups of features are."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import LSTMModule, ProbabilisticActor, QValueActor, set_recurrent_mode

from method_references import DOUBLE, Formula, Joined, ablation, game, module, permutation
from tdhook_like import (
    AtStep,
    BaselineError,
    Each,
    FromKey,
    InputError,
    KeyNotFoundError,
    LogProb,
    TargetError,
)
from tdhook_like.attribution.ablation import FeatureAblation, FeaturePermutation
from tdhook_like.attribution.perturbation import Mean
from tdhook_like.attribution.progress import MissingTqdmError

BATCHES = [(), (3,), (3, 2), (2, 3, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def explained(method: Any, net: Any, batch: tuple[int, ...], **inputs: Tensor) -> TensorDict:
    model = net if isinstance(net, TensorDictModule) else TensorDictModule(net, list(inputs), ["y"])
    with method.prepare(model) as hooked:
        return hooked(TensorDict(inputs, batch))


# --- ablation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_linear_model_it_is_weight_times_difference(batch, dtype):
    net = nn.Linear(4, 1).to(dtype)
    # Small whole numbers, so that bfloat16 rounds nothing away.
    nn.init.zeros_(net.bias)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0, 0.0, 4.0]]))
    x = torch.randint(-3, 4, (*batch, 4)).to(dtype)
    td = explained(FeatureAblation("y", baselines=1.0), net, batch, x=x)
    assert td["attr", "x"].dtype == dtype
    assert torch.equal(td["attr", "x"], (x - 1) * net.weight.detach()[0])


def test_of_a_product_each_factor_is_given_the_whole():
    a, b = torch.randn(5, 1, dtype=DOUBLE), torch.randn(5, 1, dtype=DOUBLE)
    td = explained(FeatureAblation("y"), Formula(lambda a, b: a * b), (5,), a=a, b=b)
    torch.testing.assert_close(td["attr", "a"], a * b)
    torch.testing.assert_close(td["attr", "b"], a * b)


MASKS = {
    "features": (None, [[0, 1, 2], [3, 4]]),
    "one group": ({"a": [0, 0, 0], "b": [0, 0]}, [[0, 0, 0], [0, 0]]),
    "across keys": ({"a": [0, 1, 1], "b": [1, 2]}, [[0, 1, 1], [1, 2]]),
    "broadcast": ({"a": [0], "b": [1, 0]}, [[0, 0, 0], [1, 0]]),
    "one key alone": ({"b": [1, 0]}, [[2, 3, 4], [1, 0]]),
}


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_a_group_is_ablated_as_a_whole_and_shares_its_change_evenly(masks, divide):
    given, ids = MASKS[masks]
    ids = [torch.tensor(numbers) for numbers in ids]
    n = int(torch.cat(ids).max()) + 1
    net = Joined([3, 2], 2).double()
    a, b = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    base = {"a": torch.randn(3, dtype=DOUBLE), "b": torch.randn(4, 2, dtype=DOUBLE)}
    masks = given and {key: torch.tensor(numbers) for key, numbers in given.items()}
    method = FeatureAblation(("y", 1), baselines=base, masks=masks, divide=divide)
    td = explained(method, net, (4,), a=a, b=b)
    sizes = torch.bincount(torch.cat(ids), minlength=n)
    for row in range(4):
        worth = game(net, [a[row], b[row]], [base["a"], base["b"][row]], ids, output=1)
        values = torch.tensor(ablation(worth, n), dtype=DOUBLE)
        values = values / sizes if divide else values
        for key, group in zip("ab", ids, strict=True):
            torch.testing.assert_close(td["attr", key][row], values[group], rtol=0, atol=1e-10)


def test_a_mask_may_divide_each_batch_element_differently():
    net, x = Joined([4], 1).double(), torch.randn(3, 4, dtype=DOUBLE)
    masks = torch.tensor([[0, 0, 1, 1], [2, 1, 0, 0], [0, 0, 0, 0]])
    td = explained(FeatureAblation("y", masks={"x": masks}), net, (3,), x=x)
    for row in range(3):
        worth = game(net, [x[row]], [torch.zeros(4)], [masks[row]])
        values = torch.tensor(ablation(worth, 3), dtype=DOUBLE)
        sizes = torch.bincount(masks[row], minlength=3)
        expected = (values / sizes)[masks[row]]
        torch.testing.assert_close(td["attr", "x"][row], expected, rtol=0, atol=1e-10)


def test_a_mask_with_batch_dimensions_of_one_is_that_of_every_element():
    net, x = Joined([4], 1).double(), torch.randn(3, 4, dtype=DOUBLE)
    mask = torch.tensor([0, 1, 1, 0])
    one = explained(FeatureAblation("y", masks={"x": mask}), net, (3,), x=x)
    two = explained(FeatureAblation("y", masks={"x": mask[None]}), net, (3,), x=x)
    torch.testing.assert_close(one["attr", "x"], two["attr", "x"], rtol=0, atol=0)


def test_a_mask_of_rows_and_columns_covers_all_channels_of_an_image():
    net, x = Joined([12], 1, dims=[3]).double(), torch.randn(5, 3, 2, 2, dtype=DOUBLE)
    mask = torch.tensor([[0, 1], [1, 2]])
    td = explained(FeatureAblation("y", masks={"x": mask}), net, (5,), x=x)
    ids = mask.expand(3, 2, 2)
    for row in range(5):
        values = torch.tensor(ablation(game(net, [x[row]], [0 * x[row]], [ids]), 3), dtype=DOUBLE)
        expected = (values / torch.tensor([3, 6, 3]))[ids]
        torch.testing.assert_close(td["attr", "x"][row], expected, rtol=0, atol=1e-10)


def test_whole_keys_are_one_argument_and_sums_tell_what_each_key_is_worth():
    net = Joined([3, 2], 1).double()
    a, b = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    td = explained(FeatureAblation("y", groups="keys"), net, (4,), a=a, b=b)
    with torch.no_grad():
        torch.testing.assert_close(td["attr", "a"].sum(-1), (net(a, b) - net(0 * a, b))[:, 0])
        torch.testing.assert_close(td["attr", "b"].sum(-1), (net(a, b) - net(a, 0 * b))[:, 0])


def test_nested_keys_keys_without_features_and_keys_that_are_ignored():
    model = TensorDictModule(
        Formula(lambda a, b, c: a.sum((-1, -2)) * b), [("agents", "obs"), "b", "c"], ["y"]
    )
    obs = torch.randn(5, 2, 3, dtype=DOUBLE)
    td = TensorDict(
        {"agents": TensorDict({"obs": obs}, [5, 2]), "b": torch.full((5,), 2.0), "c": obs.clone()},
        [5],
    )
    masks = {("agents", "obs"): torch.tensor([[0], [1]])}
    with FeatureAblation("y", masks=masks, divide=False).prepare(model) as hooked:
        td = hooked(td)
    assert td["attr", "agents"].batch_size == (5, 2)
    expected = 2 * obs.sum(-1, keepdim=True).expand_as(obs)
    torch.testing.assert_close(td["attr", "agents", "obs"], expected)
    torch.testing.assert_close(td["attr", "b"].double(), 2 * obs.sum((-1, -2)))
    assert not td["attr", "c"].any()


def test_integer_keys_are_read_and_not_ablated():
    def pick(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(-1, index)

    x, index = torch.randn(5, 3), torch.randint(0, 3, (5, 1))
    td = explained(FeatureAblation("y"), Formula(pick), (5,), x=x, index=index)
    chosen = torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))
    torch.testing.assert_close(td["attr", "x"], chosen)
    assert ("attr", "index") not in td.keys(True)


def test_baselines_may_stand_in_the_tensordict():
    x, rest = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    net = nn.Linear(3, 1).double()
    model = TensorDictModule(net, ["x"], ["y"])
    with FeatureAblation("y", baselines=FromKey("rest")).prepare(model) as hooked:
        td = hooked(TensorDict({"x": x, "rest": rest}, [4]))
    torch.testing.assert_close(td["attr", "x"], ((x - rest) * net.weight).detach())


# --- permutation ------------------------------------------------------------------------------------


def test_of_a_linear_model_permutation_is_weight_times_distance_to_the_batchs_mean():
    net, x = nn.Linear(3, 1).double(), torch.randn(40, 3, dtype=DOUBLE)
    td = explained(FeaturePermutation("y", n_samples=400), net, (40,), x=x)
    expected = ((x - x.mean(0)) * net.weight).detach()
    away = (td["attr", "x"] - expected) / td["attr_error", "x"]
    assert away.abs().max() < 4.5 and 0.9 < away.std() < 1.1


def test_permutation_is_within_its_errors_of_the_mean_over_all_orders():
    net, x = Joined([3], 2).double(), torch.randn(4, 3, dtype=DOUBLE)
    ids = torch.tensor([0, 1, 0])
    method = FeaturePermutation(("y", 1), masks={"x": ids}, n_samples=2000, divide=False)
    td = explained(method, net, (4,), x=x)
    expected = permutation(net, x, ids, 2, output=1)[ids].mT
    assert ((td["attr", "x"] - expected).abs() < 4 * td["attr_error", "x"]).all()
    assert (td["attr_error", "x"] < 0.1).all()


def test_all_batch_dimensions_are_permuted_together():
    x = torch.zeros(2, 3, 1, dtype=DOUBLE)
    x[0, 0] = 6.0
    td = explained(FeaturePermutation("y", n_samples=4000), Formula(lambda x: x), (2, 3), x=x)
    expected = (x - 1.0)[..., 0]  # the mean over both dimensions is 1
    error = td["attr_error", "x"][..., 0]
    assert ((td["attr", "x"][..., 0] - expected).abs() < 4 * error).all()


def test_a_group_across_keys_comes_from_one_and_the_same_element():
    a = torch.randn(20, 1, dtype=DOUBLE)
    numbers = {"a": torch.tensor([0]), "b": torch.tensor([0])}
    same = explained(
        FeaturePermutation("y", masks=numbers), Formula(lambda a, b: a - b), (20,), a=a, b=a.clone()
    )
    assert not same["attr", "a"].any() and not same["attr_error", "b"].any()
    apart = explained(FeaturePermutation("y"), Formula(lambda a, b: a - b), (20,), a=a, b=a.clone())
    assert apart["attr", "a"].any()


def test_one_draw_says_nothing_of_its_error():
    td = explained(FeaturePermutation("y", n_samples=1), nn.Linear(2, 1), (8,), x=torch.randn(8, 2))
    assert td["attr", "x"].isfinite().all() and td["attr_error", "x"].isnan().all()


@pytest.mark.parametrize("batch", [(), (1,), (1, 1)])
def test_permutation_needs_a_batch_and_says_what_does_not(batch):
    with pytest.raises(InputError, match="FeatureAblation"):
        explained(FeaturePermutation("y"), nn.Linear(2, 1), batch, x=torch.randn(*batch, 2))


def test_draws_do_not_depend_on_how_many_are_evaluated_at_once():
    net, x = Joined([3], 1).double(), torch.randn(4, 3, dtype=DOUBLE)
    found = [
        explained(FeaturePermutation("y", internal_batch_size=rows), net, (4,), x=x)
        for rows in (None, 4, 20, 36)
    ]
    for other in found[1:]:
        for root in ("attr", "attr_error"):
            torch.testing.assert_close(other[root, "x"], found[0][root, "x"], rtol=0, atol=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(1, 29))
def test_a_running_mean_and_its_error_are_those_of_all_draws(draws, cut):
    values, mean = torch.tensor(draws, dtype=DOUBLE).unsqueeze(1), Mean()
    for part in (values[:cut], values[cut:]):
        if len(part):
            mean.add(part)
    torch.testing.assert_close(mean.value(), values.mean(0), rtol=1e-9, atol=1e-9)
    expected = values.std(0) / len(draws) ** 0.5
    torch.testing.assert_close(mean.error(), expected, rtol=1e-6, atol=1e-9)


# --- what all of them keep to -----------------------------------------------------------------------

EVERY = [FeatureAblation, FeaturePermutation]
every = pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)


@every
def test_several_targets_come_from_the_evaluations_of_one(kind):
    net, x = Joined([3], 4).double(), torch.randn(5, 3, dtype=DOUBLE)
    named = {str(i): ("y", i) for i in range(4)}
    alone = [explained(kind(("y", i)), net, (5,), x=x)["attr", "x"] for i in range(4)]
    with kind(named).prepare(TensorDictModule(net, ["x"], ["y"])) as hooked:
        hooked(TensorDict({"x": x}, [5]))  # after this one the layout is known
        net.seen.shapes.clear()
        td = hooked(TensorDict({"x": x}, [5]))
        n = sum(torch.Size(shape[:-1]).numel() for shape in net.seen.shapes)
    evaluations = {FeatureAblation: 1 + 3, FeaturePermutation: 1 + 10 * 3}[kind]
    assert n == 5 * (1 + evaluations)  # the plain call, the method's
    for i in range(4):
        torch.testing.assert_close(td["attr", str(i), "x"], alone[i])
    each = explained(kind(Each("y")), net, (5,), x=x)["attr", "x"]
    torch.testing.assert_close(each, torch.stack(alone, 1))


@every
@pytest.mark.parametrize("rows", [1, 5, 10, 23])
def test_no_evaluation_is_larger_than_asked_for(kind, rows):
    net, x = Joined([6], 1).double(), torch.randn(5, 6, dtype=DOUBLE)
    whole = explained(kind("y"), net, (5,), x=x)["attr", "x"]
    model = TensorDictModule(net, ["x"], ["y"])
    with kind("y", internal_batch_size=rows).prepare(model) as hooked:
        hooked(TensorDict({"x": x}, [5]))
        net.seen.shapes.clear()
        td = hooked(TensorDict({"x": x}, [5]))
    largest = max(torch.Size(shape[:-1]).numel() for shape in net.seen.shapes)
    assert largest <= max(rows, 5)  # never less than the batch itself
    torch.testing.assert_close(td["attr", "x"], whole, rtol=0, atol=1e-12)


def test_peak_memory_does_not_grow_with_the_number_of_features():
    largest = []
    for n in (600, 2400):
        net, x = Joined([n], 1), torch.randn(1, n)
        explained(FeatureAblation("y"), net, (1,), x=x)
        largest.append(max(torch.Size(shape[:-1]).numel() for shape in net.seen.shapes))
    assert largest[0] >= largest[1] and max(largest) <= 512


def test_a_batch_element_is_explained_as_if_it_were_alone():
    net, x = Joined([3], 1).double(), torch.randn(5, 3, dtype=DOUBLE)
    together = explained(FeatureAblation("y"), net, (5,), x=x)["attr", "x"]
    for row in range(5):
        alone = explained(FeatureAblation("y"), net, (1,), x=x[row : row + 1])["attr", "x"]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)


class Image(nn.Sequential):
    """Takes [N, C, H, W] and nothing else."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return super().forward(x)


def test_an_image_network_is_evaluated_folded():
    net, x = Image().double(), torch.randn(3, 2, 4, 4, dtype=DOUBLE)
    mask = torch.arange(4).reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    method = FeatureAblation("y", masks={"x": mask}, divide=False)
    with method.prepare(net, ["x"], ["y"]) as hooked:
        td = hooked(TensorDict({"x": x}, [3]))
        assert "folded" in str(hooked.context)
    for g in range(4):
        change = (net(x) - net(torch.where(mask == g, 0.0, x)))[:, 0].detach()
        torch.testing.assert_close(
            td["attr", "x"][:, :, mask == g], change[:, None, None].expand(3, 2, 4)
        )


def test_a_model_that_centres_over_its_batch_is_not_given_other_rows():
    net, x = nn.Linear(3, 1, bias=False).double(), torch.randn(5, 3, dtype=DOUBLE)
    centred = Formula(lambda x: net(x - x.mean(0)))
    td = explained(FeatureAblation("y"), centred, (5,), x=x)
    expected = ((x - x.mean(0)) * net.weight).detach()
    torch.testing.assert_close(td["attr", "x"], expected, rtol=0, atol=1e-12)


def recurrent() -> tuple[LSTMModule, TensorDict]:
    lstm = LSTMModule(
        input_size=3,
        hidden_size=4,
        in_key="x",
        out_key="y",
        default_recurrent_mode=True,
    ).double()
    td = TensorDict(
        {"x": torch.randn(2, 5, 3, dtype=DOUBLE), "is_init": torch.zeros(2, 5, 1).bool()}, [2, 5]
    )
    return lstm, td


def test_time_steps_of_a_trajectory_are_groups_of_one_element():
    lstm, td = recurrent()
    steps = torch.arange(5).unsqueeze(1)
    method = FeatureAblation(AtStep(("y", 0), 3), keys=("x",), masks={"x": steps}, divide=False)
    with set_recurrent_mode(), method.prepare(lstm) as hooked:
        found = hooked(td.copy())["attr", "x"]
        plain = lstm(td.copy())["y"][:, 3, 0]
        for step in range(5):
            changed = td.copy()
            changed["x"] = torch.where(steps == step, 0.0, td["x"])
            change = plain - lstm(changed)["y"][:, 3, 0]
            expected = change.detach()[:, None].expand(2, 3)
            torch.testing.assert_close(found[:, step], expected, rtol=0, atol=1e-10)
    assert not found[:, 4].any() and found[:, 3].any()


def test_the_policys_log_probability_is_explained_in_a_rollout_like_call():
    net = TensorDictModule(nn.Linear(3, 4), ["observation"], ["logits"])
    policy = ProbabilisticActor(
        net,
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    x = torch.randn(6, 3)
    with FeatureAblation(LogProb()).prepare(policy) as hooked:
        torch.manual_seed(3)
        td = hooked(TensorDict({"observation": x}, [6]))
        after = torch.get_rng_state()
    torch.manual_seed(3)
    plain = policy(TensorDict({"observation": x}, [6]))
    assert torch.equal(td["action"], plain["action"]) and torch.equal(after, torch.get_rng_state())

    def log_prob(x: Tensor) -> Tensor:
        chosen = td["action"].unsqueeze(-1)
        return net.module(x).log_softmax(-1).gather(-1, chosen).squeeze(-1)

    with torch.no_grad():
        for i in range(3):
            zeroed = x.clone()
            zeroed[:, i] = 0
            torch.testing.assert_close(
                td["attr", "observation"][:, i], log_prob(x) - log_prob(zeroed)
            )


def test_the_value_of_the_chosen_action_is_explained_by_default():
    actor = QValueActor(nn.Linear(3, 4), in_keys=["observation"], action_space="one-hot")
    x = torch.randn(6, 3)
    with FeatureAblation().prepare(actor) as hooked:
        td = hooked(TensorDict({"observation": x}, [6]))
    weight = actor[0].module.weight.detach()[td["action"].long().argmax(-1)]
    torch.testing.assert_close(td["attr", "observation"], x * weight)


@every
def test_observing_writes_attributions_alone_and_draws_from_no_ones_generator(kind):
    net, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 1)).double(),
        torch.randn(5, 3),
    )
    td, state = TensorDict({"x": x.double()}, [5]), torch.get_rng_state()
    with kind("y").prepare(net, ["x"], ["y"]) as hooked:
        out = hooked.observe(td)
    assert torch.equal(state, torch.get_rng_state())
    expected = {"x", "attr"} | ({"attr_error"} if kind.sampled else set())
    assert set(out.keys()) == expected and net.training


@pytest.mark.parametrize(
    ("kind", "batch"),
    [(FeatureAblation, (0,)), (FeatureAblation, (4,)), (FeaturePermutation, (4,))],
)
def test_empty_batches_and_empty_features_give_empty_attributions(kind, batch):
    net = Formula(lambda x, z: x.sum(-1, keepdim=True) + z.sum(-1, keepdim=True))
    x, z = torch.randn(*batch, 3), torch.randn(*batch, 0)
    td = explained(kind("y"), net, batch, x=x, z=z)
    assert td["attr", "x"].shape == x.shape and td["attr", "z"].shape == z.shape
    td = explained(kind("y", groups="keys"), net, batch, x=x, z=z)
    assert td["attr", "x"].shape == x.shape and td["attr", "z"].shape == z.shape


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_collectors_modes_make_no_difference(kind, mode):
    net, x = Joined([3], 1), torch.randn(4, 3)
    expected = explained(kind("y"), net, (4,), x=x)["attr", "x"]
    with mode():
        found = explained(kind("y"), net, (4,), x=x.clone())["attr", "x"]
    assert torch.equal(found.clone(), expected) and not found.requires_grad


@every
def test_members_of_an_ensemble_are_explained_each_by_itself_errors_too(kind):
    one = TensorDictModule(Joined([3], 1), ["x"], ["y"])
    ensemble, x = EnsembleModule(one, num_copies=2), torch.randn(4, 3)
    with kind("y").prepare(ensemble) as hooked:
        td = hooked(TensorDict({"x": x}, [4]))
    roots = ["attr", "attr_error"] if kind.sampled else ["attr"]
    for root in roots:
        found = td[root, "x"]
        assert found.shape == (2, 4, 3) and not torch.equal(found[0], found[1])
    for member in range(2):
        weights = {k: v[member] for k, v in ensemble.params_td.flatten_keys(".").items()}
        inner = Joined([3], 1)
        inner.load_state_dict({k.removeprefix("module."): v for k, v in weights.items()})
        alone = explained(kind("y"), inner, (4,), x=x)
        for root in roots:
            torch.testing.assert_close(td[root, "x"][member], alone[root, "x"], rtol=0, atol=1e-5)


@every
def test_a_model_that_overwrites_its_input_is_refused_and_one_that_says_so_is_given_copies(kind):
    def scaled(x: Tensor) -> Tensor:
        return x.mul_(2).sum(-1)

    td = TensorDict({"x": torch.randn(4, 3)}, [4])
    with kind("y").prepare(TensorDictModule(Formula(scaled), ["x"], ["y"])) as hooked:
        before = td["x"].clone()
        with pytest.raises(InputError, match=r"overwrites one of its inputs in place.*'x'"):
            hooked.observe(td)
    assert torch.equal(td["x"], before)
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1))
    with kind("y").prepare(net, ["x"], ["y"]) as hooked:
        found = hooked.observe(td)["attr", "x"]
    assert torch.equal(td["x"], before)
    apart = nn.Sequential(nn.ReLU(), net[1])
    expected = explained(kind("y"), apart, (4,), x=before)["attr", "x"]
    torch.testing.assert_close(found, expected)


@every
def test_a_model_that_passes_its_input_on_is_explained_in_chunks_all_the_same(kind):
    x = torch.randn(4, 3)
    td = explained(kind(Each("y"), internal_batch_size=4), nn.Identity(), (4,), x=x)
    diagonal = td["attr", "x"].diagonal(dim1=1, dim2=2)
    if kind is FeatureAblation:
        assert torch.equal(diagonal, x)
    torch.testing.assert_close(td["attr", "x"], torch.diag_embed(diagonal))
    assert diagonal.any()


# --- progress ---------------------------------------------------------------------------------------


@every
def test_a_progress_bar_counts_the_evaluations(kind, capsys):
    x = torch.randn(4, 3)
    explained(kind("y", progress=True, internal_batch_size=4), nn.Linear(3, 1), (4,), x=x)
    total = {FeatureAblation: 4, FeaturePermutation: 30}[kind]
    shown = capsys.readouterr().err
    assert f"{total}/{total}" in shown and kind.__name__ in shown
    explained(kind("y"), nn.Linear(3, 1), (4,), x=x)
    assert capsys.readouterr().err == ""


def test_a_bar_without_tqdm_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    td, net = TensorDict({"x": torch.ones(2, 3)}, [2]), nn.Linear(3, 1)
    with FeatureAblation("y", progress=True).prepare(net, ["x"], ["y"]) as hooked:
        with pytest.raises(MissingTqdmError, match="pip install tqdm"):
            hooked(td)
        assert set(td.keys()) == {"x"}


# --- bad input --------------------------------------------------------------------------------------

BAD_MASKS = {
    "no dict": (torch.tensor([0, 1]), "give a dict"),
    "empty": ({}, "give a dict"),
    "no tensor": ({"x": [0, 1]}, "list: group numbers are an integer tensor"),
    "floats": ({"x": torch.tensor([0.0, 1.0])}, "torch.float32"),
    "bools": ({"x": torch.tensor([True, False])}, "bool"),
    "negative": ({"x": torch.tensor([-1, 0])}, "-1"),
    "gap": ({"x": torch.tensor([0, 1, 4])}, "leave out the group numbers 2, 3.*from 0 to 4"),
    "gap at the start": ({"x": torch.tensor([1, 2])}, "leave out the group numbers 0"),
    "gap in both": ({"x": torch.tensor([0]), "z": torch.tensor([2])}, "'x', 'z' leave out.* 1:"),
}


@every
@pytest.mark.parametrize("case", BAD_MASKS)
def test_masks_that_divide_nothing_are_refused_before_a_model_is_seen(kind, case):
    masks, message = BAD_MASKS[case]
    with pytest.raises(InputError, match=message):
        kind("y", masks=masks)


@every
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 2), (1, 5, 2), (5, 2, 2)])
def test_a_mask_of_another_shape_is_refused_with_both_shapes(kind, shape):
    method = kind("y", masks={"x": torch.zeros(shape, dtype=torch.long)})
    with pytest.raises(InputError, match=rf"mask of 'x' has shape \({shape[0]}.*\(2,\).*\(5, 2\)"):
        explained(method, nn.Linear(2, 1), (5,), x=torch.randn(5, 2))


@every
def test_masks_of_keys_that_are_not_attributed_are_refused_when_prepared(kind):
    masks = {"other": torch.tensor([0, 1])}
    with pytest.raises(KeyNotFoundError, match=r"'other'.*'x'"):
        kind("y", masks=masks).prepare(nn.Linear(2, 1), ["x"], ["y"])
    two = module(Joined([2, 2], 1), ["x", "other"])
    with pytest.raises(KeyNotFoundError, match=r"'other'.*'x'"):
        kind("y", masks=masks, keys=("x",)).prepare(two)


def test_a_mask_of_a_key_that_turns_out_to_hold_integers_is_refused_at_the_call():
    net = Formula(lambda x, index: x.gather(-1, index))
    masks = {"index": torch.tensor([0])}
    with pytest.raises(KeyNotFoundError, match=r"'index'.*attributed keys: 'x'"):
        explained(
            FeatureAblation("y", masks=masks),
            net,
            (2,),
            x=torch.randn(2, 3),
            index=torch.zeros(2, 1, dtype=torch.long),
        )


@every
@pytest.mark.parametrize(
    "options",
    [
        {"groups": "pixels"},
        {"internal_batch_size": 0},
        {"internal_batch_size": 2.0},
        {"n_samples": 0},
        {"n_samples": True},
        {"seed": -1},
        {"seed": None},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(kind, options):
    if kind is FeatureAblation and not hasattr(kind, next(iter(options))):
        with pytest.raises(TypeError):
            kind("y", **options)
        return
    with pytest.raises(InputError, match=next(iter(options))):
        kind("y", **options)


def test_baselines_that_do_not_fit_are_refused():
    with pytest.raises(BaselineError, match="does not broadcast"):
        explained(
            FeatureAblation("y", baselines=torch.zeros(3)),
            nn.Linear(2, 1),
            (5,),
            x=torch.ones(5, 2),
        )
    with pytest.raises(TypeError):
        FeaturePermutation("y", baselines=0.0)  # it has none


def test_a_score_that_is_infinite_at_a_changed_input_is_an_error():
    x = torch.tensor([[1.0, 2.0]])
    with pytest.raises(TargetError, match=r"NaN or Inf at a point.*'x'"):
        explained(FeatureAblation("y"), Formula(lambda x: x.log().sum(-1)), (1,), x=x)


def test_standard_errors_go_under_a_root_that_can_be_chosen_and_is_known_beforehand():
    named = {"one": ("y", 0), "two": ("y", 1)}
    method = FeaturePermutation(named, error_root="uncertainty")
    with method.prepare(nn.Linear(3, 2), ["x"], ["y"]) as hooked:
        assert ("uncertainty", "two", "x") in hooked.out_keys
        td = hooked(TensorDict({"x": torch.randn(4, 3)}, [4]))
    assert td["uncertainty", "one", "x"].shape == (4, 3) and "attr_error" not in td
    with pytest.raises(KeyNotFoundError, match="error_root"):
        FeaturePermutation("y", error_root="y").prepare(nn.Linear(3, 2), ["x"], ["y"])
    with pytest.raises(TargetError, match="roots"):
        FeaturePermutation("y", error_root="attr")


@settings(max_examples=25)
@given(st.data())
def test_any_division_into_groups_sums_to_the_groups_changes(data):
    n = data.draw(st.integers(1, 6))
    numbers = data.draw(st.lists(st.integers(0, n - 1), min_size=6, max_size=6))
    _, ids = torch.tensor(numbers).unique(return_inverse=True)
    groups = int(ids.max()) + 1
    net, x = Joined([6], 1).double(), torch.randn(2, 6, dtype=DOUBLE)
    td = explained(FeatureAblation("y", masks={"x": ids}), net, (2,), x=x)
    for row in range(2):
        values = ablation(game(net, [x[row]], [0 * x[row]], [ids]), groups)
        for g in range(groups):
            of_group = td["attr", "x"][row][ids == g]
            assert of_group.sum().item() == pytest.approx(values[g], abs=1e-10)

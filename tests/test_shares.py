"""Claims about sharing out relevance over keys, against sums by hand and known distributions."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict

from tdhook_like.errors import InputError, KeyNotFoundError, TdhookLikeError
from tdhook_like.metrics import KeyShares, key_shares
from tdhook_like.metrics import bootstrap as bootstrap_module


def attributed(batch_size: list[int], names: Any = None, **leaves: torch.Tensor) -> TensorDict:
    """A td with these attributions and, as a hooked module leaves it, the inputs beside them."""
    inputs = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    return TensorDict({**inputs, "attr": leaves}, batch_size, names=names)


@pytest.fixture
def pole_and_cart() -> TensorDict:
    return attributed(
        [2],
        pole=torch.tensor([[3.0, -1.0], [0.5, 0.5]]),
        cart=torch.tensor([[-4.0], [3.0]]),
    )


# What shares are


def test_relevance_is_the_signed_sum_over_the_features_of_a_key(pole_and_cart):
    shares = key_shares(pole_and_cart)
    assert shares.relevance["pole"].tolist() == [2.0, 1.0]
    assert shares.relevance["cart"].tolist() == [-4.0, 3.0]
    assert shares.summary["pole"].relevance == 1.5
    assert shares.summary["cart"].relevance == -0.5


def test_share_is_absolute_relevance_over_that_of_all_keys(pole_and_cart):
    shares = key_shares(pole_and_cart)
    assert shares.share["pole"].tolist() == [0.5, 0.25]
    assert shares.share["cart"].tolist() == [0.5, 0.75]
    assert shares.summary["pole"].share == 0.375
    assert shares.absolute["pole"].tolist() == [4.0, 1.0]
    assert shares.summary["cart"].absolute == 3.5


def test_the_batch_mean_is_of_shares_and_not_a_share_of_means():
    td = attributed([2], a=torch.tensor([[100.0], [0.0]]), b=torch.tensor([[0.0], [1.0]]))
    assert key_shares(td).summary["a"].share == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_shares_add_up_to_one_in_every_dtype(dtype):
    leaves = {name: torch.randn(6, 5, 3, 4).to(dtype) for name in "abc"}
    shares = key_shares(attributed([6, 5], **leaves))
    total = torch.stack(list(shares.share.values())).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))
    reference = leaves["b"].double().abs().sum((2, 3)) / sum(
        leaf.double().abs().sum((2, 3)) for leaf in leaves.values()
    )
    torch.testing.assert_close(shares.share["b"].double(), reference, rtol=1e-5, atol=1e-6)


def test_leaves_of_different_dtypes_and_without_feature_dimensions_are_compared():
    td = attributed([2], a=torch.tensor([1.0, 1.0]), b=torch.full((2, 3), -1.0).double())
    assert key_shares(td).share["a"].tolist() == [0.25, 0.25]


def test_what_lies_after_the_batch_of_the_root_are_features_of_the_key():
    agents = TensorDict({"observation": torch.ones(2, 3, 4)}, [2, 3])
    td = TensorDict({"attr": {"agents": agents, "clock": torch.full((2, 1), 4.0)}}, [2])
    shares = key_shares(td)
    assert shares.keys == (("agents", "observation"), "clock")
    assert shares.relevance[("agents", "observation")].tolist() == [12.0, 12.0]
    assert shares.share["clock"].tolist() == [0.25, 0.25]


def test_shares_are_relative_to_the_keys_that_are_asked_for():
    td = attributed([1], a=torch.tensor([[1.0]]), b=torch.tensor([[3.0]]), c=torch.tensor([[96.0]]))
    shares = key_shares(td, keys=["b", "a"])
    assert shares.keys == ("b", "a")
    assert shares.share["b"].item() == 0.75


def test_an_element_without_relevance_has_share_zero_and_is_counted():
    td = attributed([2], a=torch.tensor([[0.0], [1.0]]), b=torch.tensor([[0.0], [1.0]]))
    shares = key_shares(td)
    assert shares.share["a"].tolist() == [0.0, 0.5]
    assert shares.n_zero == 1
    assert shares.first_rate(["a", "b"]) == 0.5
    assert "no relevance at all (every share 0): 1" in str(shares)


def test_integer_attributions_and_non_tensors_are_passed_over():
    td = TensorDict({"attr": {"a": torch.ones(2, 1), "mission": torch.ones(2).long()}}, [2])
    td["attr"].set_non_tensor("note", "text")
    assert key_shares(td).keys == ("a",)


def test_lazy_stacks_locked_and_differentiable_attributions_are_read():
    leaf = torch.tensor([[2.0, 1.0]], requires_grad=True)
    parts = [TensorDict({"attr": {"a": leaf[0] * i, "b": torch.ones(1)}}, []) for i in (1, 2)]
    shares = key_shares(LazyStackedTensorDict(*parts).lock_())
    assert shares.share["a"].tolist() == pytest.approx([3 / 4, 6 / 7])
    assert not shares.share["a"].requires_grad


# Named targets


def test_a_named_target_is_read_by_its_name():
    td = attributed([1], left=torch.ones(1), right=torch.ones(1))
    td["attr"] = {"left": {"obs": torch.tensor([[2.0]])}, "right": {"obs": torch.tensor([[5.0]])}}
    shares = key_shares(td, target="right")
    assert shares.relevance["obs"].item() == 5.0
    assert "'right'" in str(shares)


def test_two_targets_are_never_ranked_as_two_keys():
    td = TensorDict({"obs": torch.ones(1, 1)}, [1])
    td["attr"] = {"left": {"obs": torch.tensor([[2.0]])}, "right": {"obs": torch.tensor([[5.0]])}}
    with pytest.raises(InputError, match=r"named targets 'left', 'right'.*target='left'"):
        key_shares(td)


def test_one_output_of_an_each_target_is_chosen_by_its_index():
    td = TensorDict({"obs": torch.ones(2, 3)}, [2])
    td["attr", "obs"] = torch.stack([torch.ones(2, 3), torch.full((2, 3), 2.0)], dim=1)
    assert key_shares(td, index=1).relevance["obs"].tolist() == [6.0, 6.0]
    with pytest.raises(InputError, match="index="):
        key_shares(td)
    with pytest.raises(InputError, match="index=2 is outside the 2 outputs"):
        key_shares(td, index=2)


# Ranking


def test_first_rate_counts_the_elements_in_which_one_of_the_keys_ranks_first():
    td = attributed(
        [4],
        a=torch.tensor([[9.0], [-9.0], [1.0], [1.0]]),
        b=torch.tensor([[1.0], [1.0], [9.0], [1.0]]),
        c=torch.tensor([[2.0], [2.0], [2.0], [7.0]]),
    )
    shares = key_shares(td)
    assert [shares.first_rate(key) for key in "abc"] == [0.5, 0.25, 0.25]
    assert shares.first_rate(["a", "c"]) == 0.75
    assert shares.first_rate(("a", "c")) == 0.75


def test_a_tie_for_the_first_rank_counts_in_equal_parts():
    td = attributed([1], a=torch.tensor([[2.0]]), b=torch.tensor([[-2.0]]), c=torch.zeros(1, 1))
    shares = key_shares(td)
    assert [shares.first_rate(key) for key in "abc"] == [0.5, 0.5, 0.0]


def test_a_tuple_that_is_a_key_is_one_nested_key():
    td = TensorDict({"attr": {"a": {"b": torch.ones(1, 1)}, "b": torch.zeros(1, 1)}}, [1])
    assert key_shares(td).first_rate(("a", "b")) == 1.0


# Intervals


def covered(rate_of: str, repetitions: int, draw, mean: float, **options) -> float:
    """How often the interval of the one key "a" holds the mean of its distribution."""
    hits = 0
    for seed in range(repetitions):
        shares = key_shares(draw(torch.Generator().manual_seed(seed)), seed=seed, **options)
        low, high = getattr(shares.summary["a"], f"{rate_of}_interval")
        hits += low <= mean <= high
    return hits / repetitions


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_covers_the_mean_at_about_the_nominal_rate(confidence):
    def draw(generator):
        return attributed([60], a=1.0 + torch.randn(60, 1, generator=generator))

    rate = covered("relevance", 300, draw, 1.0, confidence=confidence, n_resamples=300)
    # Three standard errors of a rate over 300 repetitions, and the bias of the percentile method.
    assert abs(rate - confidence) < 3 * math.sqrt(confidence * (1 - confidence) / 300) + 0.01


def test_the_interval_of_a_share_covers_its_mean():
    def draw(generator):
        a = torch.rand(60, 1, generator=generator)
        return attributed([60], a=a, b=1.0 - a)

    assert covered("share", 200, draw, 0.5, n_resamples=300) > 0.9


def walks(generator, trajectories: int, steps: int, rho: float = 0.9) -> torch.Tensor:
    """Stationary autoregressive series [N, T, 1] around 0."""
    noise = torch.randn(trajectories, steps, generator=generator)
    series = [noise[:, 0] / math.sqrt(1 - rho**2)]
    for t in range(1, steps):
        series.append(rho * series[-1] + noise[:, t])
    return torch.stack(series, 1)[..., None]


def test_resampling_trajectories_covers_where_resampling_dependent_steps_does_not():
    def draw(generator):
        return attributed([30, 40], a=walks(generator, 30, 40))

    by_trajectory = covered("relevance", 100, draw, 0.0, time_dim=1, n_resamples=200)
    by_step = covered("relevance", 100, draw, 0.0, n_resamples=200)
    assert by_trajectory > 0.87
    assert by_step < 0.6


def test_blocks_of_a_single_trajectory_cover_where_single_steps_do_not():
    def draw(generator):
        return attributed([1, 400], a=walks(generator, 1, 400))

    by_block = covered("relevance", 60, draw, 0.0, time_dim=1, n_resamples=200)
    by_step = covered("relevance", 60, draw, 0.0, n_resamples=200)
    assert by_block > 0.75
    assert by_step < 0.6


def test_many_elements_are_merged_into_groups_without_changing_the_interval():
    values = torch.randn(50_000, 1)
    shares = key_shares(attributed([50_000], a=values), seed=3)
    low, high = shares.summary["a"].relevance_interval
    half = 1.96 * values.std().item() / math.sqrt(50_000)
    mean = values.mean().item()
    assert low == pytest.approx(mean - half, abs=0.25 * half)
    assert high == pytest.approx(mean + half, abs=0.25 * half)
    assert "50,000 elements in 4,096 groups" in shares.resampling


def test_resampling_in_small_chunks_gives_the_same_interval(monkeypatch):
    td = attributed([50], a=torch.randn(50, 2), b=torch.randn(50, 1))
    whole = key_shares(td).to_dict()
    monkeypatch.setattr(bootstrap_module, "_CHUNK", 170)
    assert key_shares(td).to_dict() == pytest.approx(whole)


def test_the_global_generator_is_untouched_and_a_seed_repeats_the_interval(pole_and_cart):
    before = torch.get_rng_state()
    first, again, other = (key_shares(pole_and_cart, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert first.summary == again.summary
    assert first.summary["pole"].share == other.summary["pole"].share


def test_one_element_has_means_but_no_interval():
    shares = key_shares(TensorDict({"attr": {"a": torch.tensor([2.0, -1.0])}}, []))
    assert shares.summary["a"].relevance == 1.0
    assert math.isnan(shares.summary["a"].share_interval[0])
    assert "none, as there is only one element" in str(shares)
    assert "a/share_low" not in shares.to_dict()


# Time


def test_the_mean_over_trajectories_is_kept_for_each_step():
    a = torch.tensor([[[1.0], [0.0], [-2.0]], [[3.0], [4.0], [0.0]]])
    td = attributed([2, 3], a=a, b=torch.ones(2, 3, 1))
    shares = key_shares(td, time_dim=-1)
    assert shares.relevance_per_step is not None
    assert shares.share_per_step is not None
    assert shares.relevance_per_step["a"].tolist() == [2.0, 2.0, -1.0]
    assert shares.share_per_step["a"].tolist() == pytest.approx([5 / 8, 2 / 5, 1 / 3])
    assert "2 trajectories" in shares.resampling
    assert key_shares(td).share_per_step is None


def test_time_may_be_any_batch_dimension():
    a = torch.randn(5, 2, 3, 4)
    last = key_shares(attributed([2, 3, 5], a=a.movedim(0, 2)), time_dim=2)
    first = key_shares(attributed([5, 2, 3], a=a), time_dim=0)
    assert last.relevance_per_step is not None
    assert first.relevance_per_step is not None
    torch.testing.assert_close(last.relevance_per_step["a"], first.relevance_per_step["a"])
    assert last.summary["a"].relevance_interval == pytest.approx(
        first.summary["a"].relevance_interval
    )


def test_a_dimension_named_time_is_taken_as_time():
    td = attributed([12, 3], ["env", "time"], a=torch.randn(12, 3, 1))
    assert "12 trajectories" in key_shares(td).resampling
    assert "3 trajectories" in key_shares(td, time_dim="env").resampling


def test_a_single_trajectory_is_cut_into_blocks_and_says_so():
    td = attributed([100], a=walks(torch.Generator().manual_seed(0), 1, 100)[0])
    assert "blocks of" in str(key_shares(td, time_dim=0))
    assert "too short for blocks" in str(key_shares(td[:5], time_dim=0))


def test_masked_elements_do_not_count():
    a = torch.tensor([[[1.0], [3.0]], [[5.0], [1000.0]]])
    td = attributed([2, 2], a=a)
    td["mask"] = torch.tensor([[True, True], [True, False]])
    shares = key_shares(td, time_dim=1, mask="mask")
    assert shares.n_elements == 3
    assert shares.summary["a"].relevance == 3.0
    assert shares.relevance_per_step is not None
    assert shares.relevance_per_step["a"].tolist() == [3.0, 3.0]
    # The two trajectories have the means 2 and 5: no resample can lie outside.
    assert shares.summary["a"].relevance_interval == (2.0, 5.0)


# The result


def test_the_table_is_aligned_and_sorted_by_share(pole_and_cart):
    heading, *table, intervals = str(key_shares(pole_and_cart)).splitlines()
    assert "elements: 2" in heading
    assert [line.split()[0] for line in table] == ["key", "cart", "pole"]
    assert len({len(line) for line in table}) == 1
    assert "62.5 %" in table[1]
    assert "-0.5" in table[1]
    assert "2 elements (few" in intervals


def test_to_dict_gives_plain_floats_under_flat_names():
    td = TensorDict({"attr": {"agents": {"obs": torch.ones(3, 2)}}}, [3])
    logged = key_shares(td).to_dict()
    assert all(type(value) is float for value in logged.values())
    assert logged["agents.obs/relevance"] == 2.0
    assert logged["agents.obs/first"] == 1.0
    assert logged["agents.obs/share_low"] == logged["agents.obs/share_high"] == 1.0
    assert logged["n_elements"] == 3.0


def test_the_result_is_frozen_and_can_be_pickled(pole_and_cart):
    shares = key_shares(pole_and_cart)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shares.target = "other"
    back = pickle.loads(pickle.dumps(shares))
    assert isinstance(back, KeyShares)
    assert back.summary == shares.summary


def test_the_td_is_left_as_it_was(pole_and_cart):
    before = pole_and_cart.clone()
    key_shares(pole_and_cart)
    assert (before == pole_and_cart).all()
    assert set(pole_and_cart.keys(True)) == set(before.keys(True))


# Errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"root": "lrp"}, KeyNotFoundError, r"td\['lrp'\] does not exist.*'attr'"),
        ({"target": "left"}, KeyNotFoundError, r"td\['attr', 'left'\].*'pole', 'cart'"),
        ({"target": "pole"}, InputError, r"td\['attr', 'pole'\] is a tensor"),
        ({"root": ("attr", "pole", "x")}, KeyNotFoundError, "does not exist"),
        ({"keys": ["pole", "wheel"]}, KeyNotFoundError, r"'wheel'.*'pole', 'cart'"),
        ({"keys": ["pole", ("pole",)]}, InputError, "twice"),
        ({"keys": []}, InputError, "no floating"),
        ({"keys": [3]}, KeyNotFoundError, "3 is not a key"),
        ({"confidence": 1.0}, InputError, "confidence=1.0"),
        ({"confidence": math.nan}, InputError, "confidence=nan"),
        ({"n_resamples": 0}, InputError, "n_resamples=0"),
        ({"time_dim": 1}, InputError, "time_dim=1"),
        ({"time_dim": "time"}, InputError, "time_dim='time'"),
        ({"mask": "done"}, KeyNotFoundError, "mask='done'"),
        ({"mask": "pole"}, InputError, "mask='pole' must be boolean"),
    ],
)
def test_a_wrong_request_names_what_was_asked_and_what_is_there(
    pole_and_cart, options, error, words
):
    with pytest.raises(error, match=words) as caught:
        key_shares(pole_and_cart, **options)
    assert isinstance(caught.value, TdhookLikeError)


def test_first_rate_of_an_unknown_key_is_an_error(pole_and_cart):
    with pytest.raises(KeyNotFoundError, match=r"'wheel'.*'pole', 'cart'"):
        key_shares(pole_and_cart).first_rate(["pole", "wheel"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_attributions_that_are_not_finite_are_refused_by_name(pole_and_cart, bad):
    pole_and_cart["attr", "cart"][1, 0] = bad
    with pytest.raises(InputError, match="'cart' hold 1 NaN or infinite values out of 2"):
        key_shares(pole_and_cart)


def test_infinities_that_cancel_are_refused_too():
    td = attributed([1], a=torch.tensor([[math.inf, -math.inf]]))
    with pytest.raises(InputError, match="'a' hold 2"):
        key_shares(td)


def test_nothing_to_share_is_an_error():
    with pytest.raises(InputError, match="no floating"):
        key_shares(TensorDict({"attr": {"a": torch.ones(2).long()}}, [2]))
    with pytest.raises(InputError, match="not a floating"):
        key_shares(TensorDict({"attr": {"a": torch.ones(2).long()}}, [2]), keys=["a"])
    with pytest.raises(InputError, match="no element"):
        key_shares(TensorDict({"attr": {"a": torch.ones(0, 2)}}, [0]))
    td = attributed([2], a=torch.ones(2, 1))
    td["mask"] = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(InputError, match="masked out by 'mask'"):
        key_shares(td, mask="mask")

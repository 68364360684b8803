"""Claims about sharing out relevance over keys, against sums by hand."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict

from attributed_inputs import attributed
from tdhook_like.errors import InputError, KeyNotFoundError, TdhookLikeError
from tdhook_like.metrics import KeyShares, key_shares


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


def test_the_global_generator_is_untouched_and_a_seed_repeats_the_interval(pole_and_cart):
    before = torch.get_rng_state()
    first, again, other = (key_shares(pole_and_cart, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert first.summary == again.summary
    assert first.summary["pole"].share == other.summary["pole"].share


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

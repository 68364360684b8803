"""Claims about the intervals of shares: known distributions, trajectories, time and masks."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict

from attributed_inputs import attributed
from tdhook_like.metrics import bootstrap as bootstrap_module
from tdhook_like.metrics import key_shares

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


def test_one_element_has_means_but_no_interval():
    shares = key_shares(TensorDict({"attr": {"a": torch.tensor([2.0, -1.0])}}, []))
    assert shares.summary["a"].relevance == 1.0
    assert math.isnan(shares.summary["a"].share_interval[0])
    assert "none, as there is only one element" in str(shares)
    assert "a/share_low" not in shares.to_dict()


def test_blocks_are_all_runs_of_steps_around_the_end():
    values = walks(torch.Generator().manual_seed(3), 1, 60)[0].double()
    units = bootstrap_module.block_units(values)
    length = int(units.sizes[0])
    assert length > 2 and (units.sizes == length).all() and units.draws == 60 // length
    around = torch.stack([values[[(start + i) % 60 for i in range(length)]] for start in range(60)])
    torch.testing.assert_close(units.sums, around.sum(1))


@pytest.mark.parametrize("rho", [-0.8, 0.0, 0.5, 0.9])
def test_blocks_are_as_long_as_neighbouring_steps_are_alike(rho):
    values = walks(torch.Generator().manual_seed(5), 1, 500, rho)[0].double()
    away = (values - values.mean()).flatten().tolist()
    alike = sum(a * b for a, b in itertools.pairwise(away)) / sum(a * a for a in away)
    alike = max(alike, 0.0)
    wanted = math.ceil((2 * alike / (1 - alike**2)) ** (2 / 3) * 500 ** (1 / 3))
    assert bootstrap_module.block_length(values) == max(wanted, 1)


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


def test_trajectories_that_are_masked_out_are_not_resampled():
    td = attributed([4, 20], a=torch.randn(4, 20, 1))
    td["mask"] = torch.ones(4, 20, dtype=torch.bool)
    td["mask"][0] = False
    left = key_shares(td, time_dim=1, mask="mask")
    same = key_shares(td[1:], time_dim=1)
    assert "3 trajectories" in left.resampling and left.summary == same.summary
    td["mask"][:3] = False  # one is left, which is cut into blocks
    assert "only one trajectory" in key_shares(td, time_dim=1, mask="mask").resampling


def test_masked_elements_without_relevance_are_not_counted_as_such():
    td = attributed([3], a=torch.tensor([[1.0], [0.0], [0.0]]))
    td["mask"] = torch.tensor([True, True, False])
    assert key_shares(td, mask="mask").n_zero == 1 and key_shares(td).n_zero == 2


def test_a_step_at_which_nothing_counts_has_the_mean_zero():
    td = attributed([2, 3], a=torch.ones(2, 3, 1))
    td["mask"] = torch.tensor([[True, False, True], [True, False, False]])
    shares = key_shares(td, time_dim=1, mask="mask")
    assert shares.relevance_per_step is not None
    assert shares.relevance_per_step["a"].tolist() == [1.0, 0.0, 1.0]

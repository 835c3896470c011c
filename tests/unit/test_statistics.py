"""Intervals: known answers, and coverage on synthetic data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantize.statistics import (
    Interval,
    accuracy_interval,
    holm,
    loss_interval,
    mcnemar,
    mean_interval,
    paired_accuracy_difference,
    paired_loss_difference,
    paired_share_difference,
    recovered_interval,
    share_interval,
    sign_flip,
)


def _paired_losses(seed: int, samples: int = 200, difference: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two arms with a common difficulty per sample and a true per-token difference, independent of length."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, samples)
    difficulty = rng.gamma(2.0, 1.0, samples)
    b = tokens * difficulty
    a = b + tokens * (difference + rng.normal(0, 0.5, samples))
    return a, b, tokens


def test_values_are_token_weighted_means() -> None:
    tokens = np.array([1, 3])
    assert loss_interval([1.0, 9.0], tokens).value == 2.5
    assert paired_loss_difference([2.0, 9.0], [1.0, 6.0], tokens).value == 1.0


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, tokens = _paired_losses(0)
    first = paired_loss_difference(a, b, tokens)
    assert first == paired_loss_difference(a, b, tokens)
    assert first != paired_loss_difference(a, b, tokens, seed=1)
    monkeypatch.setattr("quantize.statistics._CHUNK_ELEMENTS", 1000)
    chunked = paired_loss_difference(a, b, tokens)
    assert (chunked.low, chunked.high) == pytest.approx((first.low, first.high), abs=1e-12)


def test_equal_arms_give_a_zero_that_does_not_exclude_zero() -> None:
    a, _, tokens = _paired_losses(0)
    difference = paired_loss_difference(a, a, tokens)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert not difference.excludes_zero


def test_pairing_narrows_the_interval() -> None:
    a, b, tokens = _paired_losses(3)
    paired = paired_loss_difference(a, b, tokens)
    alone = loss_interval(a, tokens)
    assert paired.high - paired.low < 0.7 * (alone.high - alone.low)


@pytest.mark.parametrize("samples", [40, 200])
def test_paired_loss_difference_covers_the_truth(samples: int) -> None:
    # 1500 data sets: the share itself then has a standard error of 0.6%, so 0.93 separates 0.95 from a broken interval.
    # The resampling must not share the data's random stream, hence the other seeds.
    seeds = range(1500)
    data = (_paired_losses(seed, samples=samples) for seed in seeds)
    intervals = [paired_loss_difference(*arms, seed=10_000 + seed, resamples=1000) for seed, arms in enumerate(data)]
    assert np.mean([i.low <= 0.1 <= i.high for i in intervals]) >= 0.93
    # The same intervals, moved to a true difference of 0: how often a difference would be claimed that is not there.
    assert np.mean([i.low > 0.1 or i.high < 0.1 for i in intervals]) <= 0.07


@pytest.mark.parametrize(("samples", "least"), [(15, 0.92), (30, 0.93), (120, 0.935)])
def test_intervals_of_skewed_losses_cover_the_truth(samples: int, least: float) -> None:
    # An exponential's tail on samples of unequal length: the percentile interval covers 91% at 30 samples.
    covered = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(3, 60, samples)
        interval = loss_interval(rng.exponential(1.0, samples) * tokens, tokens, seed=10_000 + seed, resamples=1000)
        covered.append(interval.low <= 1.0 <= interval.high)
    assert np.mean(covered) >= least


@pytest.mark.parametrize("cost", [0.1, 0.25, 0.5])
def test_recovered_covers_the_truth_where_quantisation_barely_costs(cost: float) -> None:
    # 40 samples, a skewed cost whose mean is from 1.5 to 8 standard errors above 0; 40% of it is recovered.
    covered = []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(3, 40, 40)
        control = rng.lognormal(0, 0.5, 40) * tokens
        costs = cost + rng.exponential(0.4, 40) - 0.4
        gains = 0.4 * costs + rng.exponential(0.3, 40) - 0.3
        ptq = control + costs * tokens
        found = recovered_interval(ptq, ptq - gains * tokens, control, tokens, seed=10_000 + seed, resamples=1000)
        covered.append(found.low <= 0.4 <= found.high)
    assert np.mean(covered) >= 0.92


def test_recovered_agrees_with_fiellers_formula_on_normal_samples() -> None:
    rng = np.random.default_rng(0)
    gain, cost = rng.multivariate_normal([0.3, 0.6], [[1.0, 0.5], [0.5, 1.0]], 400).T
    found = recovered_interval(cost, cost - gain, np.zeros(400), np.ones(400), resamples=20_000)
    (vx, vxy), (_, vy) = np.cov(gain, cost) / 400
    x, y, z2 = gain.mean(), cost.mean(), 1.96**2
    roots = np.roots([y**2 - z2 * vy, -2 * (x * y - z2 * vxy), x**2 - z2 * vx])
    assert (found.low, found.high) == pytest.approx(sorted(roots), rel=0.05)


def test_a_share_that_all_samples_agree_on_is_not_certain() -> None:
    whole = share_interval([4.0, 6.0] * 20, [4, 6] * 20)
    assert whole.value == whole.high == 1.0 and 0.85 < whole.low < 0.95  # Wilson at about 38 samples
    one_apart = share_interval([4.0, 6.0] * 20 + [2.0], [4, 6] * 20 + [4])
    assert 0.8 < one_apart.low < one_apart.value < one_apart.high < 1
    same = paired_share_difference([0.3, 0.8] * 20, [0.3, 0.8] * 20)
    assert same.value == 0 and -0.1 < same.low == -same.high < -0.01


@pytest.mark.parametrize("apart", [0.01, 0.2])
def test_paired_shares_cover_the_truth(apart: float) -> None:
    covered = []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        base = rng.uniform(0.2, 0.8, 60)
        other = np.where(rng.random(60) < apart, base - rng.uniform(0, 0.4, 60) * (base > 0.4), base)
        truth = -apart * 0.2 * (0.8 - 0.4) / 0.6
        found = paired_share_difference(other, base, seed=10_000 + seed)
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) >= 0.92


@pytest.mark.parametrize("samples", [2, 5, 6, 10])
def test_few_samples_claim_nothing_or_as_rarely_as_they_should(samples: int) -> None:
    claims = []
    for seed in range(400):
        a, b, _ = _paired_losses(seed, samples=samples, difference=0.0)
        found = paired_loss_difference(a, b, np.full(samples, 10), resamples=500)
        assert np.isfinite(found.high) == (samples >= 6)
        claims.append(found.excludes_zero)
    assert np.mean(claims) <= (0.12 if samples >= 6 else 0.0)  # few samples stay rough, and the report says so


@pytest.mark.parametrize(("p_a", "p_b", "samples"), [(0.5, 0.4, 100), (0.03, 0.03, 100), (0.9, 0.7, 40)])
def test_paired_accuracy_difference_covers_the_truth(p_a: float, p_b: float, samples: int) -> None:
    covered, alone = [], []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        common = rng.random(samples)  # one difficulty for both arms: strongly correlated outcomes
        own = rng.random(samples)
        mixed = np.where(rng.random(samples) < 0.7, common, own)
        interval = paired_accuracy_difference(common < p_a, mixed < p_b)
        covered.append(interval.low <= p_a - p_b <= interval.high)
        single = accuracy_interval(common < p_a)
        alone.append(single.low <= p_a <= single.high)
    assert np.mean(covered) >= 0.93
    assert np.mean(alone) >= 0.91  # Wilson is 95% on average over p, a little less at some p


def test_paired_accuracy_difference_known_answer() -> None:
    # Newcombe (1998), table III: 36 both, 12 only a, 2 only b, 0 neither. Method 10 gives 0.0569 to 0.3404.
    a = np.array([True] * 48 + [False] * 2)
    b = np.array([True] * 36 + [False] * 12 + [True] * 2)
    interval = paired_accuracy_difference(a, b)
    assert interval.value == pytest.approx(0.2)
    assert (interval.low, interval.high) == pytest.approx((0.0569, 0.3404), abs=5e-4)


def test_agreement_on_every_sample_is_not_certainty() -> None:
    exact = np.arange(20) < 7
    interval = paired_accuracy_difference(exact, exact)
    assert interval.value == 0 and interval.low < 0 < interval.high


def test_wilson_known_answers() -> None:
    half = accuracy_interval([True] * 5 + [False] * 5)
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    nothing = accuracy_interval([False] * 10)
    assert (nothing.value, nothing.low) == (0, 0) and nothing.high == pytest.approx(0.2775, abs=1e-4)


def test_mcnemar_known_answers() -> None:
    assert mcnemar([True] * 4, [True] * 4) == 1.0
    assert mcnemar([True] * 6, [False] * 6) == 2 / 64
    assert mcnemar([True] * 8 + [False] * 2, [False] * 8 + [True] * 2) == pytest.approx(2 * 56 / 1024)
    assert mcnemar([True] * 20_000 + [False] * 20_000, [False] * 20_000 + [True] * 20_000) == 1.0
    assert 0 < mcnemar([True] * 3000 + [False] * 2000, [False] * 3000 + [True] * 2000) < 1e-40


def test_recovered_value_and_interval() -> None:
    _, control, tokens = _paired_losses(1)
    rng = np.random.default_rng(5)
    ptq = control + tokens * rng.gamma(4.0, 0.1, len(tokens))
    final = ptq - 0.7 * (ptq - control) + tokens * rng.normal(0, 0.02, len(tokens))
    interval = recovered_interval(ptq, final, control, tokens)
    assert interval.low < 0.7 < interval.high
    assert interval.value == pytest.approx((ptq.sum() - final.sum()) / (ptq.sum() - control.sum()))
    assert interval.high - interval.low < 0.1


def test_recovered_is_unbounded_when_quantisation_cost_nothing_clear() -> None:
    _, control, tokens = _paired_losses(1)
    noise = np.random.default_rng(0).normal(0, 1, len(tokens))
    unclear = recovered_interval(control + noise, control, control, tokens)
    assert math.isfinite(unclear.value) and math.isinf(unclear.low) and math.isinf(unclear.high)
    assert math.isnan(recovered_interval(control, control, control, tokens).value)


def test_one_sample_gives_no_interval() -> None:
    interval = paired_loss_difference([3.0], [1.0], [2])
    assert interval.value == 1.0 and not interval.excludes_zero
    assert interval.as_dict() == {"value": 1.0, "low": None, "high": None}


@pytest.mark.parametrize(
    "call",
    [
        lambda: loss_interval([], []),
        lambda: loss_interval([1.0], [0]),
        lambda: loss_interval([math.nan], [1]),
        lambda: paired_loss_difference([1.0, 2.0], [1.0], [1, 1]),
        lambda: paired_accuracy_difference([True], [True, False]),
        lambda: accuracy_interval([]),
    ],
)
def test_bad_input_is_refused(call: object) -> None:
    with pytest.raises(ValueError):
        call()  # type: ignore[operator]


def test_excludes_zero() -> None:
    assert Interval(1, 0.5, 1.5).excludes_zero and Interval(-1, -1.5, -0.5).excludes_zero
    assert not Interval(0.1, 0.0, 0.2).excludes_zero


def test_sign_flip_is_exact_for_few_samples_and_keeps_its_level() -> None:
    assert sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8, abs=0.02)  # all of one sign: 2 of 8 assignments
    assert sign_flip([0.0, 0.0]) == 1.0
    rng = np.random.default_rng(5)
    rejected = np.mean([sign_flip(rng.standard_t(3, 40), seed=seed, resamples=400) < 0.05 for seed in range(600)])
    assert rejected == pytest.approx(0.05, abs=0.025)
    with pytest.raises(ValueError, match="finite"):
        sign_flip([math.nan])


def test_holm_known_answer_and_family_level() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    rng = np.random.default_rng(0)
    false = np.mean([min(holm(list(rng.uniform(size=13)))) < 0.05 for _ in range(4000)])
    assert false == pytest.approx(0.05, abs=0.01)  # without the adjustment it would be 0.49


def test_mean_over_tasks_covers_the_truth() -> None:
    """Five tasks of unequal size, right and wrong of the two arms correlated: the truth is known for each."""
    rng, hits, rounds = np.random.default_rng(2), 0, 800
    sizes, levels, gains = (30, 60, 100, 200, 40), (0.3, 0.5, 0.7, 0.9, 0.2), (0.0, 0.05, -0.05, 0.02, 0.1)
    for _ in range(rounds):
        found = []
        for size, level, gain in zip(sizes, levels, gains, strict=True):
            difficulty = rng.uniform(size=size)
            moved = np.where(rng.uniform(size=size) < 0.5, rng.uniform(size=size), difficulty)
            found.append(paired_accuracy_difference(moved < level + gain, difficulty < level))
        interval = mean_interval(found)
        hits += interval.low <= np.mean(gains) <= interval.high
    assert hits / rounds == pytest.approx(0.955, abs=0.02)


def test_a_mean_of_arms_that_agree_is_not_certain() -> None:
    same = np.ones(50, dtype=bool)
    interval = mean_interval([paired_accuracy_difference(same, same)] * 3)
    assert interval.low < 0 < interval.high and interval.value == 0
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])

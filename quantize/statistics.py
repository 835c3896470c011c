"""Intervals for evaluation results: how far a number may move when other samples had been drawn.

All arms of a run are scored on the same held-out samples, so differences are *paired*: what both find hard cancels.
The intervals speak about the choice of samples only, not about the training seed.

Shapes: `S` samples, `K` resamples. Numpy only, so that the report can be rebuilt without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_Z95 = 1.959963984540054  # 97.5% quantile of the standard normal
_FEWEST = 6  # samples for a bootstrap interval: see `_percentile`
_CHUNK_ELEMENTS = 4_000_000  # bounds the bootstrap's weight matrix to 32 MB


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; infinite bounds mean that the samples say nothing about it."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True when the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float | None]:
        """`{value, low, high}` for JSON, with None where a number is not finite."""
        return {"value": _finite(self.value), "low": _finite(self.low), "high": _finite(self.high)}


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def loss_interval(nll: ArrayLike, tokens: ArrayLike, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Token-weighted mean loss with its bootstrap interval over samples.

    Args:
        nll: [S] summed nats over each sample's answer tokens.
        tokens: [S] number of answer tokens of each sample.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: shapes differ, there is no sample, no token, or a value is not finite.
    """
    count = _tokens(tokens)
    total = _sums(nll, count)
    means = [weights @ total / (weights @ count) for weights in _resamples(len(count), seed, resamples)]
    return _percentile(float(total.sum() / count.sum()), np.concatenate(means), count)


def paired_loss_difference(
    nll_a: ArrayLike, nll_b: ArrayLike, tokens: ArrayLike, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Token-weighted mean loss of `a` minus that of `b`, with a paired bootstrap interval over samples.

    Each resample draws whole samples with replacement (as multinomial weights) and applies the same draw to both arms:
    percentile interval, Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, with the quantiles
    moved outwards for few samples (see `_percentile`).

    Args:
        nll_a, nll_b: [S] summed nats over each sample's answer tokens, the same samples in the same order.
        tokens: [S] number of answer tokens of each sample.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: shapes differ, there is no sample, no token, or a value is not finite.
    """
    count = _tokens(tokens)
    return loss_interval(_sums(nll_a, count) - _sums(nll_b, count), count, seed=seed, resamples=resamples)


def recovered_interval(
    ptq: ArrayLike,
    final: ArrayLike,
    control: ArrayLike,
    tokens: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Share of the quantisation loss that was recovered, (ptq - final) / (ptq - control), with its bootstrap interval.

    A ratio has a bounded interval only while its denominator is clearly not 0 (Fieller, 1954): where the 95% interval
    of ptq - control includes 0 the bounds are infinite, and where the denominator is 0 the value is NaN.

    Args:
        ptq, final, control: [S] summed nats of each arm, the same samples in the same order.
        tokens: [S] number of answer tokens of each sample.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
    """
    count = _tokens(tokens)
    arms = [_sums(arm, count) for arm in (ptq, final, control)]
    gain, cost = arms[0] - arms[1], arms[0] - arms[2]  # [S]; the token count cancels in the ratio
    if cost.sum() == 0:
        return Interval(math.nan, -math.inf, math.inf)
    value = float(gain.sum() / cost.sum())
    gains, costs = [], []
    for weights in _resamples(len(count), seed, resamples):
        gains.append(weights @ gain)
        costs.append(weights @ cost)
    numerator, denominator = np.concatenate(gains), np.concatenate(costs)  # [K]
    if not _percentile(float(cost.sum()), denominator, count).excludes_zero:
        return Interval(value, -math.inf, math.inf)
    return _percentile(value, numerator[denominator != 0] / denominator[denominator != 0], count)


def accuracy_interval(exact: ArrayLike) -> Interval:
    """Share of exact answers with Wilson's score interval (Wilson, 1927); honest at 0% and 100% too.

    Args:
        exact: [S] True where a sample's answer is exactly right.
    """
    right = _exact(exact)
    return Interval(float(right.mean()), *_wilson(int(right.sum()), len(right)))


def paired_accuracy_difference(exact_a: ArrayLike, exact_b: ArrayLike) -> Interval:
    """Accuracy of `a` minus accuracy of `b` on the same samples, with Newcombe's score interval for paired proportions.

    Method 10 of Newcombe, Statistics in Medicine 17:2635-2650 (1998). A bootstrap would claim certainty (an interval of
    width 0) whenever both arms answer the same samples right; a score interval does not.

    Args:
        exact_a, exact_b: [S] True where a sample's answer is exactly right, the same samples in the same order.
    """
    a, b = _pair(exact_a, exact_b)
    n = len(a)
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    neither = n - both - only_a - only_b
    p_a, p_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = _wilson(both + only_a, n), _wilson(both + only_b, n)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance = float(both * neither - only_a * only_b)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)  # Newcombe's continuity correction
    phi = covariance / math.sqrt(margins) if margins else 0.0
    below, above = _distance(p_a - low_a, high_b - p_b, phi), _distance(high_a - p_a, p_b - low_b, phi)
    return Interval(p_a - p_b, p_a - p_b - below, p_a - p_b + above)


def mcnemar(exact_a: ArrayLike, exact_b: ArrayLike) -> float:
    """Two-sided exact p-value of McNemar's test: are the samples that only one arm gets right shared evenly?

    Under the null each discordant sample is a fair coin, so p = min(1, 2 * P[Binomial(n, 1/2) <= smaller count]).

    Args:
        exact_a, exact_b: [S] True where a sample's answer is exactly right, the same samples in the same order.
    """
    a, b = _pair(exact_a, exact_b)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    n = only_a + only_b
    tail: int = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return float(min(1.0, 2 * tail / 2**n))  # integers until the division: no overflow at any n


def sign_flip(differences: ArrayLike, *, seed: int = 0, resamples: int = 10_000) -> float:
    """Two-sided p-value of a paired randomisation test: is the sum of the differences 0?

    Under the null, which arm a result of a sample belongs to is a fair coin, so each difference's sign is one (Fisher,
    1935). The observed signs count as one draw, so p is never 0 (Phipson & Smyth, 2010).

    Args:
        differences: [S] result of one arm minus that of the other, the same samples.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences must be a non-empty list of finite numbers, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    observed = abs(values.sum()) * (1 - 1e-12)  # equal sums must count as equal whatever the order of adding
    rows, beyond = max(1, _CHUNK_ELEMENTS // len(values)), 0
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        signs = rng.integers(0, 2, size=(size, len(values)), dtype=np.int8) * 2 - 1
        beyond += int((abs(signs @ values) >= observed).sum())
    return (beyond + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: claims below 0.05 hold a false one 5% of the time, not each (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def mean_interval(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent values, each with its interval, all of equal weight.

    Their distances to the bounds add as variances do (MOVER: Zou & Donner, Statistics in Medicine 27:1693-1702, 2008),
    so the mean of score intervals is never certain, not even where all arms agree on all samples.

    Raises:
        ValueError: nothing to average.
    """
    if not intervals:
        raise ValueError("no values to average")
    n = len(intervals)
    value = sum(each.value for each in intervals) / n
    below = math.sqrt(sum((each.value - each.low) ** 2 for each in intervals)) / n
    above = math.sqrt(sum((each.high - each.value) ** 2 for each in intervals)) / n
    return Interval(value, value - below, value + above)


def _resamples(samples: int, seed: int, resamples: int) -> Iterator[Floats]:
    """Yields [k, S] matrices of bootstrap weights, K rows in all; the same rows for the same seed."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // samples)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(samples, size=(size, samples)) + samples * np.arange(size)[:, None]  # [k, S]
        counts = np.bincount(drawn.ravel(), minlength=size * samples)  # multinomial; 5x faster than rng.multinomial
        yield counts.reshape(size, samples).astype(np.float64)


def _percentile(value: float, resampled: Floats, tokens: Floats) -> Interval:
    """95% interval from resampled values, with the quantiles moved outwards for the size of the sample.

    The plain percentile interval is too narrow: the bootstrap's variance lacks the factor n / (n - 1) and its tails are
    normal, not Student's. The expanded percentile interval takes the quantiles at Phi(+-sqrt(n / (n - 1)) * t) instead
    (Hesterberg, The American Statistician 69:371-386, 2015). A token-weighted mean has fewer samples than it counts:
    n is Kish's effective size, (sum tokens)^2 / sum tokens^2.

    No resample lies beyond the samples' own extremes, however far out the quantiles are taken. Of S samples without a
    difference all lie on one side of 0 with probability 2^(1 - S): below 6 samples that alone is more than 5%, so there
    are no bounds.
    """
    n = float(tokens.sum() ** 2 / (tokens**2).sum())
    if np.count_nonzero(tokens) < _FEWEST or n < 2:
        return Interval(value, -math.inf, math.inf)
    z, v = _Z95, n - 1
    student = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)  # Abramowitz & Stegun 26.7.5
    tail = 0.5 * math.erfc(math.sqrt(n / v) * student / math.sqrt(2))
    resampled = resampled[np.isfinite(resampled)]  # a draw of samples without any token has no mean
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _wilson(right: int, n: int) -> tuple[float, float]:
    z2 = _Z95**2
    centre = (right + z2 / 2) / (n + z2)
    half = _Z95 / (n + z2) * math.sqrt(right * (n - right) / n + z2 / 4)
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def _distance(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))


def _tokens(tokens: ArrayLike) -> Floats:
    count = np.asarray(tokens, dtype=np.float64)
    if count.ndim != 1 or not len(count) or not np.isfinite(count).all() or (count < 0).any() or not count.sum():
        raise ValueError(f"tokens must be a non-empty list of counts with a positive sum, got shape {count.shape}")
    return count


def _sums(nll: ArrayLike, tokens: Floats) -> Floats:
    values: Floats = np.asarray(nll, dtype=np.float64)
    if values.shape != tokens.shape:
        raise ValueError(f"losses have shape {values.shape}, tokens {tokens.shape}: not the same samples")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} losses are not finite")
    return values


def _exact(exact: ArrayLike) -> Bools:
    values: NDArray[Any] = np.asarray(exact)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"exact must be a non-empty list of booleans, got shape {values.shape}")
    return values.astype(np.bool_)


def _pair(exact_a: ArrayLike, exact_b: ArrayLike) -> tuple[Bools, Bools]:
    a, b = _exact(exact_a), _exact(exact_b)
    if a.shape != b.shape:
        raise ValueError(f"the arms have {len(a)} and {len(b)} samples: not the same samples")
    return a, b

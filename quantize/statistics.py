"""Intervals for evaluation results: how far a number may move when other samples had been drawn.

All arms of a run are scored on the same held-out samples, so differences are *paired*: what both find hard cancels.
The intervals speak about the choice of samples only, not about the training seed.

Shapes: `S` samples, `K` resamples. Numpy only, so that the report can be rebuilt without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_Z95 = 1.959963984540054  # 97.5% quantile of the standard normal
FEWEST = 6  # samples for a bootstrap interval: see `_bootstrap_t`
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
    """Token-weighted mean loss with its bootstrap interval over samples (see `_bootstrap_t`).

    Args:
        nll: [S] summed nats over each sample's answer tokens.
        tokens: [S] number of answer tokens of each sample.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: shapes differ, there is no sample, no token, or a value is not finite.
    """
    count = _tokens(tokens)
    return _bootstrap_t(_sums(nll, count), count, seed, resamples)


def paired_loss_difference(
    nll_a: ArrayLike, nll_b: ArrayLike, tokens: ArrayLike, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Token-weighted mean loss of `a` minus that of `b`, with a paired bootstrap interval over samples.

    Each resample draws whole samples with replacement (as multinomial weights) and applies the same draw to both arms.

    Args:
        nll_a: [S] summed nats over each sample's answer tokens.
        nll_b: [S] the other arm's, the same samples in the same order.
        tokens: [S] number of answer tokens of each sample.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: shapes differ, there is no sample, no token, or a value is not finite.
    """
    count = _tokens(tokens)
    return loss_interval(_sums(nll_a, count) - _sums(nll_b, count), count, seed=seed, resamples=resamples)


def share_interval(hits: ArrayLike, tokens: ArrayLike, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Token-weighted mean of a share from 0 to 1: `loss_interval`, and never certain where all samples are alike.

    Where fewer than about four samples differ from the rest the bootstrap knows nothing of the spread: then Wilson's
    score interval, as if each sample were one draw (Kish's effective number of them).

    Args:
        hits: [S] summed over each sample's tokens, each from 0 to 1.
        tokens: [S] number of tokens of each sample.
    """
    count = _tokens(tokens)
    found = loss_interval(hits, count, seed=seed, resamples=resamples)
    n = _effective(count)
    known = np.count_nonzero(count) < FEWEST or not _is_unknown(found)
    low, high = (found.low, found.high) if known else _wilson(found.value * n, n)
    return _within(Interval(found.value, low, high), 0.0, 1.0)


def paired_share_difference(shares_a: ArrayLike, shares_b: ArrayLike, *, seed: int = 0) -> Interval:
    """Mean of `a` minus mean of `b`, each sample a share from 0 to 1: a paired bootstrap, never certain.

    Where fewer than about four samples differ at all the bootstrap knows nothing of the spread: then the interval of
    matched proportions with half a sample more on either side (Agresti & Min, Statistics in Medicine 24:729-740, 2005),
    which takes a sample that differs in part for the same part of one that differs.

    Args:
        shares_a: [S], of each sample.
        shares_b: [S], the other arm's, the same samples in the same order.
        seed: of the resampling.
    """
    ones = np.ones(len(np.asarray(shares_a)))
    found = paired_loss_difference(shares_a, shares_b, ones, seed=seed)
    low, high = found.low, found.high
    if len(ones) >= FEWEST and _is_unknown(found):
        apart = _sums(shares_a, ones) - _sums(shares_b, ones)
        n, for_a, for_b = len(ones) + 2, apart.clip(min=0).sum() + 0.5, (-apart).clip(min=0).sum() + 0.5
        centre = (for_a - for_b) / n
        half = _Z95 * math.sqrt(for_a + for_b - (for_a - for_b) ** 2 / n) / n
        low, high = min(found.value, centre - half), max(found.value, centre + half)
    return _within(Interval(found.value, low, high), -1.0, 1.0)


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

    Fieller's interval (1954): all shares s for which the mean of (ptq - final) - s (ptq - control) may be 0, its t
    statistic judged by the bootstrap as in `_bootstrap_t`. It is bounded only while the denominator is clearly not 0:
    where the 95% interval of ptq - control includes 0 the bounds are infinite, and where the denominator is 0 the value
    is NaN.

    Args:
        ptq: [S] summed nats of the control quantised after training.
        final: [S] of what ships, the same samples in the same order.
        control: [S] of the fine-tune without QAT.
        tokens: [S] number of answer tokens of each sample.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
    """
    count = _tokens(tokens)
    arms = [_sums(arm, count) for arm in (ptq, final, control)]
    gain, cost = arms[0] - arms[1], arms[0] - arms[2]  # [S]; the token count cancels in the ratio
    if cost.sum() == 0:
        return Interval(math.nan, -math.inf, math.inf)
    value, ones, n = float(gain.sum() / cost.sum()), np.ones(len(count)), _effective(count)
    nothing = Interval(value, -math.inf, math.inf)
    if len(count) < FEWEST or n < 2:
        return nothing
    moments = _moments(gain, cost, seed, resamples)

    def is_possible(share: float, of: float = 1.0) -> bool:
        """Whether the mean of of * gain - share * cost may be 0."""
        rest = of * gain - share * cost
        sums = of * moments.x - share * moments.y
        squares = of**2 * moments.xx - 2 * of * share * moments.xy + share**2 * moments.yy
        spread = squares - sums**2 / len(ones)
        low, high = _t_bounds(sums - rest.sum(), spread, n)
        scale = math.sqrt(len(ones) * float(rest.var()))
        return bool(rest.sum() - high * scale <= 0 <= rest.sum() - low * scale)

    if is_possible(1.0, of=0.0):  # the cost itself may be 0
        return nothing
    return Interval(value, _edge(is_possible, value, -1.0), _edge(is_possible, value, 1.0))


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
        exact_a: [S] True where a sample's answer is exactly right.
        exact_b: [S] the other arm's, the same samples in the same order.
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
        exact_a: [S] True where a sample's answer is exactly right.
        exact_b: [S] the other arm's, the same samples in the same order.
    """
    a, b = _pair(exact_a, exact_b)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    n = only_a + only_b
    term = tail = 1  # n over 0
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)  # each from the one before: math.comb for each takes seconds at n = 10,000
        tail += term
    return min(1.0, 2 * tail / (1 << n))  # integers until the division: exact, and no overflow at any n


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


@dataclass(frozen=True)
class _Moments:
    """Of K resamples: the sums of x, y, x^2, x y and y^2 over what was drawn, each [K]."""

    x: Floats
    y: Floats
    xx: Floats
    xy: Floats
    yy: Floats


def _moments(x: Floats, y: Floats, seed: int, resamples: int) -> _Moments:
    columns = np.stack([x, y, x * x, x * y, y * y], axis=1)  # [S, 5]
    sums = np.concatenate([weights @ columns for weights in _resamples(len(x), seed, resamples)])  # [K, 5]
    return _Moments(*sums.T)


def _bootstrap_t(totals: Floats, tokens: Floats, seed: int, resamples: int) -> Interval:
    """95% interval of sum(totals) / sum(tokens) by the bootstrap-t method.

    The statistic that is resampled is the difference over its own standard error (Efron & Tibshirani, An Introduction
    to the Bootstrap, 1993, chapter 12), here that of a ratio estimator. Losses are skewed: a few samples hold most of
    a difference. There the percentile interval covers the truth in 80 to 90% of cases, this one in 90 to 95%. Neither
    bound is nearer than Student's, with Kish's effective number of samples, (sum tokens)^2 / sum tokens^2, as the
    resamples of a few samples are too alike.

    Of S samples without a difference all lie on one side of 0 with probability 2^(1 - S): below 6 samples that alone is
    more than 5%, so there are no bounds.
    """
    value, n = float(totals.sum() / tokens.sum()), _effective(tokens)
    if np.count_nonzero(tokens) < FEWEST or n < 2:
        return Interval(value, -math.inf, math.inf)
    rest = totals - value * tokens
    if abs(rest).max() <= 1e-12 * abs(totals).max():
        return Interval(value, value, value)  # all samples say the same
    drawn = _moments(totals, tokens, seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of samples without any token has no mean
        mean = drawn.x / drawn.y
    spread = drawn.xx - 2 * mean * drawn.xy + mean**2 * drawn.yy
    low, high = _t_bounds(drawn.x - value * drawn.y, spread, n)
    error = math.sqrt(float((rest**2).sum())) / float(tokens.sum())
    return Interval(value, value - high * error, value - low * error)


def _t_bounds(apart: Floats, spread: Floats, n: float) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of resampled t statistics, not nearer to 0 than those of Student's distribution.

    Args:
        apart: [K] distance of a resample's sum from what it is an estimate of; NaN where there is none.
        spread: [K] its sum of squared residuals; 0 where all that was drawn is alike, so that t is infinite.
        n: effective number of samples.

    Returns:
        in units of sqrt(sum of squared residuals), n / (n - 1) included.
    """
    known = np.isfinite(apart) & np.isfinite(spread)
    apart, spread = apart[known], spread[known].clip(min=0)
    least = 1e-9 * float(np.median(spread))  # what rounding leaves of a spread that is 0
    with np.errstate(invalid="ignore"):
        infinite = np.nan_to_num(np.sign(apart) * math.inf, nan=0.0, posinf=math.inf, neginf=-math.inf)
    statistic = np.where(spread > least, apart / np.sqrt(spread.clip(min=max(least, 1e-300))), infinite)
    low, high = np.quantile(statistic, [0.025, 0.975], method="inverted_cdf")  # no mean of two, which may be infinite
    z, v = _Z95, n - 1
    student = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)  # Abramowitz & Stegun 26.7.5
    student *= math.sqrt(n / v)
    return min(float(low), -student), max(float(high), student)


def _edge(is_possible: Callable[[float], bool], inside: float, step: float) -> float:
    """Where `is_possible` ends, going from `inside` in the direction of `step`."""
    outside = inside + step
    while is_possible(outside):
        step *= 2
        outside = inside + step
        if abs(step) > 1e9:
            return math.copysign(math.inf, step)
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if is_possible(middle) else (inside, middle)
    return inside


def _within(interval: Interval, least: float, most: float) -> Interval:
    """Bounds no further out than values can lie; unknown ones stay so."""
    low = max(interval.low, least) if math.isfinite(interval.low) else interval.low
    high = min(interval.high, most) if math.isfinite(interval.high) else interval.high
    return Interval(interval.value, low, high)


def _is_unknown(interval: Interval) -> bool:
    """No bound, or no width."""
    return not (math.isfinite(interval.low) and math.isfinite(interval.high)) or interval.low == interval.high


def _effective(tokens: Floats) -> float:
    """Kish's effective number of samples."""
    return float(tokens.sum() ** 2 / (tokens**2).sum())


def _wilson(right: float, n: float) -> tuple[float, float]:
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

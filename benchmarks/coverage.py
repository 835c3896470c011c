"""How often the report's 95% intervals hold the truth, on data whose truth is known; beside the percentile bootstrap.

    python benchmarks/coverage.py --draws 1000

Losses per token from four distributions on samples of 3 to 59 tokens, then the share that is recovered where
quantisation barely costs. One line a case: the share of intervals that hold the truth (its own standard error at 1000
draws: 0.7 points), and how wide the median interval is against the percentile bootstrap's. Numpy only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quantize.statistics import loss_interval, recovered_interval

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]

# Nats a token of a sample (or their difference), and the true mean.
LOSSES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(0.1, 1.0, n), 0.1),
    "exponential": (lambda rng, n: rng.exponential(1.0, n), 1.0),
    "lognormal": (lambda rng, n: rng.lognormal(0.0, 1.0, n), math.exp(0.5)),
    "heavy tails (Student, 3)": (lambda rng, n: 0.2 + rng.standard_t(3, n), 0.2),
}
RECOVERED = 0.4


def main() -> int:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--samples", type=int, nargs="+", default=[10, 30, 120])
    options = parser.parse_args()
    for name, (draw, truth) in LOSSES.items():
        for samples in options.samples:
            held, percentile, ratio = _losses(draw, truth, samples, options.draws)
            print(f"{name}, {samples} samples: {held:.1%} (percentile {percentile:.1%}; {ratio:.2f} times as wide)")
    for cost in (0.1, 0.25, 0.5):
        held, bounded = _recovered(cost, options.draws)
        print(f"recovered, 40 samples, cost {cost} +- 0.06 nats: {held:.1%}; bounded in {bounded:.1%}")
    return 0


def _losses(draw: Draw, truth: float, samples: int, draws: int) -> tuple[float, float, float]:
    held, percentile, widths = [], [], []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(3, 60, samples).astype(np.float64)
        nll = draw(rng, samples) * tokens
        found = loss_interval(nll, tokens, seed=100_000 + seed)
        chosen = np.random.default_rng(200_000 + seed).integers(samples, size=(2000, samples))
        low, high = np.quantile(nll[chosen].sum(1) / tokens[chosen].sum(1), [0.025, 0.975])
        held.append(found.low <= truth <= found.high)
        percentile.append(low <= truth <= high)
        widths.append((found.high - found.low) / (high - low))
    return float(np.mean(held)), float(np.mean(percentile)), float(np.median(widths))


def _recovered(cost: float, draws: int) -> tuple[float, float]:
    held, bounded = [], []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(3, 40, 40)
        control = rng.lognormal(0, 0.5, 40) * tokens
        costs = cost + rng.exponential(0.4, 40) - 0.4
        gains = RECOVERED * costs + rng.exponential(0.3, 40) - 0.3
        ptq = control + costs * tokens
        found = recovered_interval(ptq, ptq - gains * tokens, control, tokens, seed=100_000 + seed)
        held.append(found.low <= RECOVERED <= found.high)
        bounded.append(math.isfinite(found.low) and math.isfinite(found.high))
    return float(np.mean(held)), float(np.mean(bounded))


if __name__ == "__main__":
    raise SystemExit(main())

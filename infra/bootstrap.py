# docs/report.md
"""Bootstrap intervals over problems and seeds, and the verdict they allow."""

import functools

import numpy as np


@functools.cache
def drawn(count: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, count): how often each of `count` is drawn in `count` draws with replacement."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)


def bootstrap_ci95(values: np.ndarray, resamples: int = 10_000) -> list[float]:
    """95 % percentile interval of the mean of `values` (S, P), or (P,) for one seed: seeds and problems drawn with
    replacement, each by itself."""
    values = np.atleast_2d(values)
    seeds, problems = (drawn(count, resamples, axis) for axis, count in enumerate(values.shape))  # (R, S), (R, P)
    means = ((seeds @ values) * problems).sum(1) / values.size
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def verdict(ci95: list[float]) -> str:
    return "holds" if ci95[0] > 0 else "reversed" if ci95[1] < 0 else "not resolved"

# docs/report.md
"""Intervals over problems and seeds, and the verdict they allow."""

import functools

import numpy as np


@functools.cache
def problem_weights(count: int, draws: int) -> np.ndarray:
    """(draws, count), rows sum to 1: `count` problems drawn with replacement (the bootstrap)."""
    return np.random.default_rng(1).multinomial(count, np.full(count, 1 / count), draws) / count


@functools.cache
def seed_weights(count: int, draws: int) -> np.ndarray:
    """(draws, count), rows sum to 0: such combinations of the seeds' means are spread as the error of their mean is, as
    Student's t with count - 1 degrees of freedom says. One seed tells nothing of others: 0."""
    if count == 1:
        return np.zeros((draws, 1))
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((draws, count))
    return (normal - normal.mean(1, keepdims=True)) / np.sqrt(count * rng.chisquare(count - 1, (draws, 1)))


def drawn_means(values: np.ndarray, draws: int = 10_000) -> np.ndarray:
    """What the mean of `values` (..., S, P) over seeds and problems might as well have been: (draws, ...)."""
    seeds, problems = values.shape[-2:]
    resampled = problem_weights(problems, draws) @ values.mean(-2).T
    return resampled + seed_weights(seeds, draws) @ values.mean(-1).T


def bootstrap_ci95(values: np.ndarray) -> list[float]:
    """95 % interval of the mean of `values` (S, P), or (P,) for one seed; never beyond the smallest and largest value."""
    values = np.atleast_2d(values)
    ends = np.percentile(drawn_means(values), [2.5, 97.5])
    return [float(x) for x in np.clip(ends, values.min(), values.max())]


def verdict(ci95: list[float]) -> str:
    return "holds" if ci95[0] > 0 else "reversed" if ci95[1] < 0 else "not resolved"

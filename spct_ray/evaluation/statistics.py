"""Statistics: bootstrap intervals, AUC, calibration, paired differences.

Resampling is over items, never over samples of one item, which are not independent. Axes: I items, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spct_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of a - b over the same items, its bootstrap interval, and the p-value of the null hypothesis a = b."""

    difference: float
    ci: tuple[float, float]
    p_value: float


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"{name}: expected a non-empty list of numbers, got shape {array.shape}")
    if bad := int((~np.isfinite(array)).sum()):
        raise DataError(f"{name}: {bad} of {array.size} values are NaN or infinite; leave failed judgements out first")
    return array


def bootstrap_ci(values: ArrayLike, seed: int, num: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [I] (0/1, or expected accuracies in between)."""
    values_I = _finite(values, "bootstrap values")
    rng = np.random.default_rng(seed)
    means = values_I[rng.integers(0, values_I.size, size=(num, values_I.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int, num: int = 1000, level: float = 0.95) -> Difference:
    """a [I] against b [I] on the same items: bootstrap interval, and a sign-flip permutation test's two-sided p."""
    a_I, b_I = _finite(a, "paired values a"), _finite(b, "paired values b")
    if a_I.size != b_I.size:
        raise DataError(f"paired values differ in length: {a_I.size} and {b_I.size}; compare the same items")
    delta_I = a_I - b_I
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(num, delta_I.size))
    as_large = np.abs(signs @ delta_I) >= abs(delta_I.sum()) - 1e-9
    ci = bootstrap_ci(delta_I, seed, num, level)
    return Difference(float(delta_I.mean()), ci, float((1 + as_large.sum()) / (1 + num)))


def auc(scores: ArrayLike, labels: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """Probability that a positive scores above a negative, ties counted half, cases counted by `weight`; None where
    one class is missing."""
    scores_I, labels_I = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64) > 0.5
    weight_I = np.ones(scores_I.size) if weight is None else np.asarray(weight, dtype=np.float64)
    if len(np.unique(labels_I[weight_I > 0])) < 2:
        return None
    # By hand, as transformers imports scikit-learn wherever it is installed: 2 s for each process.
    values, place_I = np.unique(_finite(scores_I, "AUC scores"), return_inverse=True)
    positive_V, negative_V = (
        np.bincount(place_I, weight_I * which_I, len(values)) for which_I in (labels_I, ~labels_I)
    )
    below_V = negative_V.cumsum() - negative_V / 2
    return float(positive_V @ below_V / (positive_V.sum() * negative_V.sum()))


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> list[dict[str, Any]]:
    """The non-empty ones of `bins` equal-width bins: each has the predictions with "low" < p <= "high" (the first also
    p = 0), their "count", "mean_probability" and "share_positive"."""
    probabilities_I, labels_I = _finite(probabilities, "probabilities"), _finite(labels, "labels") > 0.5
    if probabilities_I.min() < 0 or probabilities_I.max() > 1:
        raise DataError(
            f"probabilities span {probabilities_I.min():.3g}..{probabilities_I.max():.3g}; "
            "expected 0..1: apply the sigmoid to logits first"
        )
    bin_I = np.clip(np.ceil(probabilities_I * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for b in np.unique(bin_I):
        inside = bin_I == b
        means = {
            "mean_probability": float(probabilities_I[inside].mean()),
            "share_positive": float(labels_I[inside].mean()),
        }
        rows.append({"low": float(b / bins), "high": float((b + 1) / bins), "count": int(inside.sum()), **means})
    return rows


def ece(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: mean over the predictions of |confidence - share right| of their bin."""
    rows = reliability(probabilities, labels, bins)
    off = sum(row["count"] * abs(row["mean_probability"] - row["share_positive"]) for row in rows)
    return float(off / sum(row["count"] for row in rows))

"""How well a guess of each case's quality tells which cases are bad."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata, spearmanr

__all__ = ["aurc", "excess_aurc", "rank_correlation", "risk_coverage"]


def _known(*values: Sequence[float]) -> list[np.ndarray]:
    """The cases of which all values are known."""
    table = np.array(values, dtype=np.float64)
    return list(table[:, np.isfinite(table).all(0)])


def risk_coverage(confidence: Sequence[float], risk: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean risk of the cases that are kept, where the least confident ones are given to a person.

    Of equally confident cases none comes first: each counts as their mean, which is the expectation over all orders.

    Args:
        confidence: of each case, such as its expected Dice.
        risk: of each case, such as 1 - Dice; cases of which either is not finite are left out.

    Returns:
        Coverage 1/n, 2/n, ... 1, and the mean risk of so many of the most confident cases; both empty for no case.
    """
    sure, losses = _known(confidence, risk)
    groups = rankdata(-sure, method="dense").astype(int) - 1
    means = np.bincount(groups, losses) / np.maximum(np.bincount(groups), 1)
    ordered = means[np.sort(groups)]
    number = np.arange(1, len(ordered) + 1)
    return number / max(len(ordered), 1), np.cumsum(ordered) / number


def aurc(confidence: Sequence[float], risk: Sequence[float]) -> float:
    """Area under the risk-coverage curve (Geifman et al., arXiv 1805.08206), the smaller the better.

    Confidence that knows nothing has the mean risk.

    Returns:
        NaN for no case.
    """
    _, selective = risk_coverage(confidence, risk)
    return float(selective.mean()) if len(selective) else math.nan


def excess_aurc(confidence: Sequence[float], risk: Sequence[float]) -> float:
    """The area above that of a confidence which puts the cases in the order of their risk (E-AURC); 0 at best."""
    sure, losses = _known(confidence, risk)
    return aurc(sure.tolist(), losses.tolist()) - aurc((-losses).tolist(), losses.tolist())


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN for fewer than three cases, and where either is the same in all."""
    x, y = _known(a, b)
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return math.nan
    return float(spearmanr(x, y).statistic)

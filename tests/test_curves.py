"""Risk-coverage curves and rank correlation, against closed forms and brute force."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from medsegdiff_monai.report.curves import aurc, excess_aurc, rank_correlation, risk_coverage


def test_a_perfect_order_of_right_and_wrong_cases_has_the_known_area() -> None:
    n, wrong = 50, 15
    risk = [0.0] * (n - wrong) + [1.0] * wrong
    expected = sum((i - (n - wrong)) / i for i in range(n - wrong + 1, n + 1)) / n
    assert aurc([-r for r in risk], risk) == pytest.approx(expected)
    assert excess_aurc([-r for r in risk], risk) == pytest.approx(0)


def test_confidence_that_knows_nothing_has_the_mean_risk() -> None:
    risk = np.random.default_rng(0).uniform(size=20)
    assert aurc([0.5] * 20, risk) == pytest.approx(risk.mean())
    coverage, selective = risk_coverage([0.5] * 20, risk)
    assert coverage == pytest.approx(np.arange(1, 21) / 20)
    assert selective == pytest.approx(np.full(20, risk.mean()))


def test_the_curve_is_the_mean_risk_of_the_most_confident() -> None:
    coverage, selective = risk_coverage([0.2, 0.9, 0.5], [0.6, 0.0, 0.3])
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert selective.tolist() == pytest.approx([0, 0.15, 0.3])


def test_ties_count_as_the_mean_over_all_orders() -> None:
    confidence, risk = [0.9, 0.5, 0.5, 0.5, 0.1], [0.1, 0.7, 0.0, 0.3, 0.5]
    areas = []
    for order in permutations([1, 2, 3]):
        ordered = [risk[i] for i in (0, *order, 4)]
        areas.append(np.mean([np.mean(ordered[: n + 1]) for n in range(5)]))
    assert aurc(confidence, risk) == pytest.approx(np.mean(areas))


def test_any_order_is_between_the_best_and_the_worst() -> None:
    rng = np.random.default_rng(1)
    risk = rng.uniform(size=30)
    for _ in range(20):
        confidence = rng.normal(size=30)
        assert 0 <= excess_aurc(confidence, risk) <= aurc(risk, risk) - aurc(-risk, risk)


def test_rising_functions_of_confidence_change_nothing() -> None:
    rng = np.random.default_rng(2)
    confidence, risk = rng.uniform(size=25), rng.uniform(size=25)
    assert aurc(confidence**3, risk) == pytest.approx(aurc(confidence, risk))
    assert rank_correlation(confidence**3, risk) == pytest.approx(rank_correlation(confidence, risk))


def test_rank_correlation_has_the_closed_form_without_ties() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b)) / (5 * 24))
    assert rank_correlation(a, [-x for x in a]) == pytest.approx(-1)


def test_what_is_not_known_does_not_count() -> None:
    assert aurc([0.9, math.nan, 0.1], [0.2, 0.9, math.nan]) == pytest.approx(0.2)
    assert math.isnan(aurc([], []))
    assert math.isnan(excess_aurc([math.nan], [0.5]))
    assert len(risk_coverage([], [])[0]) == 0
    assert math.isnan(rank_correlation([0.1, 0.2], [0.1, 0.2]))
    assert math.isnan(rank_correlation([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]))

"""What the rows of ``cases.csv`` say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics import RATER_SCORES
from .curves import aurc, excess_aurc, rank_correlation

__all__ = [
    "CLEANED", "FAILED", "NOT_CLEANED", "ClassScores", "Grading", "Row", "class_scores", "grading_of", "mean_of",
    "number", "over_folds", "rater_means", "unit_of", "was_cleaned", "without_interval",
]  # fmt: skip

FAILED = 0.5  # a Dice below it counts as a failure
# columns that say what a clean-up did, or what keeping the largest component alone would do: voxels, and the other Dice
CLEANED = ("removed_voxels", "uncleaned_dice")
NOT_CLEANED = ("beside_largest_voxels", "largest_component_dice")

Row = Mapping[str, Any]


def number(row: Row, column: str) -> float:
    """A value of a row, whether it comes from a computation or a file; NaN where it is empty or not there."""
    value = row.get(column)
    return math.nan if value is None or value == "" else float(value)


def mean_of(row: Row, score: str, names: Sequence[str]) -> float:
    """Mean over the classes of which a score is known."""
    values = [value for name in names if not math.isnan(value := number(row, f"{score}_{name}"))]
    return sum(values) / len(values) if values else math.nan


def rater_means(rows: Sequence[Row]) -> list[tuple[str, float, float, int]]:
    """Column, mean, standard deviation and number of cases of each score against several raters that has a value."""
    found = []
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith(RATER_SCORES)):
        values = np.array([value for row in rows if not math.isnan(value := number(row, key))])
        if len(values):
            found.append((key, float(values.mean()), float(values.std()), len(values)))
    return found


def unit_of(rows: Sequence[Row]) -> str:
    """The unit of lengths: ``mm``, ``px``, or both where files with spacing and without are in one table."""
    filled = {key for row in rows for key, value in row.items() if value not in (None, "")}
    found = [unit for unit in ("mm", "px") if any(key.startswith((f"area_{unit}", f"volume_{unit}")) for key in filled)]
    return " or ".join(found) or "mm"


def was_cleaned(rows: Sequence[Row], names: Sequence[str]) -> bool:
    """Whether the masks were cleaned up, see :func:`medsegdiff_monai.rows.cleanup_row`."""
    return any(not math.isnan(number(row, f"{CLEANED[0]}_{name}")) for row in rows for name in names)


def over_folds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and (n - 1) standard deviation of what folds have; NaN where too few have any, or one is infinite."""
    known = np.array([value for value in values if not math.isnan(value)])
    spread = len(known) > 1 and np.isfinite(known).all()
    return float(known.mean()) if len(known) else math.nan, float(known.std(ddof=1)) if spread else math.nan


@dataclass(frozen=True)
class ClassScores:
    """Scores of a class over the cases with a label; NaN where no row has them.

    Attributes:
        name: of the class.
        cases: number of cases with a Dice.
        mean: of the Dice.
        median: of the Dice.
        below: share of the cases with a Dice below ``FAILED``.
        hd95: median distance of surfaces; infinite distances count, so that a mask that is empty is not left out.
        nsd: mean share of the surfaces within the tolerance.
        ece_band: mean calibration error near the contours.
    """

    name: str
    cases: int
    mean: float
    median: float
    below: float
    hd95: float
    nsd: float
    ece_band: float


def _over_cases(rows: Sequence[Row], column: str, function: Callable[[np.ndarray], Any]) -> float:
    values = np.array([value for row in rows if not math.isnan(value := number(row, column))])
    return float(function(values)) if len(values) else math.nan


def class_scores(rows: Sequence[Row], names: Sequence[str]) -> list[ClassScores]:
    """Scores of each class that any case has a Dice of."""
    found = []
    for name in names:
        dice = f"dice_{name}"
        scores = ClassScores(
            name,
            sum(not math.isnan(number(row, dice)) for row in rows),
            _over_cases(rows, dice, np.mean),
            _over_cases(rows, dice, np.median),
            _over_cases(rows, dice, lambda values: (values < FAILED).mean()),
            _over_cases(rows, f"hd95_{name}", np.median),
            _over_cases(rows, f"nsd_{name}", np.mean),
            _over_cases(rows, f"ece_band_{name}", np.mean),
        )
        found += [scores] if scores.cases else []
    return found


def without_interval(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Classes of which some case has an expected Dice without an interval."""
    known, low = "expected_dice_{}", "expected_dice_low_{}"
    return [
        name
        for name in names
        if any(
            math.isfinite(number(row, known.format(name))) and math.isnan(number(row, low.format(name))) for row in rows
        )
    ]


@dataclass(frozen=True)
class Grading:
    """How well the expected Dice tells the true one.

    Attributes:
        name: of the class, or of the mean over all.
        cases: names of those with both.
        expected: of each case, (cases,).
        true: Dice of each, (cases,).
    """

    name: str
    cases: Sequence[str]
    expected: Sequence[float]
    true: Sequence[float]

    @property
    def risk(self) -> list[float]:
        """1 - Dice of each case."""
        return [1 - dice for dice in self.true]

    @property
    def error(self) -> float:
        """Mean absolute error."""
        return float(np.abs(np.subtract(self.expected, self.true)).mean())

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation."""
        return rank_correlation(self.expected, self.true)

    @property
    def aurc(self) -> float:
        """Area under the risk-coverage curve."""
        return aurc(self.expected, self.risk)

    @property
    def excess_aurc(self) -> float:
        """What of it a perfect order would not have."""
        return excess_aurc(self.expected, self.risk)


def grading_of(rows: Sequence[Row], names: Sequence[str]) -> list[Grading]:
    """Expected and true Dice of each class, and first, where there are several, of the mean over them."""
    groups = {"mean over classes": list(names)} if len(names) > 1 else {}
    found = []
    for group, members in {**groups, **{name: [name] for name in names}}.items():
        table = [(str(r["case"]), mean_of(r, "expected_dice", members), mean_of(r, "dice", members)) for r in rows]
        known = [line for line in table if math.isfinite(line[1]) and math.isfinite(line[2])]
        found += [Grading(group, *map(list, zip(*known)))] if known else []
    return found

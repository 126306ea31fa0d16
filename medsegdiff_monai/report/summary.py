"""The few lines that the log says of all cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..grading import MIN_CASES
from .statistics import (
    CLEANED,
    FAILED,
    ClassScores,
    Row,
    class_scores,
    mean_of,
    number,
    rater_means,
    unit_of,
    was_cleaned,
    without_interval,
)

__all__ = ["aligned", "caution", "interval_note", "summary_lines"]

CHOSE_WEIGHTS = (
    "These cases chose the weights and their calibration: expect somewhat lower scores on new cases. "
    "Report scores of a list that the training did not see."
)
TRAINED = "The weights were trained on these cases: the scores say nothing of new ones."


def interval_note(rows: Sequence[Row], names: Sequence[str]) -> str:
    """What to keep in mind of an expected Dice without an interval, if there is any."""
    rough = without_interval(rows, names)
    if not rough:
        return ""
    of = "" if len(rough) == len(names) else f" of {', '.join(rough)}"
    return (
        f"The expected Dice{of} is a rough guess, without an interval: it was fitted on fewer than {MIN_CASES} "
        "validation cases, or on none, or is of combined weights or of another tool."
    )


def caution(split: str | None, chose_weights: bool) -> str:
    """What to keep in mind of scores on a list, if anything."""
    return TRAINED if split == "training" else CHOSE_WEIGHTS if chose_weights else ""


def _cells(scores: ClassScores) -> list[str]:
    distance = "" if math.isnan(scores.hd95) else f"{scores.hd95:.2f}"
    return [scores.name, f"{scores.mean:.3f}", f"{scores.median:.3f}", f"{scores.below:.0%}", distance]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right; columns without values are left out."""
    columns = [column for column in zip(*table) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns)
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]


def _beside_raters(rows: Sequence[Row]) -> list[str]:
    """The scores against several raters."""
    return [
        f"{key}: {mean:.4f} (std {std:.4f}, {count} cases; {'lower' if key.startswith('ged') else 'higher'} is better)"
        for key, mean, std, count in rater_means(rows)
    ]


def summary_lines(
    rows: Sequence[Row],
    names: Sequence[str],
    *,
    report: str | Path | None = None,
    split: str | None = None,
    chose_weights: bool = False,
    number_worst: int = 3,
) -> list[str]:
    """Say what was scored and how well, which cases are worst, and where the report is.

    Args:
        rows: of ``cases.csv``.
        names: of the classes.
        report: the report, if there is one.
        split: list that was scored: ``training``, ``validation`` or ``test``.
        chose_weights: whether that list chose the weights.
        number_worst: how many of the worst cases are named.

    Returns:
        Lines for the log; without labels only how many cases there are, and how many are flagged.
    """
    scores = class_scores(rows, names)
    cases = f"{len(rows)} case{'s' * (len(rows) != 1)}"
    of_list = f" of the list '{split}'" if split else ""
    lines = [f"Scored: {cases}{of_list}." if scores else f"Segmented: {cases}."]
    if scores:
        lines += list(filter(None, [caution(split, chose_weights)]))
        head = ["class", "mean Dice", "median", f"below {FAILED:g}", f"median HD95 ({unit_of(rows)})"]
        lines += aligned([head, *map(_cells, scores)])
        worst = sorted((dice, str(row["case"])) for row in rows if not math.isnan(dice := mean_of(row, "dice", names)))
        named = ", ".join(f"{case} (Dice {dice:.3f})" for dice, case in worst[:number_worst])
        lines += [f"Worst: {named}."]
    lines += _beside_raters(rows)
    if was_cleaned(rows, names):
        changed = sum(any(number(row, f"{CLEANED[0]}_{name}") > 0 for name in names) for row in rows)
        lines.append(f"Clean-up removed voxels in {changed or 'none'} of {cases}.")
    flagged = sum(bool(row.get("flag")) for row in rows)
    if any("flag" in row for row in rows):
        lines.append(f"Flagged for review: {flagged or 'none'} of {cases}.")
    lines += list(filter(None, [interval_note(rows, names)]))
    return lines + ([f"Report: {report}"] if report is not None else [])

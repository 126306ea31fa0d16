"""What ``benchmarks.uncertainty`` has measured, as a page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medsegdiff_monai.files import write_atomically
from medsegdiff_monai.report.curves import aurc, excess_aurc

from .results import spread

__all__ = ["Difference", "best", "difference", "latest", "write"]

OURS, SCALED, DEEP = "ours", "UNet, temperature", "five UNets"
DRAWS = 1000  # of the bootstrap
WAYS = ("expected", "pairwise", "entropy")
RANKS = {
    "dice": ("Dice ↑", 3),
    **{f"aurc_{way}": (f"AURC ↓, {way}", 4) for way in WAYS},
    **{f"e_aurc_{way}": (f"E-AURC ↓, {way}", 4) for way in WAYS},
    "spearman": ("rank correlation ↑", 3),
    "error": ("error of the expected Dice ↓", 3),
}
PIXELS = {
    "ece_band_before": ("ECE in the band, not calibrated ↓", 3),
    "ece_band": ("ECE in the band ↓", 3),
    "ece_band_pooled": ("the same, all cases together ↓", 3),
    "auroc": ("AUROC of wrong pixels ↑", 3),
    "members": ("members", 0),
    "seconds_per_image": ("seconds / image", 3),
    "iterations": ("iterations", 0),
    "learning_rate": ("learning rate", 3),
}
TEXT = """# When and where a segmenter is wrong

Written by `python -m benchmarks.uncertainty --data_root DIR` from `benchmarks/uncertainty.jsonl`.

All methods train on the same cases with the same augmentation for the same CPU time of one thread, in turns: AdamW, a
learning rate that falls by a half cosine, clipped gradients, averaged weights, networks of about the same size. A fifth
of the training cases (whole patients) is held out from all of them. There, and on no case that is scored, each method
learns the calibration of its probabilities – ours the bundle's own, all others a temperature for each class – and the
Dice to expect at an agreement of its members, all of them as the bundle does.

- **ours**: this bundle with its default objective, members and fusion.
- **UNet, temperature**: MONAI's U-Net. A single network has no members to agree: the Dice that it expects is that of its
  mask with its own probabilities.
- **five UNets**: a fifth of the time each.
- **UNet, MC dropout**: dropout that stays on; as many passes as ours.
- **UNet, flips**: the first U-Net again, its image flipped along the axis that training flips, or along all axes.

**AURC**: mean of 1 − Dice over those cases that are kept, averaged over how many are kept, where the least sure cases
are given to a person first; **E-AURC**: what of it a perfect order would not have. How sure a method is: by the expected
Dice, by the mean Dice over pairs of members, or by the entropy of its probabilities, averaged over the image. **Rank
correlation** (Spearman) and mean absolute **error** are of the expected Dice with the true one. The **band** is three
pixels wide on both sides of the contours of mask and truth; **ECE** there is a mean over cases, or of the voxels of all
cases together; **AUROC**: whether the entropy tells wrong pixels from right ones there. With several classes, scores are
means over them. ± is the standard deviation over seeds. Intervals (95 %) are of paired differences, by a bootstrap over
cases, the mean over seeds.
"""


class Difference(NamedTuple):
    """A paired difference, and its 95 % interval over cases."""

    mean: float
    low: float
    high: float


Statistic = Callable[[Mapping[str, np.ndarray]], float]


def _risk(cases: Mapping[str, np.ndarray], way: str) -> tuple[list[float], list[float]]:
    confidence = {"expected": "expected_dice", "pairwise": "pairwise_dice", "entropy": "entropy"}[way]
    sure = -cases[confidence] if way == "entropy" else cases[confidence]
    return sure.tolist(), (1 - cases["dice"]).tolist()


def _mean(cases: Mapping[str, np.ndarray], column: str) -> float:
    return float(np.nanmean(cases[column]))


def statistic(column: str) -> Statistic:
    """What makes a column of the table of its cases."""
    for name, function in (("e_aurc_", excess_aurc), ("aurc_", aurc)):
        if column.startswith(name):
            way = column.removeprefix(name)
            return lambda cases: function(*_risk(cases, way))
    return lambda cases: _mean(cases, column)


def difference(
    ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], one: Statistic, other: Statistic
) -> Difference:
    """Difference of two scores of the same cases, the mean over the seeds that both have.

    Args:
        ours: lines of the results, one for each seed.
        others: the same.
        one: score of ours, of its cases.
        other: score of the others.
    """
    by_seed = {row["seed"]: row for row in others}
    pairs = [(row["cases"], by_seed[row["seed"]]["cases"]) for row in ours if row["seed"] in by_seed]
    tables = [
        [{name: np.array(values) for name, values in cases.items()} for cases in pair]
        for pair in pairs
        if pair[0]["case"] == pair[1]["case"]
    ]
    if not tables:
        return Difference(math.nan, math.nan, math.nan)
    number, random = len(tables[0][0]["case"]), np.random.default_rng(0)

    def over_seeds(picked: np.ndarray) -> float:
        some = [[{name: values[picked] for name, values in cases.items()} for cases in pair] for pair in tables]
        return statistics.mean(one(a) - other(b) for a, b in some)

    drawn = [over_seeds(random.integers(0, number, number)) for _ in range(DRAWS)]
    return Difference(over_seeds(np.arange(number)), *np.nanpercentile(drawn, (2.5, 97.5)).tolist())


def latest(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last line of each data set, time, method and seed."""
    found = {tuple(line[name] for name in ("data", "seconds", "method", "seed")): line for line in lines}
    return list(found.values())


def best(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> tuple[str, str]:
    """Method other than ours, and column, of the least mean."""
    names = dict.fromkeys(row["method"] for row in rows if row["method"] != OURS)

    def mean(name: str, column: str) -> float:
        value = statistics.mean(row[column] for row in rows if row["method"] == name)
        return math.inf if math.isnan(value) else value

    return min(((name, column) for name in names for column in columns), key=lambda both: mean(*both))


def _table(groups: Mapping[str, list], columns: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    yield "| " + " | ".join(["method", *(head for head, _ in columns.values()), "seeds"]) + " |"
    yield "| --- " * (len(columns) + 2) + "|"
    for name, rows in groups.items():
        cells = [spread([row[column] for row in rows], digits) for column, (_, digits) in columns.items()]
        yield f"| {name} | {' | '.join(cells)} | {len(rows)} |"


def _compare(groups: Mapping[str, list], column: str, other: str, other_column: str) -> str:
    ours, others = groups[OURS], groups[other]
    found = difference(ours, others, statistic(column), statistic(other_column))
    digits = 4 if "aurc" in column else 3
    how = f", {other_column.rpartition('_')[2]}" if "aurc" in column else ""
    values = (spread([row[name] for row in rows], digits) for rows, name in ((ours, column), (others, other_column)))
    first, second = values
    told = f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"
    return f"{first} | {other}{how} | {second} | {told}"


def _claims(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, list]) -> Iterator[str]:
    """Ours beside the opponent that is to be beaten in each score."""
    yield "| score | ours | the best other, or the one to compare with | its value | ours − other, 95 % interval |"
    yield "| --- | --- | --- | --- | --- |"
    for name, label in (("aurc", "AURC ↓"), ("e_aurc", "E-AURC ↓")):
        other, column = best(rows, [f"{name}_{way}" for way in WAYS])
        yield f"| {label} | {_compare(groups, f'{name}_expected', other, column)} |"
    for column, other, label in (("ece_band", SCALED, "ECE in the band ↓"), ("auroc", DEEP, "AUROC of wrong pixels ↑")):
        if other in groups:
            yield f"| {label} | {_compare(groups, column, other, column)} |"


def _section(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Iterator[str]:
    first = rows[0]
    yield from ("", f"## {first['data']}, {first['seconds']:g} s of training", "")
    groups = {m: some for m in methods if (some := [row for row in rows if row["method"] == m])}
    made = sorted({(row["torch"], row["monai"], row["date"]) for row in rows})
    torch, monai, date = made[-1]
    yield f"{len(first['cases']['case'])} cases; torch {torch}, MONAI {monai}; {date}."
    for columns in (RANKS, PIXELS):
        yield ""
        yield from _table(groups, columns)
    if OURS in groups and len(groups) > 1:
        yield ""
        yield from _claims(rows, groups)


def write(results: Path, methods: Sequence[str], page: Path) -> None:
    """Write the page.

    Args:
        results: a line for each run.
        methods: their order.
        page: to write.
    """
    rows = latest([json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()])
    text = TEXT.splitlines()
    for data, seconds in dict.fromkeys((row["data"], row["seconds"]) for row in rows):
        text += _section([row for row in rows if (row["data"], row["seconds"]) == (data, seconds)], methods)
    write_atomically(page, ("\n".join(text).rstrip() + "\n").encode())

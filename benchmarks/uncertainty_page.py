"""What ``benchmarks.uncertainty`` has measured, as a page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from medsegdiff_monai.report.curves import aurc

from .results import DEPENDENT, PATIENT, spread, versions

__all__ = ["OURS", "OUR_SCORE", "best_score", "difference", "met", "write"]

OURS, OUR_SCORE = "this bundle", "expected Dice"
UNET, FIVE = "UNet", "five UNets"
RESAMPLED = 1000  # times, for an interval
CORRELATION, ERROR = 0.8, 0.06  # what is aimed at

Runs = list[dict[str, Any]]  # of a method on a data set, over the seeds

TEXT = """# Uncertainty one can act on

Written by `python -m benchmarks.uncertainty --data_root DIR` from `benchmarks/uncertainty.jsonl`.

Which cases can be trusted, which voxels, and do probabilities mean what they say? All methods learn from the same
cases for the same CPU time of one thread, in turns, as `benchmarks.peers` trains. A fifth of the training cases, by
patient where patients are known, is held out; whatever is fitted is fitted on these, and nothing on the cases that
are scored.

- **this bundle**: the default objective, 16 masks of one pass each, half of them of the image flipped as in training.
- **UNet**: MONAI's, of about the same number of parameters, one mask; **UNet, flips**: the same network on the image
  and on the image flipped along the axes that training flips, or along **all** axes.
- **UNet, MC dropout**: trained with dropout, which stays on for 16 passes.
- **five UNets**: a fifth of the time each, a mask from each.

In 2D, the learning rates of the UNet and of the UNet with dropout are the one that was chosen for a UNet on held-out
cases ([results](../../docs/results.md)). These two were trained later than the five UNets, in turns with each other,
and this bundle later still, by itself; the iterations tell what the time was worth. Other rates, such as those of the
five UNets and in 3D, were not chosen in this way.

**Cases.** A score of confidence orders the cases; the risk is 1 − Dice (mean over classes). **AURC** is the area
under the risk-coverage curve, **E-AURC** what of it a perfect order would not have, the correlation is Spearman's
with the true Dice, and the error the mean absolute difference from it. For this bundle the score is always its
*expected Dice*, the mean Dice over pairs of masks, which the held-out cases take to the Dice of the mask. Each of the
others gets whichever score is best **in that column, chosen on the scored cases**, which favours it: the same
*expected Dice* of its masks; *soft Dice*, that of the mask with the mean probability, plain or *calibrated*, fitted in
the same way; *entropy*, its mean over the image; or *entropy by size*, its sum by the size of the mask. A training
whose masks all have the same Dice, such as 0, leaves no order to judge: it counts in AURC alone.

A difference in AURC below 0 is in favour of this bundle. Its interval of 95 % is by bootstrap over patients, where they
are known, else cases, and over the trainings of each method. Three trainings are few, so that it is a little too
narrow; with one seed, it does not include the variation between trainings. TG3K_thyroid has none: its cases come from
four clusters.

**Voxels** within three of a contour, true or predicted. **ECE**: calibration error of the mean probability, as it is
and calibrated: by this bundle's table for itself, by a temperature for each class for the others. **AUROC**: whether
the entropy tells wrong voxels from right ones. Both are means over cases and classes.
"""


def _value(run: dict[str, Any], score: str, figure: str) -> float:
    """A figure of a score; NaN where all cases have the same Dice, which leaves nothing to tell apart."""
    if figure != "aurc" and len(set(run["of_cases"]["dice"])) == 1:
        return math.nan
    return run["scores"][score][figure]


def _mean(runs: Runs, score: str, figure: str) -> float:
    """Over the trainings that have a value."""
    return float(np.nanmean([_value(run, score, figure) for run in runs]))


def best_score(runs: Runs, figure: str) -> str:
    """The score by which a method is best, by its mean over the seeds: of ours always the same.

    Args:
        runs: of a method, over the seeds.
        figure: ``aurc``, ``e_aurc``, ``error`` (the smaller the better) or ``spearman`` (the larger).
    """
    if runs[0]["method"] == OURS:
        return OUR_SCORE
    known = [score for score, row in runs[0]["scores"].items() if figure in row]
    choose: Callable[..., str] = max if figure == "spearman" else min
    return choose(known, key=lambda score: _mean(runs, score, figure))


def difference(ours: Runs, theirs: Runs) -> tuple[float, float, float]:
    """How much lower the AURC of ours is: the mean over the trainings, and a 95 % interval.

    The interval is by bootstrap over patients (:data:`benchmarks.results.PATIENT`) and over the trainings of each
    method; what is the best score of theirs is not chosen anew.

    Raises:
        ValueError: where runs have different cases.
    """
    cases = ours[0]["of_cases"]["case"]
    if any(run["of_cases"]["case"] != cases for run in [*ours, *theirs]):
        raise ValueError(f"runs of {ours[0]['method']} and {theirs[0]['method']} have different cases")
    tables = [
        [(np.array(run["of_cases"][score]), 1 - np.array(run["of_cases"]["dice"])) for run in runs]
        for runs, score in ((ours, OUR_SCORE), (theirs, best_score(theirs, "aurc")))
    ]

    def areas(drawn: np.ndarray) -> list[list[float]]:
        return [[aurc(sure[drawn], risk[drawn]) for sure, risk in runs] for runs in tables]

    patients: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        patients.setdefault(PATIENT.match(case)[0], []).append(i)
    groups, random, found = list(patients.values()), np.random.default_rng(0), []
    for _ in range(RESAMPLED):
        drawn = np.concatenate([groups[i] for i in random.integers(len(groups), size=len(groups))])
        mine, others = (np.mean(random.choice(values, len(values))) for values in areas(drawn))
        found.append(mine - others)
    low, high = np.percentile(found, [2.5, 97.5])
    mine, others = (statistics.mean(values) for values in areas(np.arange(len(cases))))
    return mine - others, float(low), float(high)


def _told(data: str, ours: Runs, theirs: Runs) -> str:
    if data in DEPENDENT:
        return f"{_mean(ours, OUR_SCORE, 'aurc') - _mean(theirs, best_score(theirs, 'aurc'), 'aurc'):+.4f}"
    return "{:+.4f} ({:+.4f} to {:+.4f})".format(*difference(ours, theirs))


def _values(runs: Runs, figure: str) -> list[float]:
    score = best_score(runs, figure)
    return [_value(run, score, figure) for run in runs]


def cases_table(groups: dict[str, Runs]) -> list[str]:
    """Which cases can be trusted."""
    heads = ["method", "masks", "Dice ↑", "score (AURC)", "AURC ↓", "E-AURC ↓", "correlation ↑", "error ↓"]
    heads += ["ours − theirs, AURC", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, runs in groups.items():
        cells = [name, str(runs[0]["masks"]), spread(run["dice"] for run in runs), best_score(runs, "aurc")]
        cells += [spread(_values(runs, figure), 4) for figure in ("aurc", "e_aurc")]
        cells += [spread(_values(runs, figure)) for figure in ("spearman", "error")]
        told = ""
        if name != OURS and OURS in groups:
            told = _told(runs[0]["data"], groups[OURS], runs)
        lines.append("| " + " | ".join([*cells, told, str(len(runs))]) + " |")
    return [*lines, ""]


def voxels_table(groups: dict[str, Runs]) -> list[str]:
    """Which voxels can be trusted, and what it costs."""
    columns = {"ece_band": 4, "ece_band_calibrated": 4, "auroc": 3}
    costs = {"iterations": 0, "parameters_m": 2, "seconds_per_image": 3}
    heads = ["method", "learning rate", "ECE ↓", "ECE, calibrated ↓", "AUROC ↑", "iterations", "parameters, M"]
    heads += ["seconds / image"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, runs in groups.items():
        cells = [" and ".join(f"{rate:g}" for rate in sorted({run["learning_rate"] for run in runs}))]
        cells += [spread((run[column] for run in runs), digits) for column, digits in columns.items()]
        cells += [f"{statistics.mean(run[cost] for run in runs):.{digits}f}" for cost, digits in costs.items()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return [*lines, ""]


def met(groups: dict[str, Runs]) -> dict[str, bool]:
    """Which of the aims are met on a data set, by the means over the seeds."""
    ours = groups[OURS]
    others = [runs for name, runs in groups.items() if name != OURS]

    def mean(runs: Runs, column: str) -> float:
        return statistics.mean(run[column] for run in runs)

    def better_than_all(figure: str) -> bool:
        sign = -1 if figure == "spearman" else 1
        mine = sign * _mean(ours, OUR_SCORE, figure)
        return all(mine < sign * _mean(runs, best_score(runs, figure), figure) for runs in others)

    calibrated = mean(ours, "ece_band_calibrated")
    aims = {
        "AURC below all others'": better_than_all("aurc"),
        "E-AURC below all others'": better_than_all("e_aurc"),
        "correlation above all others'": better_than_all("spearman"),
        f"correlation ≥ {CORRELATION:g}": _mean(ours, OUR_SCORE, "spearman") >= CORRELATION,
        f"error ≤ {ERROR:g}": _mean(ours, OUR_SCORE, "error") <= ERROR,
        "ECE ≤ half of that before calibration": calibrated <= mean(ours, "ece_band") / 2,
    }
    if UNET in groups:
        aims["ECE ≤ UNet's with temperature"] = calibrated <= mean(groups[UNET], "ece_band_calibrated")
    if FIVE in groups:
        aims["AUROC ≥ five UNets'"] = mean(ours, "auroc") >= mean(groups[FIVE], "auroc")
    return aims


def summary(sections: Iterable[tuple[str, dict[str, Runs]]]) -> list[str]:
    """A table of what is met where."""
    rows = {title: met(groups) for title, groups in sections if OURS in groups and len(groups) > 1}
    if not rows:
        return []
    aims = list(dict.fromkeys(aim for row in rows.values() for aim in row))
    title = "## Aims, and whether the means over the seeds meet them"
    lines = [title, "", f"| data, training | {' | '.join(aims)} |", "|" + " --- |" * (1 + len(aims))]
    words = {True: "yes", False: "no", None: ""}
    lines += [f"| {title} | {' | '.join(words[row.get(aim)] for aim in aims)} |" for title, row in rows.items()]
    return [*lines, ""]


def latest(lines: Runs) -> Runs:
    """The last line of each method, data set, seed and time, whatever version and learning rate earlier ones had."""
    last = {tuple(run[k] for k in ("data", "method", "seed", "seconds")): run for run in lines}
    return list(last.values())


def write(results: Path, page: Path) -> None:
    """Write the page.

    Args:
        results: a line for each run.
        page: to write.
    """
    lines = latest([json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()])
    methods = list(dict.fromkeys(run["method"] for run in sorted(lines, key=lambda run: run["method"] != OURS)))
    sections = []
    for data, seconds in dict.fromkeys((run["data"], run["seconds"]) for run in lines):
        some = [run for run in lines if (run["data"], run["seconds"]) == (data, seconds)]
        groups = {name: [run for run in some if run["method"] == name] for name in methods}
        sections.append((f"{data}, {seconds:g} s", {name: runs for name, runs in groups.items() if runs}))
    text = [*TEXT.splitlines(), "", *summary(sections)]
    for title, groups in sections:
        some = [run for runs in groups.values() for run in runs]
        made = {name: " and ".join(versions(name, some)) for name in ("torch", "monai", "version", "date")}
        first = some[0]
        text += [
            f"## {title}: {first['cases']} cases, {first['held_out']} held out to fit on",
            "",
            f"Version {made['version']}, torch {made['torch']}, MONAI {made['monai']}; {made['date']}.",
            "",
            *cases_table(groups),
            *voxels_table(groups),
        ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")

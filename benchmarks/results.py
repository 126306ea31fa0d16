"""Write ``docs/results.md`` from the finished runs: ``python -m benchmarks.results``.

The runs are the lines of ``benchmarks/results.jsonl`` (see ``benchmarks.accuracy``); what is said about them besides is
in ``benchmarks/results_text.md``, whose ``{tables}``, ``{paper}``, ``{failures}`` and ``{sha256}`` they replace, and
``{tried}`` by ``benchmarks/results/tried.csv``. Runs of a method are left out where later lines have it with another
objective.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .accuracy import CHOSEN, FIRST_VERSION, METHODS, RESULTS, ROOT, SETS, TRAINED_AS

PAPER = {  # Dice on REFUGE-2, BraTS-2021 and DDTI (arXiv 2211.00611v5, ablation table)
    "plain DPM": (0.846, 0.882, 0.841),
    "+ dynamic conditioning": (0.867, 0.898, 0.859),
    "+ FF-Parser": (0.875, 0.905, 0.866),
}
PAPER_SETS = ("optic cup, REFUGE-2", "brain tumour, BraTS-2021", "thyroid nodule, DDTI")
NEAREST = (("DRISHTI_roi", 1), ("LGG_MRI", 0), ("TG3K_thyroid", 0))  # the set and class that stand for each of these
PARTS = ("optic cup", "brain tumour", "thyroid gland")
SCORES = {
    "dice": "Dice",
    "dice_volume": "Dice of volumes",
    "iou": "IoU",
    "hd95": "HD95",
    "nsd": "NSD",
    "ece": "ECE",
    "ece_band": "ECE in the band",
    "brier": "Brier in the band",
    "auroc": "AUROC in the band",
    "ged": "GED*",  # with each member's distance to itself, as measured until November 2026
    "ged_unbiased": "unbiased GED*",
    "matched_iou": "matched IoU*",
}
OURS = "+ FF-Parser"
DEPENDENT = ("TG3K_thyroid",)  # its frames come from four clusters, too few for an interval
DRAWS = 9999
PATIENT = re.compile(r"TCGA_[^_]+_[^_]+|patient\d+|.*")  # in the names of LGG_MRI and ACDC_slices; else a case is one
DIGITS = {"hd95": 1, "ece": 4}


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; of what has no value, nothing."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def mean_dice(run: dict[str, Any]) -> float:
    """Mean over classes; of volumes, where the cases are slices of such."""
    return statistics.mean(run.get("dice_volume") or run["dice"])


def row(name: str, runs: list[dict[str, Any]], scores: list[str]) -> str:
    """One method on one data set; the scores of several classes are separated by a comma."""
    first = runs[0]
    iterations = "" if "iterations" not in first else f"{statistics.mean(run['iterations'] for run in runs):.0f}"
    rate = " and ".join(
        f"{rate:g}" for rate in sorted({run["learning_rate"] for run in runs if "learning_rate" in run})
    )
    cells = [with_views(name, first), f"{first['parameters_m']:.2f}", rate, iterations]
    cells += [str(first["passes"]), f"{first['seconds_per_image']:.3f}"]
    cells.append(spread(mean_dice(run) for run in runs))
    for score in scores:
        classes = zip(*(run[score] for run in runs if score in run))
        cells.append(", ".join(spread(values, DIGITS.get(score, 3)) for values in classes))
    return "| " + " | ".join([*cells, str(len(runs))]) + " |"


def with_views(name: str, run: dict[str, Any]) -> str:
    """The name of a method; of ours it is told where no member saw the image flipped, as until November 2026."""
    return f"{name}, no flips" if "objective" in run and not run.get("flip_axes") else name


def table(data: str, runs: list[dict[str, Any]]) -> list[str]:
    """All methods on one data set, at one time of training."""
    scores = [score for score in SCORES if any(score in run for run in runs)]
    mean = "mean Dice of volumes" if any("dice_volume" in run for run in runs) else "mean Dice"
    head = ["method", "parameters, M", "learning rate", "iterations", "passes", "seconds / image", mean]
    head += [*(SCORES[s] for s in scores), "seeds"]
    groups = by_method(runs)
    first = next(iter(groups.values()))[0]
    names = list(SETS[data][1].get("regions") or {})
    lines = [
        f"### {data}: {first['seconds']:g} s of training{' on a GPU' if 'card' in first else ''}, "
        f"{first['cases']} cases, field {first['field']}",
        "",
        f"torch {' and '.join(versions('torch', runs))}, MONAI {' and '.join(versions('monai', runs))}; "
        f"{' and '.join(versions('date', runs))}{', ' + first['card'] if 'card' in first else ''}.",
        "",
        *([f"Classes in this order: {', '.join(names)}.", ""] if names else []),
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    compared = [] if data in DEPENDENT else differences(groups)
    return [*lines, *(row(name, group, scores) for name, group in groups.items()), "", *compared]


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method; those with another learning rate than was chosen, or its last one, are named with it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for method in [*METHODS, *sorted({run["method"] for run in runs} - METHODS.keys())]:
        some = [run for run in runs if run["method"] == method]
        for rate in sorted({run.get("learning_rate", 0.0) for run in some}):
            same = [run for run in some if run.get("learning_rate", 0.0) == rate]
            groups[method if same == at_chosen_rate(some) else f"{method}, rate {rate:g}"] = same
    return groups


def at_chosen_rate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of one method on one data set with the learning rate that was chosen, or else with the last one's."""
    if not runs:
        return []
    last = runs[-1]
    method = TRAINED_AS.get(last["method"], last["method"])
    rate = CHOSEN.get((last["data"], method), last.get("learning_rate"))
    return [run for run in runs if run.get("learning_rate") == rate]


def differences(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How much better ours is than each other method, case by case, with 95 % intervals."""
    known = {name: [run["dice_of_cases"] for run in runs if "dice_of_cases" in run] for name, runs in groups.items()}
    cases = set(known[OURS][0]) if known.get(OURS) else set()
    known = {name: runs for name, runs in known.items() if runs and all(set(run) == cases for run in runs)}
    patients: dict[str, list[str]] = {}
    for case in sorted(cases):
        patients.setdefault(PATIENT.match(case)[0], []).append(case)
    if len(known) < 2 or len(patients) < 2:
        return []
    numbers = np.array([len(cases) for cases in patients.values()])
    sums = {
        name: np.array([[sum(run[case] for case in cases) for cases in patients.values()] for run in runs])
        for name, runs in known.items()
    }
    ours = sums.pop(OURS)
    lines = ["| ours minus | mean difference of Dice over cases, 95 % interval | cases | drawn |", "|" + " --- |" * 4]
    for name, theirs in sums.items():
        lines.append(f"| {name} | {interval(ours, theirs, numbers)} | {numbers.sum()} | {len(numbers)} |")
    return [*lines, ""]


def interval(ours: np.ndarray, theirs: np.ndarray, numbers: np.ndarray) -> str:
    """A mean difference and its 95 % interval, by bootstrap over patients and over the trainings of each method.

    Args:
        ours: sums of a score over the images of each patient, (trainings, patients).
        theirs: the same of another method.
        numbers: of these images, (patients,).
    """
    random = np.random.default_rng(0)
    patients = random.integers(len(numbers), size=(DRAWS, len(numbers)))

    def drawn(sums: np.ndarray) -> np.ndarray:
        trainings = random.integers(len(sums), size=(DRAWS, len(sums)))
        return np.take_along_axis(sums[trainings].mean(1), patients, 1).sum(1)

    low, high = np.percentile((drawn(ours) - drawn(theirs)) / numbers[patients].sum(1), [2.5, 97.5])
    mean = (ours.mean(0) - theirs.mean(0)).sum() / numbers.sum()
    digits = 4 if min(abs(low), abs(high)) < 0.0005 else 3  # so that it can be seen on which side of 0 they are
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def beside_paper(runs: list[dict[str, Any]]) -> str:
    """The paper's ablation, and ours on the nearest sets there are, at the time of training with the most runs."""
    times = {data: [r["seconds"] for r in runs if r["data"] == data and r["method"] in PAPER] for data, _ in NEAREST}
    most = {data: max(seconds, key=seconds.count, default=0) for data, seconds in times.items()}
    head = ["method"]
    for published, (data, _), part in zip(PAPER_SETS, NEAREST, PARTS):
        head += [f"paper: {published}", f"here: {part}, {data}, {most[data]:g} s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for method, published in PAPER.items():
        cells = [method]
        for value, (data, k) in zip(published, NEAREST):
            known = {"data": data, "method": method, "seconds": most[data]}
            own = [run["dice"][k] for run in runs if run.items() >= known.items()]
            cells += [f"{value:.3f}", spread(own) if own else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def current(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of each method with objective and version of its last line; of older lines some have none.

    Lines of held-out cases, by which settings were chosen, are left out.
    """

    def method(run: dict[str, Any]) -> tuple:
        return run["data"], run["method"], run["seconds"], run.get("card")

    def made(run: dict[str, Any]) -> tuple:
        return run.get("objective"), run.get("version", FIRST_VERSION), str(run.get("flip_axes"))

    runs = [run for run in runs if "split" not in run]
    last = {method(run): made(run) for run in runs}
    return [run for run in runs if made(run) == last[method(run)]]


def versions(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """The different values of what the runs were made with."""
    return sorted({run[name] for run in runs})


def digest(runs: list[dict[str, Any]]) -> str:
    """sha256 of the weights that were measured last."""
    return next((run["sha256"] for run in reversed(runs) if "sha256" in run), "")


def failures(runs: list[dict[str, Any]]) -> str:
    """How many cases of each run have a mean Dice below 0.5, and which are the worst; of runs that tell."""
    lines = ["| data | method | training, s | seed | cases below 0.5 | worst: case, Dice (share of the image) |"]
    lines.append("|" + " --- |" * 6)
    told = sorted((run for run in runs if "worst" in run), key=lambda r: (list(SETS).index(r["data"]), r["seconds"]))
    for run in told:
        worst = "; ".join(f"{case}, {dice:.2f} ({100 * share:.1f} %)" for dice, case, share in run["worst"])
        first = f"| {run['data']} | {run['method']} | {run['seconds']:g} | {run['seed']} "
        lines.append(f"{first}| {run['below_half']} of {run['cases']} | {worst} |")
    return "\n".join(lines)


def tried(runs: list[dict[str, Any]]) -> str:
    """Changes that single runs were made for, as they were noted."""
    with (ROOT / "benchmarks" / "results" / "tried.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def tables(runs: list[dict[str, Any]]) -> str:
    """A table for each data set and time of training."""
    keys = dict.fromkeys(
        (run["data"], run["seconds"], run.get("card"))
        for run in sorted(runs, key=lambda r: list(SETS).index(r["data"]))
    )
    parts = (table(key[0], [r for r in runs if (r["data"], r["seconds"], r.get("card")) == key]) for key in keys)
    return "\n".join(line for part in parts for line in part).rstrip()


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    runs = current([json.loads(line) for line in options.results.read_text().splitlines()])
    text = (ROOT / "benchmarks" / "results_text.md").read_text(encoding="utf-8")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    parts = {"tables": tables, "paper": beside_paper, "failures": failures, "sha256": digest, "tried": tried}
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part(runs))
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

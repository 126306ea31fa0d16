"""Dice over time of training: the paper's own objective beside the default's.

``python -m benchmarks.convergence --data_root DIR`` trains the full method on LGG_MRI twice: as shipped, and under the
overlay ``paper`` (noise prediction, 100 steps, 25 members, STAPLE). At marks of training time it scores the validation
cases by the inference that validates during training (``val_num_steps``, ``val_num_members``); at the end it appends
the score of the test cases, by the whole inference, to ``benchmarks/results.jsonl``. A rerun goes on from the last
mark. Writes ``convergence.csv`` and ``convergence.png``.

Each learning rate falls to zero at the end of its own time. The overlay also sets a linear schedule, no scaling of the
mask and a network at full resolution; width, learning rate and loader are those of the default.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .accuracy import RESULTS, ROOT, append, configure, describe, evaluate, is_known, key
from .peers import ours, save, start

DATA = "LGG_MRI"
OBJECTIVES = {"default": ("+ FF-Parser", None), "paper": ("paper's objective", "paper")}
MARKS = (15, 30, 60, 120, 240, 480, 900, 1800, 2700, 3600, 4500, 5400)
COLUMNS = ("objective", "seconds", "iterations", "dice")


def curve(name: str, seconds: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one objective, score it at each mark, and append its last score to the results."""
    method, overlay = OBJECTIVES[name]
    parser = configure("train", DATA, options.data_root, options.seed, overlay)
    peer, training = start(ours, parser, seconds)
    average = training.average.module

    validation = configure("evaluate", DATA, options.data_root, options.seed, overlay)
    more = {"num_steps": parser["val_num_steps"], "num_members": parser["val_num_members"]}
    validation.update({"datalist": parser.get_parsed_content("splits")["validation"], **more})
    validate = partial(validation.get_parsed_content("inferer"), network=average)

    file = options.work_dir / f"{name} {seconds:g} {options.seed}.pt"
    rows: list[dict[str, Any]] = []
    if file.is_file():
        state = torch.load(file, weights_only=True)
        rows = state.pop("rows")
        training.load_state_dict(state)
    for mark in [*(m for m in MARKS if m < seconds), seconds][len(rows) :]:
        training.until(mark)
        scores = evaluate(validation, validate, with_raters=False)
        iterations = int(training.average.n_averaged)
        rows.append(dict(zip(COLUMNS, (name, mark, iterations, statistics.mean(scores["dice"])))))
        save({**training.state_dict(), "rows": rows}, file)
        print(json.dumps(rows[-1]), flush=True)

    known = key(DATA, method, options.seed, seconds, parser.get_parsed_content("objective"))
    if not is_known(options.results, known):
        config = configure("evaluate", DATA, options.data_root, options.seed, overlay)
        scores = evaluate(config, partial(peer.segment, average), with_raters=False)
        trained = {"iterations": rows[-1]["iterations"], "learning_rate": parser["learning_rate"]}
        append(options.results, {**known, **trained, **describe(config, average, peer.passes), **scores})
    return rows


def write(rows: list[dict[str, Any]], output_dir: Path) -> None:
    """Write the table and the plot of the curves."""
    from matplotlib.figure import Figure

    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "convergence.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, (_, overlay) in OBJECTIVES.items():
        some = [row for row in rows if row["objective"] == name]
        label = "default: several masks, scored together" if overlay is None else "paper: the noise, MSE"
        axis.plot([r["seconds"] / 60 for r in some], [r["dice"] for r in some], marker="o", label=label)
    axis.set(xscale="log", xlabel="minutes of training on one CPU thread", ylabel="validation Dice", ylim=(0, 1))
    axis.legend()
    figure.savefig(output_dir / "convergence.png", dpi=120)


def main() -> None:
    """Train, score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--default_seconds", type=float, default=900, help="CPU time of training as shipped")
    parser.add_argument("--paper_seconds", type=float, default=5400, help="CPU time of training as in the paper")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks" / "work" / "convergence")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*curve("paper", options.paper_seconds, options), *curve("default", options.default_seconds, options)]
    write(rows, options.output_dir)


if __name__ == "__main__":
    main()

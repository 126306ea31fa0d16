"""Learning curves of the trainings whose weights are in the bundle: ``python -m benchmarks.curves``.

Draws ``docs/figures/curves.png`` from the ``history.csv`` that each of them has left in ``benchmarks/results``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from .accuracy import ROOT

HISTORIES = {"hippocampus, 3D": "history_hippocampus.csv", "lung nodules, 128 × 128": "history_lidc.csv"}
PICTURE = ROOT / "docs" / "figures" / "curves.png"


def column(name: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs that have a value, and the values."""
    with (ROOT / "benchmarks" / "results" / name).open(newline="", encoding="utf-8") as lines:
        pairs = [(float(row["epoch"]), float(row[key])) for row in csv.DictReader(lines) if row[key]]
    epochs, values = zip(*pairs)
    return list(epochs), list(values)


def main(picture: Path = PICTURE) -> None:
    """Draw the loss and the mean Dice of the validation of each training."""
    figure = Figure(figsize=(9, 2.2 * len(HISTORIES)), layout="constrained")
    for (left, right), (title, name) in zip(figure.subplots(len(HISTORIES), 2, squeeze=False), HISTORIES.items()):
        left.plot(*column(name, "loss"), marker=".")
        left.set(xlabel="epoch", ylabel="training loss", yscale="log", title=title)
        right.plot(*column(name, "val_mean_dice"), marker=".")
        right.set(xlabel="epoch", ylabel="mean Dice, validation", title=title)
    figure.savefig(picture, dpi=80)
    print(f"Written: {picture}")


if __name__ == "__main__":
    main()

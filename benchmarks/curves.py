"""Learning curves of the trainings whose weights are in the bundle: ``python -m benchmarks.curves``.

Draws ``docs/figures/curves.png`` from the ``history.csv`` that each of them has left in ``benchmarks/results``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from .accuracy import ROOT

HISTORIES = {
    "hippocampus, 3D": ("history_hippocampus.csv", "loss"),
    "lung nodules, 128 × 128": ("history_lidc.csv", "val_ged"),
}
LABELS = {"loss": "training loss", "val_ged": "energy distance, validation", "val_mean_dice": "mean Dice, validation"}
PICTURE = ROOT / "docs" / "figures" / "curves.png"


def column(name: str, key: str) -> tuple[list[float], list[float]]:
    """Epochs that have a value, and the values."""
    with (ROOT / "benchmarks" / "results" / name).open(newline="", encoding="utf-8") as lines:
        pairs = [(float(row["epoch"]), float(row[key])) for row in csv.DictReader(lines) if row[key]]
    epochs, values = zip(*pairs)
    return list(epochs), list(values)


def main(picture: Path = PICTURE) -> None:
    """Draw the loss, or the energy distance of the validation, and the mean Dice of the validation of each training."""
    figure = Figure(figsize=(9, 2.2 * len(HISTORIES)), layout="constrained")
    for row, (title, (name, first)) in zip(figure.subplots(len(HISTORIES), 2, squeeze=False), HISTORIES.items()):
        for axes, key in zip(row, (first, "val_mean_dice")):
            axes.plot(*column(name, key), marker=".")
            axes.set(xlabel="epoch", ylabel=LABELS[key], title=title)
        if first == "loss":
            row[0].set_yscale("log")
    figure.savefig(picture, dpi=80)
    print(f"Written: {picture}")


if __name__ == "__main__":
    main()

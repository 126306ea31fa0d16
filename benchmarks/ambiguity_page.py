"""What ``benchmarks.ambiguity`` has measured, as a page, and masks of some slices, as a picture."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .accuracy import FIRST_VERSION
from .lidc import Crops
from .results import interval, spread

__all__ = ["PAIRED", "chosen", "difference", "draw", "write"]

OURS = "ours"
OUR_NETWORK = (OURS, "mask objective")
SLICES = 4
MASKS = 8  # of ours, of each slice
SCORES = {  # name, with the number of masks, and digits
    "ged": ("GED{} ↓", 3),
    "matched_iou": ("HM-IoU{} ↑", 3),
    "ncc": ("NCC ↑", 3),
    "best_iou": ("D_max ↑", 3),
    "pairwise": ("pairwise 1 − IoU", 3),
    "dice": ("Dice of the mean ↑", 3),
    "ece_band": ("ECE in the band ↓", 3),
    "brier": ("Brier ↓", 4),
}
PAIRED = ("ged", "matched_iou")  # that are compared slice by slice
GROUP_SCORES = {name: SCORES[name] for name in SCORES if name != "ece_band"}
COSTS = {
    "passes": ("passes / image", 0),
    "seconds_per_image": ("seconds / image", 3),
    "iterations": ("iterations", 0),
    "parameters_m": ("parameters, M", 2),
    "learning_rate": ("learning rate", 3),
}
TEXT = """# Several masks of an ambiguous image

Written by `python -m benchmarks.ambiguity --data_root DIR` from `benchmarks/ambiguity.jsonl`.

Lung nodules in CT that four radiologists outlined, each by themselves, or did not see (LIDC-IDRI; split by patient).
All methods learn from the masks of all four, of the same batches with the same augmentation, for the same CPU time of
one thread: AdamW, a learning rate that falls by a half cosine, clipped gradients, averaged weights. The networks have
about as many parameters, unless the table says otherwise. Learning rates were chosen at 64×64: at 128×128, five U-Nets
mark next to nothing after a fifth of 900 s each. At 64×64, each method and seed trained in a process of its own, 18
side by side on 16 cores; the Probabilistic U-Net is of an earlier run on another machine. At 128×128, methods ran in
turns on two shared cores (after 2700 s partly one after the other), but for ours of 900 s, which ran by itself later,
on slower days, after members had begun to see the flipped image. On a GPU (`--device cuda`) they trained side by
side on one card, each by a process of its own, in bfloat16, with torch 2.11.0+cu130 and for the same time by the clock;
the CPU scored them in single precision. The losses of SSN and the Probabilistic U-Net were in part in bfloat16 too
(SSN's is in single precision since), and two of three trainings of the latter ended in NaN; the U-Net has two seeds.

- **ours**: this bundle, with the objective `ensemble`; one step for each mask, unless the row says otherwise. Every
  second pair of masks is of the flipped image; with **no flips**, as before that was built in, none is.
- **mask objective**: the same network with the objective `mask`, Dice + BCE of single masks of a radiologist who is
  drawn; one step.
- **MONAI UNet**: Dice + BCE, mean over the radiologists; its single mask counts as {members} equal ones.
- **five UNets**: the same in an equal part of the time each, a mask from each.
- **UNet, MC dropout**: the same with dropout that stays on.
- **SSN**: stochastic segmentation network (arXiv 2006.06015) on the same U-Net; masks are drawn after one pass.
- **Probabilistic U-Net** (arXiv 1806.05034): ELBO; the parts beside the same U-Net are those of `lightning-uq-box`.

Scores are means over the slices, ± standard deviation over the seeds, of masks cut at one half; a column says how many
masks. **GED**: generalised energy distance, d = 1 − IoU, unbiased (pairs of different masks of a method, of ours only
those from different groups of four, or of two without flips; the radiologists are the reference, all their pairs
count). **HM-IoU**: masks and radiologists paired as well as possible.
**NCC**: correlation of the masks' variance with the radiologists', pixel by pixel. **D_max**: best IoU of any mask with
each radiologist. **Dice of the mean**: of the mean of the probabilities, cut at one half, with what at least two
radiologists marked; 1 where both are empty. **ECE in the band**: of that mean against the share of the radiologists, in
all pixels within three of the contours of these two masks, of all slices together. **Brier**: of that mean against each
radiologist. Seconds are CPU time for all masks of a slice, one thread, median. **Differences** are of the mean over the
seeds; their intervals of 95 % are by bootstrap over patients and over the trainings of each method.
"""
CAPTION = """
![Slices, the radiologists' outlines, and our masks]({figure})

*A slice in each row: the image; the outlines of the four radiologists, none where one saw no nodule; {masks} of our
masks. Slices are evenly spaced among those that two or three radiologists marked. Images: LIDC-IDRI, CC BY 3.0 (Armato
et al., doi 10.7937/K9/TCIA.2015.LO9QL9SX).*
"""


def ordered(rows: list[dict[str, Any]], methods: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The rows of each method, over the seeds; a method's variants, named after a comma, come behind it."""

    def place(name: str) -> int:
        return next((i for i, m in enumerate(methods) if name == m or name.startswith(f"{m}, ")), len(methods))

    names = sorted(dict.fromkeys(row["method"] for row in rows), key=place)
    return [[row for row in rows if row["method"] == name] for name in names]


def table(groups: list[list[dict[str, Any]]], columns: dict[str, tuple[str, int]]) -> list[str]:
    """Methods below one another; scores of several seeds are mean ± standard deviation, costs their mean."""
    most = max(row["members"] for rows in groups for row in rows)
    heads = ["method", *(head.format(most) for head, _ in columns.values()), "masks", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    summary = spread if columns is SCORES else mean
    for rows in groups:
        cells = [summary([row[c] for row in rows], digits) for c, (_, digits) in columns.items()]
        lines.append("| " + " | ".join([shown(rows[0]), *cells, str(rows[0]["members"]), str(len(rows))]) + " |")
    return [*lines, ""]


def shown(row: dict[str, Any]) -> str:
    """The name of a method; of ours it is told where no mask is of the flipped image, as until November 2026."""
    is_plain = row["method"].split(",")[0] in OUR_NETWORK and not row.get("flip_axes")
    return f"{row['method']}, no flips" if is_plain else row["method"]


def mean(values: list[float], digits: int) -> str:
    """Mean of numbers, as text."""
    return f"{statistics.mean(values):.{digits}f}"


def section(rows: list[dict[str, Any]], bounds: list[dict[str, Any]], methods: Sequence[str]) -> list[str]:
    """All methods at one size and time, between what no method can and what none should do."""
    first, groups = rows[0], ordered(rows, methods)
    made = {name: " and ".join(sorted({str(row[name]) for row in rows})) for name in ("torch", "monai", "date")}
    cards = f" on {' and '.join(sorted({row['card'] for row in rows}))}" if "card" in first else ""
    sets = sorted({row["train_num_members"] for row in rows if "train_num_members" in row})
    k = f", K = {' and '.join(map(str, sets))} for ours" if sets else ""
    how = f"{first['seconds']:g} s{cards}"
    return [
        f"## {first['size']}×{first['size']}, {how}: {first['cases']} slices ({first['split']})",
        "",
        f"Batches of {' and '.join(sorted({str(row['batch_size']) for row in rows}))}{k}; torch {made['torch']}, "
        f"MONAI {made['monai']}; {made['date']}.",
        "",
        *table([*groups, *ordered(bounds, [])], SCORES),
        *table(groups, COSTS),
        *differences({rows[0]["method"]: rows for rows in groups}),
    ]


def differences(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How much nearer to the raters ours is than each other method, by slices of the same images."""
    others = [name for name, runs in groups.items() if name != OURS and difference(groups.get(OURS, []), runs)]
    if not others:
        return []
    heads = [SCORES[key][0].format(16) for key in PAIRED]
    lines = [f"| ours minus | {' | '.join(heads)} |", "|" + " --- |" * (1 + len(heads))]
    for name in others:
        found = [difference(groups[OURS], groups[name], key) for key in PAIRED]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return [*lines, ""]


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str = "ged") -> str:
    """The mean difference of a score over slices, and its interval; nothing where runs do not tell."""
    mine, others = ([run["of_patients"][key] for run in runs if "of_patients" in run] for runs in (ours, theirs))
    if not mine or not others or len(mine[0]) < 2 or any(run.keys() != mine[0].keys() for run in [*mine, *others]):
        return ""
    numbers = np.array([len(values) for values in mine[0].values()])

    def sums(runs: list[dict[str, list[float]]]) -> np.ndarray:
        return np.array([[sum(run[patient]) for patient in mine[0]] for run in runs])

    return interval(sums(mine), sums(others), numbers)


def of_the_bundle(row: dict[str, Any]) -> list[str]:
    """The scores of the weights in the bundle, in all and by group of slices."""
    groups = {"all": row, **row["groups"]}
    lines = [
        f"## The weights of the bundle, {row['size']}×{row['size']}: {row['cases']} slices ({row['split']})",
        "",
        f"`bundle/models/lidc.pt` (sha256 `{row['sha256']}`), trained for {row['seconds']:g} s by the clock on a "
        f"shared CPU; torch {row['torch']}, MONAI {row['monai']}; {row['date']}.",
        "",
        f"| slices | number | {' | '.join(head.format(row['members']) for head, _ in GROUP_SCORES.values())} |",
        "|" + " --- |" * (2 + len(GROUP_SCORES)),
    ]
    for name, one in groups.items():
        cells = [name, str(one["cases"]), *(f"{one[key]:.{digits}f}" for key, (_, digits) in GROUP_SCORES.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def write(results: Path, methods: Sequence[str], page: Path, figure: Path) -> None:
    """Write the page.

    Args:
        results: a line for each run.
        methods: their order.
        page: to write.
        figure: shown where it is there.
    """
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    shipped = [row for row in lines if row["method"] == "shipped"]
    lines = [row for row in lines if row["method"] != "shipped"]
    rows = [row for row in lines if row["seconds"]]
    text = TEXT.format(members=max(row["members"] for row in lines)).splitlines()
    if figure.is_file():
        path = Path(os.path.relpath(figure, page.parent)).as_posix()
        text += CAPTION.format(figure=path, masks=MASKS).splitlines()

    def run(row: dict[str, Any]) -> tuple:
        return row["size"], row["split"], row["seconds"], row.get("card"), row.get("version", FIRST_VERSION)

    for size, split, *how in dict.fromkeys(map(run, rows)):
        bounds = [row for row in lines if run(row)[:3] == (size, split, 0)]
        some = [row for row in lines if run(row) == (size, split, *how)]
        text += ["", *section(some, bounds, methods)]
    if shipped:
        text += ["", *of_the_bundle(shipped[-1])]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def chosen(raters: Tensor) -> list[int]:
    """Slices at even distances among those that some but not all radiologists marked, two or three of four.

    Args:
        raters: boolean (slices, radiologists, size, size).
    """
    marked = raters.flatten(2).any(2).sum(1)
    torn = ((marked == 2) | (marked == 3)).nonzero().flatten().tolist()
    number = min(SLICES, len(torn))
    return [torn[(2 * i + 1) * len(torn) // (2 * number)] for i in range(number)]


def draw(run: Callable[[Tensor], Tensor], crops: Crops, title: str, file: Path) -> None:
    """Draw the chosen slices, what the radiologists say, and what is drawn for each image (1, 1, size, size)."""
    slices, doctors = chosen(crops.raters), crops.raters.shape[1]
    columns = 1 + doctors + MASKS
    figure = Figure(figsize=(1.1 * columns, 1.15 * len(slices) + 0.7), layout="constrained")
    axes = figure.subplots(len(slices), columns, squeeze=False)
    for i, row in zip(slices, axes):
        with torch.no_grad():
            masks = run(crops.images[i : i + 1])[0, :MASKS] > 0.5
        for axis in row:
            axis.imshow(crops.images[i, 0], cmap="gray")
            axis.set_axis_off()
        for axis, mask in zip(row[1:], [*crops.raters[i], *masks]):
            if mask.any():
                axis.contour(mask.float(), levels=[0.5], colors=["tab:orange"], linewidths=1.2)
    for axis, name in zip(axes[0], ["image", *["radiologist"] * doctors, *["ours"] * MASKS]):
        axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)

"""Write the parts of README and pages that are made of results and code: ``python -m docs.blocks``.

Such a part stands between ``<!-- written: NAME -->`` and ``<!-- end -->``. A test compares it with what this module
makes of the results, so that no figure in a page is typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.ambiguity_page import PAIRED, difference
from benchmarks.results import at_chosen_rate, current, digest, mean_dice, spread
from medsegdiff_monai.variables import table

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/settings.md", "docs/model_card.md", "docs/model_card_lidc.md")
BLOCK = re.compile(r"(<!-- written: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

AMBIGUITY = {"size": 128, "seconds": 250, "split": "test", "device": "cuda"}
OPPONENTS = {
    "ours": "this bundle",
    "SSN": "SSN",
    "five UNets": "five U-Nets",
    "Probabilistic U-Net": "Probabilistic U-Net",
    "MONAI UNet": "one U-Net",
}
SPREAD = {
    "ged": "generalised energy distance ↓",
    "matched_iou": "matched IoU ↑",
    "dice": "Dice of the mean ↑",
    "ece_band": "calibration error near the contours ↓",
}
TASKS = {  # data, seconds of training, and whether it was on a GPU
    ("Hippocampus3D", 1200, False): "hippocampus, MR, 3D",
    ("ACDC_slices", 1200, False): "heart, ACDC cine MR, slices in 2D, scored as volumes",
    ("ACDC_slices", 300, True): "the same",
    ("LGG_MRI, 256", 300, True): "brain tumour, LGG MRI, 256 × 256",
    ("DRISHTI_roi, 256", 140, True): "optic disc and cup, DRISHTI, 256 × 256",
}
METHODS = {
    "+ FF-Parser": "this bundle",
    "MONAI UNet": "MONAI U-Net",
    "MONAI UNet, flips": "U-Net, flips",
    "MONAI SegResNet": "MONAI SegResNet",
    "MONAI SegResNet, flips": "SegResNet, flips",
}
LIDC = {
    "ged": "generalised energy distance ↓",
    "matched_iou": "matched IoU ↑",
    "best_iou": "best IoU for each radiologist ↑",
    "ncc": "correlation of variance ↑",
    "dice": "Dice of the mean with the majority ↑",
}
SHIPPED = {
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "hd95": ("95th percentile of the surface distance, mm", 1),
    "ece": ("calibration error, all voxels", 4),
    "ece_band": ("calibration error near the contours", 3),
    "auroc": ("AUROC of the entropy for wrong voxels near the contours", 3),
}


def _runs(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "benchmarks" / name).read_text(encoding="utf-8").splitlines()]


def _table(rows: Iterable[Iterable[str]]) -> str:
    head, *body = (list(row) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def ambiguity() -> str:
    """How near sets of masks are to those of four radiologists."""
    runs = [run for run in _runs("ambiguity.jsonl") if AMBIGUITY.items() <= run.items()]
    by_method = {method: [run for run in runs if run["method"] == method] for method in OPPONENTS}
    ours = by_method["ours"]
    named = OPPONENTS if ours[0].get("flip_axes") else OPPONENTS | {"ours": f"{OPPONENTS['ours']}, no flips"}
    rows = [["", *named.values()]]
    rows += [[text, *(spread(run[key] for run in some) for some in by_method.values())] for key, text in SPREAD.items()]
    for key in PAIRED:
        found = [difference(ours, some, key) for name, some in by_method.items() if name != "ours"]
        rows.append([f"{SPREAD[key][:-2]}: ours minus theirs, 95 % interval", "", *found])
    rows.append(["seeds", *(str(len(some)) for some in by_method.values())])
    told = f"{ours[0]['cases']} test slices of {ours[0]['size']}×{ours[0]['size']}, {ours[0]['members']} masks each"
    return f"{_table(rows)}\n\n{told}; {ours[0]['seconds']:g} s of training, all side by side on one {ours[0]['card']}."


def accuracy() -> str:
    """Mean Dice on each data set."""
    runs = current(_runs("results.jsonl"))
    rows = [["mean Dice", "training", *METHODS.values()]]
    for (data, seconds, on_gpu), text in TASKS.items():
        same = [run for run in runs if (run["data"], run["seconds"], "card" in run) == (data, seconds, on_gpu)]
        scores = [spread(map(mean_dice, at_chosen_rate([run for run in same if run["method"] == m]))) for m in METHODS]
        rows.append([text, f"{seconds / 60:.2g} min, {'GPU' if on_gpu else 'CPU'}", *scores])
    return _table(rows)


def shipped() -> str:
    """Scores of the weights in the repository."""
    runs = _runs("results.jsonl")
    last = [run for run in runs if run["method"] == "shipped"][-1]
    rows = [["", "anterior", "posterior"]]
    rows += [[text, *(f"{v:.{digits}f}" for v in last[key])] for key, (text, digits) in SHIPPED.items() if key in last]
    told = f"{last['cases']} validation cases, {last['passes']} passes for each; measured on {last['date']}."
    return f"{_table(rows)}\n\n{told}\nsha256 of `bundle/models/model.pt`: `{digest(runs)}`."


def lidc() -> str:
    """Scores of the weights for lung nodules, in all and by group of slices."""
    last = [run for run in _runs("ambiguity.jsonl") if run["method"] == "shipped"][-1]
    rows = [["slices", "number", *LIDC.values()]]
    for name, one in {"all": last, **last["groups"]}.items():
        rows.append([name, str(one["cases"]), *(f"{one[key]:.3f}" for key in LIDC)])
    told = f"{last['cases']} test slices, {last['members']} masks of one pass each; measured on {last['date']}."
    return f"{_table(rows)}\n\n{told}\nsha256 of `bundle/models/lidc.pt`: `{last['sha256']}`."


def settings() -> str:
    """All variables of the configs."""
    return table(ROOT / "bundle")


BLOCKS: dict[str, Callable[[], str]] = {
    "ambiguity": ambiguity,
    "accuracy": accuracy,
    "shipped": shipped,
    "lidc": lidc,
    "settings": settings,
}


def fill(text: str) -> str:
    """Return a page with its blocks as they should be."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main() -> None:
    """Write all blocks."""
    for page in (ROOT / name for name in PAGES):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

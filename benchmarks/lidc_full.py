"""All slices of LIDC as a data set with four raters: ``python -m benchmarks.lidc_full --source DIR --output DIR``.

The source is the folder ``LIDC-IDRI-slices`` of github.com/periclesanfe/Pulmoseg (also on Kaggle, as "LIDC-IDRI
slices"): ``LIDC-IDRI-0001/nodule-0/images/slice-0.png`` with ``mask-0`` to ``mask-3`` beside ``images``. Slices that
nobody marked are left out, and counted. Patients are drawn: three fifths to train on, one fifth each to validate and to
test with.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsegdiff_monai.files import write_atomically

RATERS = 4
SEED = 2026
SPLITS = {"training": 0.6, "validation": 0.8, "test": 1.0}  # where each ends


def find(source: Path) -> dict[str, list[Path]]:
    """The images of each patient.

    Raises:
        SystemExit: where there are none, or a mask is missing.
    """
    found: dict[str, list[Path]] = {}
    for image in sorted(source.glob("LIDC-IDRI-*/nodule-*/images/*.png")):
        missing = [mask for mask in masks_of(image) if not mask.is_file()]
        if missing:
            raise SystemExit(f"{missing[0]}: is missing: download the slices again.")
        found.setdefault(image.parts[-4], []).append(image)
    if not found:
        raise SystemExit(f"{source}: holds no LIDC-IDRI-*/nodule-*/images/*.png: give the folder LIDC-IDRI-slices.")
    return found


def masks_of(image: Path) -> list[Path]:
    """The mask of each radiologist."""
    return [image.parent.parent / f"mask-{i}" / image.name for i in range(RATERS)]


def draw(patients: list[str], seed: int) -> dict[str, list[str]]:
    """Divide patients among the lists."""
    order = sorted(patients)
    random.Random(seed).shuffle(order)
    ends = [0, *(round(len(order) * share) for share in SPLITS.values())]
    return {split: order[a:b] for split, a, b in zip(SPLITS, ends, ends[1:])}


def convert(image: Path, output: Path) -> dict[str, Any] | None:
    """Write a slice, its masks in {0, 1}, and return its entry; None where nobody marked anything."""
    masks = []
    for mask in masks_of(image):
        with Image.open(mask) as picture:
            masks.append((np.array(picture.convert("L")) > 0).astype(np.uint8))
    if not any(mask.any() for mask in masks):
        return None
    patient, nodule = image.parts[-4], image.parts[-3].removeprefix("nodule-")
    name = f"{patient.removeprefix('LIDC-IDRI-')}_n{nodule}_{image.stem.removeprefix('slice-')}.png"
    files = [f"images/{name}", *(f"raters/{i + 1}/{name}" for i in range(RATERS))]
    for file in files:
        (output / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image, output / files[0])
    for mask, file in zip(masks, files[1:]):
        Image.fromarray(mask).save(output / file)
    marked = sum(bool(mask.any()) for mask in masks)
    return {"image": files[0], "labels": files[1:], "patient": patient, "num_raters": marked}


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED, help="of the split")
    options = parser.parse_args()
    found = find(options.source)
    lists: dict[str, Any] = {"name": "LIDC", "licence": "CC BY 3.0 (LIDC-IDRI, TCIA)", "labels": {"1": "nodule"}}
    for split, patients in draw(list(found), options.seed).items():
        entries = [convert(image, options.output) for patient in patients for image in found[patient]]
        lists[split] = [entry for entry in entries if entry is not None]
        unmarked = len(entries) - len(lists[split])
        print(
            f"{split}: {len(lists[split])} slices of {len(patients)} patients; {unmarked} that nobody marked left out"
        )
    write_atomically(options.output / "dataset.json", json.dumps(lists, indent=1).encode())


if __name__ == "__main__":
    main()

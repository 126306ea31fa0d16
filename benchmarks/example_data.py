"""Write ``examples/lidc``: a dozen test slices of LIDC4, ``python -m benchmarks.example_data --data_root DIR``.

They are drawn at random, whatever a method makes of them: ``EACH`` of the slices that one, two, three and four
radiologists marked, each of another patient. They take turns in the list, so that its beginning has some of all.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .accuracy import ROOT
from .lidc import NAME

__all__ = ["choose", "write"]

EACH = 3
SEED = 20
KEPT = ("name", "reference", "licence", "release", "tensorImageSize", "modality", "labels", "raters")  # of the lists


def choose(items: Sequence[Mapping[str, Any]], seed: int = SEED) -> list[Mapping[str, Any]]:
    """Draw slices by the number of radiologists that marked something.

    Args:
        items: with ``num_raters`` and ``patient``.
        seed: of the order in which they are looked at.
    """
    order = list(items)
    random.Random(seed).shuffle(order)
    chosen: list[Mapping[str, Any]] = []
    for number in sorted({item["num_raters"] for item in items}) * EACH:
        patients = {item["patient"] for item in chosen}
        chosen += [i for i in order if i["num_raters"] == number and i["patient"] not in patients][:1]
    return chosen


def write(data: Path, output: Path) -> None:
    """Copy the chosen slices with all outlines, and write their ``dataset.json``.

    Args:
        data: the folder of LIDC4.
        output: folder to write to.
    """
    lists = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    items = [{key: value for key, value in item.items() if key != "label"} for item in choose(lists["test"])]
    for file in (file for item in items for file in (item["image"], *item["labels"])):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / file, output / file)
    description = f"{len(items)} of the test slices of {NAME}, CT crops around lung nodules; see ATTRIBUTION.md"
    content = {**{key: lists[key] for key in KEPT}, "description": description, "test": items}
    (output / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the slices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help=f"folder that holds {NAME}")
    parser.add_argument("--output", type=Path, default=ROOT / "examples" / "lidc")
    options = parser.parse_args()
    write(options.data_root / NAME, options.output)


if __name__ == "__main__":
    main()

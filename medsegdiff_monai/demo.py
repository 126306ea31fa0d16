"""Demonstrations: three bundle commands and a score on an averaged brain MRI; and opinions on lung nodules."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .data.entries import first_file, read_data_list
from .data.raw.mni152 import write_mni152_slices
from .data.reading import load_image
from .errors import InputError
from .files import replacing
from .segmenter import MedSegDiff
from .settings import find_bundle_root

__all__ = ["Opinions", "draw_opinions", "run_demo", "run_lidc_demo"]

ROWS = 8  # slices of the picture, of the dozen that there are
MASKS = 8  # of ours, of each slice
ATTRIBUTION = "Images and outlines: LIDC-IDRI (Armato et al., doi 10.7937/K9/TCIA.2015.LO9QL9SX), CC BY 3.0, cropped"


def _bundle(run_id: str, config: str, **variables: object) -> None:
    """Print a bundle command as a user would type it, and run it.

    Raises:
        InputError: where it fails.
    """
    command = ["-m", "monai.bundle", "run", run_id, "--config_file", config]
    for name, value in variables.items():
        command += [f"--{name}", str(value)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise InputError(f"the demo stopped: `{run_id}` failed, its message is above.")


def run_demo(output_dir: str) -> None:
    """Train, evaluate and segment, and print Dice on the held-out slabs, seconds per image and where the results are.

    Args:
        output_dir: folder to write to.

    Raises:
        InputError: where a command fails.
    """
    root = find_bundle_root()
    out = Path(output_dir)
    data = write_mni152_slices(out / "data")

    def configs(name: str) -> str:
        return f"['{root}/configs/{name}.json','{root}/configs/datasets/mni152.json']"

    common = {"dataset_dir": data, "ckpt_dir": out / "models"}
    _bundle("training", configs("train"), **common, output_dir=out / "training")
    _bundle("evaluating", configs("evaluate"), **common, output_dir=out / "evaluation")
    _bundle("inference", configs("inference"), **common, output_dir=out / "inference", overwrite="true")
    with (out / "evaluation" / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scores = {k.removeprefix("dice_"): _mean(rows, k) for k in rows[0] if k.startswith("dice_")}
    best = max(rows, key=lambda row: sum(float(row[f"dice_{name}"]) for name in scores))["case"]
    print(f"\nDice on {len(rows)} held-out slices of the same averaged brain, which says nothing of patients:")
    for name, score in scores.items():
        print(f"  {name:<14} {score:.3f}")
    print(f"  {'mean':<14} {sum(scores.values()) / len(scores):.3f}")
    print(f"Seconds per image: {_mean(rows, 'seconds'):.2f}")
    print(f"Picture:           {out / 'evaluation' / best / f'{best}_overlay.png'}")
    print(f"Curves:            {out / 'training' / 'curves.png'}")
    print(f"Scores of cases:   {out / 'evaluation' / 'cases.csv'}")
    print(f"Masks and maps:    {out / 'inference'}")
    print(f"Weights:           {out / 'models' / 'model.pt'}")


def _mean(rows: list[dict[str, str]], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


class Opinions(NamedTuple):
    """What radiologists and members say of a slice.

    Attributes:
        image: (x, y).
        raters: masks (raters, x, y).
        members: masks (members, x, y).
        uncertainty: entropy (x, y), bits.
    """

    image: np.ndarray
    raters: np.ndarray
    members: np.ndarray
    uncertainty: np.ndarray


def _lidc_folder() -> Path:
    package = Path(__file__).parent
    for folder in (package / "lidc", package.parent / "examples" / "lidc"):  # a wheel's, a clone's
        if (folder / "dataset.json").is_file():
            return folder
    raise InputError(
        f"{package / 'lidc'}: the slices of the demo are not there: they come with a clone of the repository and with "
        "the wheel; without --lidc the demo needs none."
    )


def run_lidc_demo(output_dir: str) -> None:
    """Segment lung nodules that four radiologists outlined, with the weights that come with the bundle, and draw it.

    Args:
        output_dir: folder to write ``lidc.png`` to.

    Raises:
        InputError: where slices or weights are not there, or the picture cannot be written.
    """
    root, folder = find_bundle_root(), _lidc_folder()
    weights, picture = Path(root) / "models" / "lidc.pt", Path(output_dir) / "lidc.png"
    if not weights.is_file():
        raise InputError(
            f"{weights}: the weights of the demo are not there: they come with a clone of the repository and with the "
            "wheel; without --lidc the demo trains its own."
        )
    overlay = Path(root) / "configs" / "datasets" / "lidc.json"
    bundle = MedSegDiff.from_bundle(root, overlay, checkpoint=str(weights), num_members=MASKS)
    found = []
    for entry in read_data_list(folder).of("test")[:ROWS]:
        result = bundle.segment(first_file(entry.image))
        raters = np.stack([load_image(file)[0].numpy() for file in entry.raters])
        found.append(Opinions(load_image(entry.image)[0].numpy(), raters, result.members, result.uncertainty))
    draw_opinions(found, picture)
    print(f"{len(found)} lung nodules, each outlined by four radiologists and {MASKS} times by this bundle.")
    print(f"{ATTRIBUTION}.")
    print(f"Picture: {picture}")


def draw_opinions(slices: Sequence[Opinions], file: Path) -> None:
    """Draw a row for each slice: the image, the outline of each radiologist and of each member, and the uncertainty.

    Of the image the middle is shown, half as wide and high.

    Args:
        slices: with as many radiologists and members each.
        file: to write, a PNG.

    Raises:
        InputError: where it cannot be written.
    """
    from matplotlib.figure import Figure

    raters, members = len(slices[0].raters), len(slices[0].members)
    heads = ["image", *["radiologist"] * raters, *["ours"] * members, "uncertainty"]
    figure = Figure(figsize=(0.95 * len(heads), 0.92 * len(slices) + 0.6), layout="constrained")
    for row, one in zip(figure.subplots(len(slices), len(heads), squeeze=False), slices):
        for axis in row:
            axis.imshow(_middle(one.image).T, cmap="gray")
            axis.set_axis_off()
        for axis, mask in zip(row[1:-1], (*one.raters, *one.members)):
            if _middle(mask).any():
                axis.contour(_middle(mask).T > 0, levels=[0.5], colors=["tab:orange"], linewidths=1.3)
        row[-1].imshow(_middle(one.uncertainty).T, cmap="magma", vmin=0, vmax=1)
    for axis, head in zip(figure.axes, heads):
        axis.set_title(head, fontsize=9)
    figure.supxlabel(ATTRIBUTION, fontsize=8)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _middle(plane: np.ndarray) -> np.ndarray:
    (left, width), (top, height) = ((side // 4, side // 2) for side in plane.shape)
    return plane[left : left + width, top : top + height]

"""Dice that needs no learning: all background, and the mean shape of the training masks.

``python -m benchmarks.baselines --overlay overlay.json`` prints both for the cases that evaluation uses. The mean shape
is the share of training masks that cover a place, each mask resized to the case at hand, cut at the threshold that is
best on the training masks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from monai.transforms import Orientation
from torch import Tensor

from medsegdiff_monai.data import DataSpec, evaluation_items, training_splits
from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.transforms import Regions

CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"
GRID = {2: 64, 3: 32}  # voxels along each axis on which shapes are averaged
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def resize(mask: Tensor, size: list[int]) -> Tensor:
    """Resize masks or shares (classes, *spatial) linearly."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(mask[None], size=size, mode=mode, align_corners=False)[0]


def dice(mask: Tensor, truth: Tensor) -> Tensor:
    """Dice of each class."""
    return compute_dice(mask[None], truth[None], ignore_empty=False)[0]


def main() -> None:
    """Print the Dice of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", required=True, help="overlay of the data set, with dataset_dir")
    options = parser.parse_args()
    config = ConfigParser()
    config.read_config([str(CONFIGS / "evaluate.json"), options.overlay])
    spec = DataSpec(*(config[k] for k in ("spatial_dims", "in_channels", "num_classes", "regions")))
    regions = Regions(spec.num_classes, spec.regions)

    orient = Orientation("RAS")

    def masks(items: list[dict]) -> list[Tensor]:
        labels = (load_image(item["label"]) for item in items)
        return [regions.masks(orient(label) if spec.spatial_dims == 3 else label).as_tensor() for label in labels]

    grid = [GRID[spec.spatial_dims]] * spec.spatial_dims
    training = [resize(m, grid) for m in masks(training_splits(config["dataset_dir"], spec)["training"])]
    share = torch.stack(training).mean(0)
    best = max(THRESHOLDS, key=lambda t: sum(float(dice(share > t, m > 0.5).mean()) for m in training))
    truth = masks(evaluation_items(config["dataset_dir"], spec, config["eval_split"]))
    nothing = torch.stack([dice(torch.zeros_like(m), m) for m in truth]).mean(0)
    shape = torch.stack([dice(resize(share, list(m.shape[1:])) > best, m) for m in truth]).mean(0)
    for name, values in (("all background", nothing), ("mean shape", shape)):
        scores = ", ".join(f"{n} {v:.3f}" for n, v in zip(regions.names, values.tolist()))
        print(f"{name:<15} {scores}, mean {values.mean():.3f} ({len(truth)} cases)")


if __name__ == "__main__":
    main()

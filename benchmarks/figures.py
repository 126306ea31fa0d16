"""Cases from best to worst, and whether probabilities can be trusted: ``python -m benchmarks.figures --data_root DIR``.

For each data set ``docs/figures/<set>.png``: cases at even ranks of Dice, each with the contours of ground truth and
prediction, and the predictive entropy; and below them the share of true voxels at each predicted probability. It takes
the full method as ``benchmarks.accuracy`` has trained it, or the shipped weights for the hippocampus. Only pictures of
sets whose licence allows it may be passed on.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from monai.metrics import compute_dice
from torch import Tensor

from medsegdiff_monai.data.reading import load_image

from .accuracy import ROOT, SETS, WORK, Case, configure, segment, trained

SHOWN = 6
BINS = 10
COLOURS = ("tab:cyan", "tab:orange", "tab:pink", "tab:green")
METHOD = "+ FF-Parser"


def plane(volume: Tensor, index: int) -> Tensor:
    """A picture of (channels, *spatial): in 3D the slice at ``index`` of the third axis."""
    return volume if volume.ndim == 3 else volume[..., index]


def dice(case: Case) -> float:
    """Mean Dice over the classes."""
    return float(compute_dice(*case.masks, ignore_empty=False).mean())


def reliability(cases: list[Case]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean probability, share of true voxels and number of voxels in each bin of probability, over all cases."""
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    for case in cases:
        p = case.output["prob"].as_tensor().flatten().double()
        y = case.masks[1].flatten().double()
        bins = (p * BINS).long().clamp(max=BINS - 1)
        for row, weights in zip(sums, (p, y, torch.ones_like(p))):
            row += torch.bincount(bins, weights=weights, minlength=BINS)
    return sums[0] / sums[2], sums[1] / sums[2], sums[2]


def draw(data: str, cases: list[Case]) -> Figure:
    """Cases from best to worst, and the reliability diagram."""
    ranked = sorted(cases, key=dice, reverse=True)
    chosen = [ranked[round(i * (len(ranked) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    figure = Figure(figsize=(2.4 * SHOWN, 8.4), layout="constrained")
    pictures, below = figure.subfigures(2, 1, height_ratios=(2, 1.2))
    axes = pictures.subplots(2, SHOWN)
    for case, (top, bottom) in zip(chosen, axes.T):
        mask, truth = (m[0] for m in case.masks)
        index = int(truth.sum((0, 1, 2)).argmax()) if truth.ndim == 4 else 0
        image = plane(load_image(case.item["image"]).as_tensor(), index)[:3].mean(0)
        for axis in (top, bottom):
            axis.imshow(image.T, cmap="gray", origin="lower" if truth.ndim == 4 else "upper")
            axis.set_axis_off()
        for k, colour in zip(range(len(truth)), COLOURS):
            top.contour(plane(truth, index)[k].T, levels=[0.5], colors=[colour], linewidths=1.2)
            top.contour(plane(mask, index)[k].T, levels=[0.5], colors=[colour], linewidths=1.2, linestyles="dotted")
        entropy = plane(case.output["uncertainty_entropy"].as_tensor(), index)[0].T
        shown = bottom.imshow(entropy, cmap="magma", vmin=0, vmax=1, alpha=0.8, origin=bottom.images[0].origin)
        top.set_title(f"Dice {dice(case):.3f}")
    figure.colorbar(shown, ax=axes[1, -1], label="entropy, bits")
    pictures.suptitle(f"{data}: ground truth solid, prediction dotted; below, predictive entropy")
    predicted, true, count = reliability(cases)
    left, right = below.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    left.plot(predicted, true, marker="o")
    left.set(xlabel="predicted probability", ylabel="share of true voxels", xlim=(0, 1), ylim=(0, 1))
    right.bar(torch.arange(BINS) / BINS + 0.5 / BINS, count, width=0.9 / BINS)
    right.set(xlabel="predicted probability", ylabel="voxels", yscale="log")
    return figure


def main() -> None:
    """Draw a figure for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seconds", type=float, default=180, help="of training, as given to benchmarks.accuracy")
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "figures")
    parser.set_defaults(learning_rate=None, split=None)
    options = parser.parse_args()
    options.device = "cpu"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for data in options.data:
        config = configure("evaluate", data, options.data_root, 0)
        if data == "Hippocampus3D":
            network = config.get_parsed_content("network_def").eval()
            network.load_state_dict(torch.load(ROOT / "bundle" / "models" / "model.pt", weights_only=True))
            run = partial(config.get_parsed_content("inferer"), network=network)
        else:
            peer, module, _ = trained(data, METHOD, 0, options)
            run = partial(peer.segment, module)
        draw(data, list(segment(config, run))).savefig(options.output_dir / f"{data}.png", dpi=80)


if __name__ == "__main__":
    main()

"""Cost of members with their maps, in passes of a U-Net of the same size.

``python -m benchmarks.cost`` times one pass of MONAI's ``UNet``, and the bundle's inference from a preprocessed image
to mask, probability and uncertainty maps, in turns: CPU time of one thread, weights as they start, one foreground
class. A volume larger than the field is segmented by the same overlapping windows. A ratio is the median over the
turns of the ratio within a turn, so that what else the machine does weighs on all alike. Writes
``benchmarks/results/cost.md``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from .accuracy import ROOT
from .forward import parameters
from .peers import CONFIGS, matching_unet

FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "2D, 64 × 64": ("generic_2d", {"roi_size": [64, 64], "channels": [16, 32, 64, 96]}),
    "2D, 128 × 128": ("generic_2d", {"roi_size": [128, 128], "channels": [16, 32, 64, 96]}),
    "3D, 32 × 48 × 32": ("hippocampus", {}),
}
VOLUME = "3D, 64 × 96 × 64 by windows"
FIELDS[VOLUME] = FIELDS["3D, 32 × 48 × 32"]
SIZES = {VOLUME: [64, 96, 64]}  # of images that are larger than the field
TURNS_OF_VOLUME = 3
MEMBERS = (1, 5, 16)


def config(field: str, members: int, amp: bool) -> ConfigParser:
    """Return ``inference.json`` for one class of one channel."""
    overlay, settings = FIELDS[field]
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "inference.json"), str(CONFIGS / "datasets" / f"{overlay}.json")])
    more = {"bundle_root": "", "in_channels": 1, "num_classes": 1, "regions": None, "device": "cpu", "amp": amp}
    parser.update({**settings, **more, "num_members": members})
    parser["inferer"]["flip_axes"] = parser["flip_axes"]  # as trained weights have it in their record
    return parser


def passes(field: str, amp: bool) -> tuple[dict[str, Callable[[], object]], list[float]]:
    """Return what is timed, by name, and the parameters of U-Net and network in 10^6."""
    runs: dict[str, Callable[[], object]] = {}
    parser = config(field, 1, amp)
    field_size = parser.get_parsed_content("field_size")
    image = torch.randn(1, 1, *SIZES.get(field, field_size))
    unet, network = matching_unet(parser, 1).eval(), parser.get_parsed_content("network_def").eval()

    overlap = parser.get_parsed_content("inferer").overlap
    windows = SlidingWindowInferer(field_size, overlap=overlap, mode="gaussian")

    def plain() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return windows(image, unet).sigmoid() if field in SIZES else unet(image).sigmoid()

    runs["U-Net"] = plain
    for members in MEMBERS:
        parts = config(field, members, amp)
        inferer, fuse = parts.get_parsed_content("inferer"), parts.get_parsed_content("postprocessing").transforms[-1]
        fuse.invert = None  # both work on the network's field

        def segment(inferer: Any = inferer, fuse: Any = fuse) -> dict:
            return fuse({"pred": inferer(image, network)[0].float()})

        runs[f"{members} members"] = segment
    return runs, [parameters(unet), parameters(network)]


def ratios(field: str, rounds: int, amp: bool) -> tuple[list[float], list[float]]:
    """Return the cost of each number of members in passes of the U-Net, and the parameters of both in 10^6."""
    runs, sizes = passes(field, amp)
    table = []
    with torch.no_grad():
        for turn in range(rounds + 2):
            times = []
            for run in runs.values():
                start = time.process_time()
                run()
                times.append(time.process_time() - start)
            if turn > 1:  # the first ones warm up
                table.append([t / times[0] for t in times[1:]])
    return [statistics.median(column) for column in zip(*table)], sizes


def main() -> None:
    """Time all fields, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cost.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Cost of members",
        "",
        f"`python -m benchmarks.cost --rounds {options.rounds}`: one thread of {platform.machine()}, torch "
        f"{torch.__version__}. One pass of MONAI's U-Net, in the same precision, is 1; members come with mask, "
        "probability and both maps, and every second pair sees the image flipped.",
        "",
        f"| field | parameters of U-Net / ours, 10^6 | {' | '.join(f'members: {n}' for n in MEMBERS)} |",
        "|---|---|" + "---|" * len(MEMBERS),
    ]
    for field in FIELDS:
        for amp in (False, True):
            turns = min(options.rounds, TURNS_OF_VOLUME) if field in SIZES else options.rounds
            found, sizes = ratios(field, turns, amp)
            name = f"{field}{', bfloat16' if amp else ''}"
            lines.append(f"| {name} | {sizes[0]:.2f} / {sizes[1]:.2f} | {' | '.join(f'{x:.2f}' for x in found)} |")
            print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Training speed and memory beside ``med-seg-diff-pytorch`` (the same method), MONAI's diffusion network, and others.

``python -m benchmarks.training`` trains each with the same batch, size and widths on random images, in turns; a ratio
is the median over the turns of the ratio within a turn, so that what else the machine does weighs on all alike. Peak
memory is of a process of its own. An image counts once, however many masks K of it are trained. Ours is what
``train.json`` trains in its second half, own guesses included; the peers are those of ``benchmarks.peers``. Writes
``benchmarks/results/training.md``.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import Tensor

from .forward import parameters
from .peers import CONFIGS, Peer, med_seg_diff_pytorch, monai_diffusion, ours, segresnet, unet

OURS, FOUR, FULL_RESOLUTION = "ours", "ours, K = 4", "ours, stem_stride 1"
SAME_METHOD, ONE_ENCODER = "med-seg-diff-pytorch", "MONAI DiffusionModelUNet"
BUILD: dict[str, Callable[[ConfigParser], Peer]] = {
    OURS: ours,
    FOUR: ours,
    FULL_RESOLUTION: ours,
    SAME_METHOD: med_seg_diff_pytorch,
    ONE_ENCODER: monai_diffusion,
    "MONAI UNet": unet,
    "MONAI SegResNet": segresnet,
}
REQUIRED = 1.5  # times as fast as the same method
ITERATIONS = 4  # in each turn


def config() -> ConfigParser:
    """Return ``train.json`` for 2D images, as the overlay of the tumours has it."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "datasets" / "lgg_mri.json")])
    parser.update({"bundle_root": "", "device": "cpu", "amp": False})
    return parser


def trainer(name: str) -> tuple[Callable[[], None], float]:
    """Return what trains a method for one iteration, and its parameters in 10^6."""
    torch.manual_seed(0)
    parser = config()
    parser.update({FOUR: {"train_num_members": 4}, FULL_RESOLUTION: {"stem_stride": 1}}.get(name, {}))
    peer = BUILD[name](parser)
    optimizer = torch.optim.AdamW(peer.module.parameters(), lr=1e-4)
    batch, size = parser["batch_size"], parser["roi_size"]
    image: Tensor = torch.randn(batch, parser["in_channels"], *size)
    raters = (torch.rand(batch, 1, parser["num_classes"], *size) > 0.5).float()

    def iterate() -> None:
        optimizer.zero_grad()
        peer.loss(image, raters).backward()
        optimizer.step()

    return iterate, parameters(peer.module)


def seconds(run: Callable[[], None]) -> float:
    """CPU time of one turn."""
    start = time.process_time()
    for _ in range(ITERATIONS):
        run()
    return time.process_time() - start


def peak_memory(name: str) -> float:
    """Peak memory of two iterations in a process of its own, in GB."""
    command = [sys.executable, "-m", "benchmarks.training", "--memory_of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report(turns: int) -> str:
    """Measure, and return the table."""
    memory = {name: peak_memory(name) for name in BUILD}  # first: a process starts with the peak of its parent
    runs = {name: trainer(name) for name in BUILD}
    for run, _ in runs.values():
        run()  # warm up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (run, _) in runs.items():
            times[name].append(seconds(run))
    parser = config()
    images = ITERATIONS * parser["batch_size"]
    lines = [
        "# Training beside others",
        "",
        f"`python -m benchmarks.training --turns {turns}`: batches of {parser['batch_size']}, {parser['roi_size']}, "
        f"channels {parser['channels']}, {torch.get_num_threads()} threads of {platform.machine()}, torch "
        f"{torch.__version__}. Images per second of CPU time, ours with K = {parser['train_num_members']} masks of "
        f"each; median of {turns} turns.",
        "",
        "| method | parameters, M | images / s | ours is faster by | peak memory, GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (_, size) in runs.items():
        speed = images / statistics.median(times[name])
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times[name], times[OURS]))
        required = f" (required {REQUIRED})" if name == SAME_METHOD else ""
        cells = [name, f"{size:.2f}", f"{speed:.1f}", f"{ratio:.2f}{required}", f"{memory[name]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "With stems of stride 2, all but the first and last convolution run at half the resolution; the peers and the "
        "third row work at full resolution. MONAI's DiffusionModelUNet has one encoder, and attention in the middle. "
        "UNet and SegResNet learn single masks.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training.md")
    parser.add_argument("--memory_of", choices=BUILD, help="print the peak memory of one method, in GB")
    options = parser.parse_args()
    if options.memory_of:
        run, _ = trainer(options.memory_of)
        run()
        run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    text = report(options.turns)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""Speed on a GPU: training and segmenting, beside a U-Net, nnU-Net's plan and MONAI's diffusion U-Net.

``python -m benchmarks.gpu`` times them on random images, in float32, in bfloat16, and compiled. It appends what it
finds to ``benchmarks/gpu.jsonl``, does not time again what is there, and writes ``benchmarks/results/gpu.md``.
Segmentation is from preprocessed images to the probabilities of all members: five of one pass each for this
bundle, one for the U-Nets, one of 50 steps for MONAI's diffusion. With ``--device cpu`` it runs without a GPU, for
hours at these sizes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import monai
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import DynUNet

from medsegdiff_monai.files import write_atomically

from .accuracy import ROOT, append, is_known
from .forward import parameters
from .peers import CONFIGS, UNET_LEARNING_RATE, Peer, discriminative, monai_diffusion, ours, unet

LEAST_EDGE, MOST_FEATURES = 4, {2: 512, 3: 320}  # of nnU-Net's plans


class Field(NamedTuple):
    """What is segmented: an overlay of the bundle, settings over it, and how many images are in a batch."""

    overlay: str
    settings: dict[str, Any]
    batch: int


FIELDS = {
    "2D, 128 × 128, lung nodules": Field("lidc", {}, 8),
    "2D, 256 × 256": Field("generic_2d", {"roi_size": [256, 256], "in_channels": 1, "num_classes": 1}, 16),
    "3D, 96 × 96 × 96": Field("hippocampus", {"roi_size": [96, 96, 96], "num_classes": 1, "regions": None}, 2),
}
MODES = ("float32", "bfloat16", "bfloat16, compiled")
TEXT = """
Random images that lie on the card: nothing is loaded or augmented. Training is a step with AdamW; an image counts once,
however many masks of it are trained. Segmenting is from preprocessed images to the probabilities of all members.
Medians of repeated batches; in `float32`, convolutions use TF32, as is PyTorch's default. What is not in a table was
not run.
""".splitlines()


def planned_unet(parser: ConfigParser) -> Peer:
    """MONAI's ``DynUNet`` in the shape that nnU-Net plans for the field: halved while no edge falls below four."""
    dims, edge = parser["spatial_dims"], min(parser["roi_size"])
    levels = 1
    while edge // 2 >= LEAST_EDGE:
        edge, levels = edge // 2, levels + 1
    net = DynUNet(
        dims,
        parser["in_channels"],
        parser["num_classes"],
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=[min(32 * 2**i, MOST_FEATURES[dims]) for i in range(levels)],
    )
    return discriminative(net, parser, UNET_LEARNING_RATE)


BUILD: dict[str, Callable[[ConfigParser], Peer]] = {
    "this bundle": ours,
    "MONAI UNet": unet,
    "DynUNet, as nnU-Net plans": planned_unet,
    "MONAI DiffusionModelUNet": monai_diffusion,
}


def configured(field: Field, mode: str, device: torch.device) -> ConfigParser:
    """Return ``train.json`` for a field."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "datasets" / f"{field.overlay}.json")])
    parser.update({"bundle_root": "", "device": device.type, "amp": mode != "float32", **field.settings})
    return parser


class Speed(NamedTuple):
    """What was measured of a method.

    Attributes:
        parameters: in 10^6.
        passes: of the network, to segment an image.
        training: images per second.
        segmenting: images per second.
        memory: peak of the training on the GPU, GB; None on another device.
    """

    parameters: float
    passes: int
    training: float
    segmenting: float
    memory: float | None


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Time until a device has done its work, after some rounds that warm up or compile."""
    times = []
    for turn in range(rounds + 3):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn > 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, field: Field, mode: str, device: torch.device, rounds: int) -> Speed:
    """Time a method on random images of a field."""
    parser = configured(field, mode, device)
    peer = BUILD[name](parser)
    peer.module.to(device).train()
    peer.advance(1.0)  # past the warm start, with sets of masks
    if "compiled" in mode:
        peer.module.compile()
    image = torch.randn(field.batch, parser["in_channels"], *parser.get_parsed_content("field_size"), device=device)
    raters = (torch.rand(field.batch, 1, parser["num_classes"], *image.shape[2:], device=device) > 0.5).float()
    optimizer = torch.optim.AdamW(peer.module.parameters(), fused=device.type == "cuda")
    own = peer.autocasts or mode == "float32"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=not own)

    def step() -> None:
        with autocast():
            loss = peer.loss(image, raters)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = field.batch / median_seconds(step, device, rounds)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    peer.module.eval()
    segment = partial(peer.segment, peer.module, image)
    with torch.no_grad(), autocast():
        segmenting = field.batch / median_seconds(segment, device, rounds)
    return Speed(parameters(peer.module), peer.passes, training, segmenting, memory)


def describe(device: torch.device) -> str:
    """What is measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, no GPU"


def page(rows: list[dict[str, Any]]) -> str:
    """The page: a table for each card, field and precision."""
    lines = ["# Speed on a GPU", "", "Written by `python -m benchmarks.gpu` from `benchmarks/gpu.jsonl`.", *TEXT]
    heads = ["method", "parameters, M", "passes", "training, images/s", "segmenting, images/s", "peak memory, GB"]
    for table in dict.fromkeys((row["card"], row["field"], row["mode"]) for row in rows):
        some = [row for row in rows if (row["card"], row["field"], row["mode"]) == table]
        made = {key: " and ".join(sorted({row[key] for row in some})) for key in ("torch", "monai", "date")}
        lines += ["", f"## {table[1]}, {table[2]}, batches of {some[0]['batch']}", ""]
        lines += [f"{table[0]}; torch {made['torch']}, MONAI {made['monai']}; {made['date']}.", ""]
        lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for row in some:
            memory = f"{row['memory']:.2f}" if row["memory"] is not None else ""
            speeds = [f"{row[key]:.1f}" for key in ("training", "segmenting")]
            cells = [row["method"], f"{row['parameters']:.2f}", str(row["passes"]), *speeds, memory]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--fields", nargs="+", choices=FIELDS, default=list(FIELDS))
    parser.add_argument("--methods", nargs="+", choices=BUILD, default=list(BUILD))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "gpu.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: give --device cpu, which takes hours.")
    made = {"torch": torch.__version__, "monai": monai.__version__, "date": datetime.date.today().isoformat()}
    for mode in options.modes:
        for field in options.fields:
            for method in options.methods:
                known = {"card": describe(device), "field": field, "mode": mode, "method": method}
                if not is_known(options.results, known):
                    found = measure(method, FIELDS[field], mode, device, options.rounds)
                    append(options.results, {**known, "batch": FIELDS[field].batch, **found._asdict(), **made})
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    write_atomically(options.output, page(rows).encode())


if __name__ == "__main__":
    main()

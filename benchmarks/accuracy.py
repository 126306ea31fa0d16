"""Segmenters trained for the same time on the same data: U-Net, plain diffusion, the method's two ideas and objective.

``python -m benchmarks.accuracy --data_root DIR`` trains the methods on each data set with each seed, in turns (see
``benchmarks.peers``), and appends a line to ``benchmarks/results.jsonl``; runs that are there are not repeated. Scores
are of the shipped inference on the grid of the input: means over the cases that evaluation uses, but for those in which
a score has no value.

Where cases are slices of volumes, ``dice_volume`` is the Dice of whole volumes, beside ``dice``, that of slices.
``dice_of_cases`` keeps the mean over classes for each case (or volume), for paired differences between methods.

``ece_band``, ``brier`` and ``auroc`` look at a class within ``BAND`` voxels of its contours, true and predicted:
whether its probability is right there, and whether the entropy of that probability tells wrong voxels from right ones.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import monai
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from monai.transforms import LoadImage
from torch import Tensor, nn

from medsegdiff_monai import __version__
from medsegdiff_monai.fusion import binary_entropy
from medsegdiff_monai.metrics import (
    boundary_band,
    error_auroc,
    expected_calibration_error,
    generalised_energy_distance,
    hungarian_matched_iou,
    nested_masks,
)
from medsegdiff_monai.rows import SURFACE_TOLERANCE

from .forward import parameters
from .peers import CONFIGS, Peer, Training, finish, flipping, ours, segresnet, start, train_in_turns, unet, weights_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
WORK = ROOT / "benchmarks" / "work" / "accuracy"
METHODS: dict[str, tuple[Callable[[ConfigParser], Peer], str | Mapping[str, Any] | None]] = {
    "MONAI UNet": (unet, None),
    "MONAI UNet, flips": (flipping(unet), None),
    "MONAI SegResNet": (segresnet, None),
    "MONAI SegResNet, flips": (flipping(segresnet), None),
    "plain DPM": (ours, "without_dynamic_conditioning"),
    "+ dynamic conditioning": (ours, "without_ff_parser"),
    "+ FF-Parser": (ours, None),
    "mask objective": (ours, {"objective": "mask"}),  # Dice + BCE of single masks
    "trained in bfloat16": (ours, {"train#inferer#amp": True}),
}
TRAINED_AS = {f"{name}, flips": name for name in ("MONAI UNet", "MONAI SegResNet")}  # the same weights
FIRST_VERSION = "0.1.0"
CHOSEN = {  # learning rates among 0.002, 0.005 and 0.01 by data set and method, see the lines with ``split``
    ("LGG_MRI", "MONAI UNet"): 0.005,
    ("LGG_MRI, 256", "MONAI UNet"): 0.005,  # as at 64 × 64
    ("DRISHTI_roi", "MONAI UNet"): 0.005,
    ("DRISHTI_roi, 256", "MONAI UNet"): 0.005,
    ("TG3K_thyroid", "MONAI UNet"): 0.002,
}
SMALL = {"roi_size": [64, 64], "channels": [16, 32, 64, 96]}
LARGE = {**SMALL, "roi_size": [128, 128]}
LARGEST = {**SMALL, "roi_size": [256, 256]}
DISCS = {"in_channels": 3, "regions": {"disc": [1, 2], "cup": [2]}}
SETS: dict[str, tuple[str, dict[str, Any]]] = {  # by folder and, after a comma, what is special
    "LGG_MRI": ("lgg_mri", SMALL),
    "LGG_MRI, 128": ("lgg_mri", LARGE),
    "LGG_MRI, 256": ("lgg_mri", LARGEST),
    "DRISHTI_roi": ("generic_2d", {**DISCS, **SMALL}),
    "DRISHTI_roi, 128": ("generic_2d", {**DISCS, **LARGE}),
    "DRISHTI_roi, 256": ("generic_2d", {**DISCS, **LARGEST}),
    "TG3K_thyroid": ("generic_2d", {"in_channels": 1, "num_classes": 1, **SMALL}),
    "Hippocampus3D": ("hippocampus", {}),
    "ACDC_slices": (
        "generic_2d",
        {
            "in_channels": 1,
            "num_classes": 3,
            "regions": {"right ventricle": [1], "myocardium": [2], "left ventricle": [3]},
            "fit": "crop",
            **LARGE,
        },
    ),
}
SLICE = re.compile(r"_slice\d+$")  # what names of slices have beside that of their volume
WORST = 3  # cases that are named
BAND = 3  # voxels on both sides of a contour
RATERS = {"disc": "raters_disc", "cup": "raters_cup"}  # maps of how many of four raters agree, in DRISHTI_roi


def configure(
    name: str, data: str, data_root: Path, seed: int, variant: str | Mapping[str, Any] | None = None
) -> ConfigParser:
    """Return a config of the bundle under overlays of a data set and of a variant, a file's name or settings."""
    overlay, settings = SETS[data]
    files = [CONFIGS / f"{name}.json", CONFIGS / "datasets" / f"{overlay}.json"]
    if isinstance(variant, str):
        files.append(CONFIGS / "variants" / f"{variant}.json")
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    folder = str(data_root / data.split(",")[0])
    more = {"bundle_root": str(ROOT / "bundle"), "dataset_dir": folder, "device": "cpu", "seed": seed}
    own = variant if isinstance(variant, Mapping) else {}
    own = {key: value for key, value in own.items() if "#" not in key or key.startswith(f"{name}#")}
    parser.update({**settings, **more, "amp": False, **own})  # on any CPU, as the other methods
    return parser


def raters_scores(item: dict, members: Tensor, names: Sequence[str], drawn_together: int) -> dict[str, list[float]]:
    """GED and matched IoU of each region against the nested masks of agreement.

    Args:
        item: item of the data set; the raters' maps are in folders beside that of its label.
        members: probabilities (members, classes, *field).
        names: of the regions.
        drawn_together: see :func:`medsegdiff_monai.metrics.generalised_energy_distance`.
    """
    scores: dict[str, list[float]] = {"ged_unbiased": [], "matched_iou": []}
    for k, name in enumerate(names):
        label = Path(item["label"])
        agreement = LoadImage(image_only=True, ensure_channel_first=True)(
            label.parent.parent / RATERS[name] / label.name
        )
        raters = nested_masks(agreement[0].as_tensor(), 4)
        masks = F.interpolate(members[:, k : k + 1], raters.shape[1:], mode="bilinear", align_corners=False)[:, 0] > 0.5
        if len(masks) == 1:  # whatever is drawn, it is this
            masks = masks.expand(2, *masks.shape[1:])
        scores["ged_unbiased"].append(generalised_energy_distance(masks, raters, drawn_together))
        scores["matched_iou"].append(hungarian_matched_iou(masks, raters))
    return scores


@dataclass
class Case:
    """A segmented case.

    Attributes:
        item: of the data set, with its files.
        image: (channels, *field), normalised.
        members: probabilities (members, classes, *field).
        output: what the shipped postprocessing makes of them, on the grid of the input.
        seconds: CPU time of all passes.
    """

    item: dict[str, Any]
    image: Tensor
    members: Tensor
    output: dict[str, Any]
    seconds: float

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        """Predicted and true masks, (1, classes, *spatial)."""
        return self.output["mask"][None].as_tensor(), self.output["label"][None].as_tensor()


def segment(parser: ConfigParser, run: Callable[[Tensor], Tensor]) -> Iterator[Case]:
    """Segment all cases of an ``evaluate.json`` with what returns members (batch, members * classes, *field)."""
    dataset, postprocess = (parser.get_parsed_content(name) for name in ("dataset", "postprocessing"))
    for i in range(len(dataset)):
        item = dataset[i]
        start = time.process_time()
        with torch.no_grad():
            drawn = run(item["image"][None].as_tensor())[0]
        seconds = time.process_time() - start
        output = postprocess({**item, "pred": MetaTensor(drawn).copy_meta_from(item["image"])})
        members = drawn.unflatten(0, (-1, parser["num_classes"]))
        yield Case(dataset.data[i], item["image"].as_tensor(), members, output, seconds)


def evaluate(
    parser: ConfigParser, run: Callable[[Tensor], Tensor], with_raters: bool, drawn_together: int = 1
) -> dict[str, Any]:
    """Segment and score all cases, see :func:`summarise`."""
    return summarise(segment(parser, run), list(parser["regions"]) if with_raters else [], drawn_together)


def summarise(found_cases: Iterable[Case], rated: Sequence[str] = (), drawn_together: int = 1) -> dict[str, Any]:
    """Score all cases: means over cases for each class, the worst cases, and the median time.

    Args:
        found_cases: segmented cases.
        rated: regions that raters have outlined, if there are any.
        drawn_together: see :func:`raters_scores`.
    """
    scores: dict[str, list[Any]] = {}
    times, cases = [], []
    volumes: dict[str, Tensor] = {}
    for case in found_cases:
        mask, truth = case.masks
        spacing = case.output["label"].pixdim.tolist() if mask.ndim == 5 else None
        distance = compute_hausdorff_distance(mask, truth, include_background=True, percentile=95, spacing=spacing)
        tolerance = [SURFACE_TOLERANCE] * mask.shape[1]
        near = compute_surface_dice(mask, truth, tolerance, include_background=True, spacing=spacing)
        found = {
            "dice": compute_dice(mask, truth, ignore_empty=False)[0].tolist(),
            "iou": compute_iou(mask, truth, ignore_empty=False)[0].tolist(),
            "hd95": distance[0].tolist(),
            "nsd": near[0].tolist(),
            **calibration(case.output["prob"].as_tensor(), mask[0] > 0.5, truth[0] > 0.5),
        }
        if rated:
            found |= raters_scores(case.item, case.members, rated, drawn_together)
        for metric, values in found.items():
            scores.setdefault(metric, []).append(values)
        times.append(case.seconds)
        add_slice(volumes, SLICE.sub("", case.item["case"]), mask[0] > 0.5, truth[0] > 0.5)
        cases.append((round(statistics.mean(found["dice"]), 3), case.item["case"], round(float(truth.mean()), 4)))
    means = {metric: _mean(values) for metric, values in scores.items()}
    by_volume = {name: (common / size).nan_to_num(1.0).tolist() for name, (common, size) in volumes.items()}
    if len(by_volume) < len(cases):
        means["dice_volume"] = _mean(list(by_volume.values()))
    means["dice_of_cases"] = {name: round(statistics.mean(values), 4) for name, values in by_volume.items()}
    failed = {"below_half": sum(dice < 0.5 for dice, *_ in cases), "worst": sorted(cases)[:WORST]}
    return {**means, **failed, "cases": len(times), "seconds_per_image": round(statistics.median(times), 4)}


def add_slice(volumes: dict[str, Tensor], name: str, mask: Tensor, truth: Tensor) -> None:
    """Add what a slice (classes, *spatial) has in common with the truth, and the mean size of both, to its volume's."""
    axes = tuple(range(1, mask.ndim))
    sums = torch.stack([(mask & truth).sum(axes), (mask.sum(axes) + truth.sum(axes)) / 2]).double()
    volumes[name] = volumes.get(name, torch.zeros_like(sums)) + sums


def calibration(probability: Tensor, mask: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Whether probabilities can be trusted, everywhere and near the contours; all (classes, *spatial)."""
    band = boundary_band(mask, truth, BAND)
    missed = (probability - truth.to(probability)).square() * band
    return {
        "ece": expected_calibration_error(probability, truth).tolist(),
        "ece_band": expected_calibration_error(probability, truth, where=band).tolist(),
        "brier": (missed.flatten(1).sum(1) / band.flatten(1).sum(1)).tolist(),
        "auroc": error_auroc(binary_entropy(probability), mask != truth, band).tolist(),
    }


def _mean(values: list[list[float]]) -> list[float]:
    """Mean over cases for each class; what has no value, such as distances to empty masks, is left out."""
    table = torch.tensor(values, dtype=torch.float64)
    table[~table.isfinite()] = float("nan")
    return [round(v, 5) for v in table.nanmean(0).tolist()]


def prepared(data: str, method: str, seed: int, options: argparse.Namespace) -> tuple[Peer, Training, Path]:
    """Return a method, its training, and the file of its weights."""
    build, variant = METHODS[method]
    config, run = configure("train", data, options.data_root, seed, variant), trained_by(data, method, seed, options)
    if options.device != "cpu":
        config["train#inferer#amp"] = True  # as the others there
    peer, training = start(build, config, options.seconds, run["learning_rate"], options.device)
    return peer, training, options.work_dir / weights_name(*run.values())


def trained(data: str, method: str, seed: int, options: argparse.Namespace) -> tuple[Peer, nn.Module, int]:
    """Train a method, or read what an earlier run has trained; returns it, its module, and the iterations."""
    peer, training, weights = prepared(data, method, seed, options)
    return peer, *finish(training, weights)


def run(
    data: str, method: str, seed: int, peer: Peer, training: Training, file: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Evaluate a trained method on a data set; returns the line of the results file."""
    module, iterations = finish(training, file)
    config = configure("evaluate", data, options.data_root, seed, METHODS[method][1])
    if options.split:
        splits = configure("train", data, options.data_root, seed).get_parsed_content("splits")
        config["datalist"] = splits[options.split]
    scores = evaluate(config, partial(peer.segment, module), data.startswith("DRISHTI"), peer.drawn_together)
    how = {"iterations": iterations, **({} if options.device == "cpu" else {"card": training.card})}
    return {**known(data, method, seed, options), **how, **describe(config, module, peer.passes), **scores}


def shipped(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the weights of the bundle, on the cases they were chosen by."""
    config = configure("evaluate", "Hippocampus3D", options.data_root, 0)
    network, inferer = (config.get_parsed_content(name) for name in ("network_def", "inferer"))
    weights = ROOT / "bundle" / "models" / "model.pt"
    network.load_state_dict(torch.load(weights, weights_only=True))
    scores = evaluate(config, partial(inferer, network=network.eval()), False)
    known = key("Hippocampus3D", "shipped", 0, options.shipped)
    known["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    known["flip_axes"] = network.record.flip_axes()
    return {**known, **describe(config, network, inferer.num_members * inferer.num_steps), **scores}


def describe(config: ConfigParser, module: nn.Module, passes: int) -> dict[str, Any]:
    """What was run, and with what."""
    return {
        "parameters_m": round(parameters(module), 4),
        "passes": passes,
        "field": config["roi_size"],
        "channels": config["channels"],
        "torch": torch.__version__,
        "monai": monai.__version__,
        "date": datetime.date.today().isoformat(),
    }


def key(data: str, method: str, seed: int, seconds: float, objective: str | None = None) -> dict[str, Any]:
    """What tells one run from another; only our own trainings have an objective."""
    run = {"data": data, "method": method, "seed": seed, "seconds": seconds}
    return run if objective is None else {**run, "objective": objective}


def trained_by(data: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The key of the training of one of the methods; some share theirs."""
    method = TRAINED_AS.get(method, method)
    build, variant = METHODS[method]
    config = configure("train", data, options.data_root, seed, variant)
    run = key(data, method, seed, options.seconds, config.get_parsed_content("objective") if build is ours else None)
    rate = options.learning_rate or CHOSEN.get((data, method)) or build(config).learning_rate or config["learning_rate"]
    split = {} if options.split is None else {"split": options.split}
    device = {} if options.device == "cpu" else {"device": options.device}
    return {**run, "learning_rate": rate, **split, **device, "version": __version__}


def known(data: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The key of a run of one of the methods: the training, and whether ours sees flipped images too."""
    build, variant = METHODS[method]
    flips = configure("train", data, options.data_root, seed, variant)["flip_axes"] if build is ours else None
    more = {} if flips is None else {"flip_axes": flips}
    return {**trained_by(data, method, seed, options), "method": method, **more}


def is_known(results: Path, known: dict[str, Any]) -> bool:
    """Whether the results file has a run; lines without a version are of the first one.

    Raises:
        SystemExit: for a line that an interrupted program has left unfinished.
    """
    lines = results.read_text().splitlines() if results.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = {"version": FIRST_VERSION, **json.loads(line)}
        except json.JSONDecodeError:
            raise SystemExit(f"{results}: line {number} is not whole: take it out.") from None
        if row.items() >= known.items() and all(row.get(key) == known.get(key) for key in ("split", "device")):
            return True
    return False


def append(results: Path, row: dict[str, Any]) -> None:
    """Add a line to the results file."""
    line = json.dumps(row)
    with results.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def positive(text: str) -> float:
    """A number above 0, of the command line."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def main() -> None:
    """Run what is missing, and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data", nargs="+", choices=SETS, default=["LGG_MRI", "DRISHTI_roi"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--seconds", type=positive, default=180, help="CPU time of each training; by the clock on a GPU"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="that trains; scored on the CPU")
    parser.add_argument("--learning_rate", type=positive, help="at the start; by default the method's")
    parser.add_argument("--split", choices=["validation"], help="score held-out training cases, to choose settings by")
    parser.add_argument("--shipped", type=float, help="score the weights in the bundle, trained for so many seconds")
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.shipped:
        append(options.results, shipped(options))
        return
    for data in options.data:
        file = options.data_root / data.split(",")[0] / "dataset.json"
        if not file.is_file():
            raise SystemExit(f"{file}: is not there: give --data_root the folder that holds {file.parent.name}.")
        if options.split in json.loads(file.read_text()):
            raise SystemExit(f"{file}: its list {options.split} is what is scored: nothing may be chosen by it.")
    for seed in options.seeds:  # all sets get a first figure before any gets a second
        for data in options.data:
            todo = [m for m in options.methods if not is_known(options.results, known(data, m, seed, options))]
            for method in options.methods:
                if method not in todo:
                    print(f"{data}, {method}, seed {seed}: is in {options.results}.", flush=True)
            started = {method: prepared(data, method, seed, options) for method in todo}
            train_in_turns({file: training for _, training, file in started.values() if not file.is_file()})
            for method, parts in started.items():
                append(options.results, run(data, method, seed, *parts, options))


if __name__ == "__main__":
    main()

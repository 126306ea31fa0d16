"""Are several masks as four radiologists' are? Ours beside other ways to draw masks, trained for equally long on LIDC4.

``python -m benchmarks.ambiguity --data_root DIR`` trains each method with each seed, in turns, for the same CPU time of
one thread, and scores ``MEMBERS`` masks of each test slice against the four radiologists'. It appends a line to
``benchmarks/ambiguity.jsonl`` for each run, and writes ``benchmarks/results/ambiguity.md`` and
``docs/figures/ambiguity.png`` from what is there. Runs that are there are not repeated; the weights stay in
``--work_dir``, so that a line that is taken out is scored anew, without training. ``--shipped SECONDS`` scores the
weights of the bundle instead, in all and by group of slices, on pictures of full size.

``DIR`` holds ``LIDC4``: pictures of 128x128 pixels, of which the centre is taken. All methods learn from the masks of
all four radiologists, of the same batches (``benchmarks.lidc``), as ``benchmarks.peers`` trains.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import monai
import torch
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from monai.utils import set_determinism
from torch import Tensor, nn

from medsegdiff_monai import __version__
from medsegdiff_monai.inferers import DRAWN_TOGETHER
from medsegdiff_monai.metrics import boundary_band, expected_calibration_error, iou_matrix, rater_scores

from .accuracy import BAND, ROOT, append, is_known, positive
from .ambiguity_page import PAIRED, draw, write
from .forward import parameters
from .lidc import Batches, Crops, load
from .opponents import HAS_PROBABILISTIC_UNET, dropout_unet, probabilistic_unet
from .peers import CONFIGS, Peer, Training, finish, ours, train_in_turns, unet, weights_name
from .ssn import ssn

MEMBERS = 16
# of all methods: batch_size and, for ours, train_num_members are the config's where they are not set here
SETTINGS: dict[str, Any] = {"in_channels": 1, "num_classes": 1, "channels": [16, 32, 64, 96], "num_res_blocks": 1}
RESULTS = ROOT / "benchmarks" / "ambiguity.jsonl"
WORK = ROOT / "benchmarks" / "work" / "ambiguity"


@dataclass(frozen=True)
class Method:
    """A way to draw masks.

    Attributes:
        build: makes what is trained.
        learning_rate: first one; it falls by a half cosine.
        settings: of the config.
        nets: networks that are trained one after the other, in an equal part of the time each; a mask from each.
    """

    build: Callable[[ConfigParser], Peer]
    learning_rate: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    nets: int = 1


# Learning rates of the opponents, chosen among 0.002, 0.005 and 0.01 by the 400 validation slices at 64x64, one seed.
# After 60 s each, the U-Net has empty masks, empty masks and Dice .500; the SSN has GED16 .364, .343 and .358.
# Halfway through that, the Probabilistic U-Net has GED16 .611 and .745; with 0.01 it ended in NaN. MC dropout has the
# rate of the U-Net.
METHODS = {
    "ours": Method(ours, 0.002),
    "mask objective": Method(ours, 0.002, {"objective": "mask"}),
    "MONAI UNet": Method(unet, 0.01),
    "five UNets": Method(unet, 0.01, nets=5),
    "UNet, MC dropout": Method(dropout_unet, 0.01),
    "SSN": Method(ssn, 0.005),
    **({"Probabilistic U-Net": Method(probabilistic_unet, 0.002)} if HAS_PROBABILISTIC_UNET else {}),
}


def configured(method: Method, size: int, seed: int, **more: Any) -> ConfigParser:
    """Return ``train.json`` for 2D images as large as the crops, under the settings of a method."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "datasets" / "generic_2d.json")])
    own = {"bundle_root": "", "device": "cpu", "amp": False, "seed": seed, "roi_size": [size, size]}
    parser.update({**SETTINGS, **own, "num_members": MEMBERS, "num_steps": 1, **method.settings, **more})
    return parser


@dataclass
class Part:
    """A network of a method, its training, and the file of its weights."""

    peer: Peer
    training: Training
    file: Path


def parts(name: str, seed: int, crops: Crops, options: argparse.Namespace) -> list[Part]:
    """Return the networks of a method, not yet trained."""
    method, made = METHODS[name], []
    for i in range(method.nets):
        # what is scored is always in single precision, on the CPU
        config = configured(method, options.size, seed, **{"train#inferer#amp": options.device != "cpu"})
        own = seed * method.nets + i
        set_determinism(own)
        peer = method.build(config)
        batches = Batches(crops, config["batch_size"], own)
        rate = method.learning_rate
        training = Training(peer, batches, options.seconds / method.nets, rate, options.device)
        file = weights_name(*key(name, seed, options).values(), i)
        made.append(Part(peer, training, options.work_dir / file))
    return made


def segmenter(some: list[Part]) -> tuple[Callable[[Tensor], Tensor], list[nn.Module], int]:
    """Return what draws masks (batch, members, *spatial), the trained networks, and their iterations together."""
    trained = [finish(part.training, part.file) for part in some]
    draws = [partial(part.peer.segment, module) for part, (module, _) in zip(some, trained)]

    def run(image: Tensor) -> Tensor:
        return torch.cat([draw(image) for draw in draws], dim=1)

    return run, [module for module, _ in trained], sum(count for _, count in trained)


def more_steps(name: str, steps: int, seed: int, size: int, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what draws masks with trained weights of ours in several steps each."""
    peer = METHODS[name].build(configured(METHODS[name], size, seed, num_steps=steps))
    return partial(peer.segment, network)


def score(members: Tensor, raters: Tensor, drawn_together: int) -> tuple[dict[str, float], Tensor]:
    """Score the masks of a slice.

    Args:
        members: probabilities (members, size, size); a single one stands for ``MEMBERS`` that are equal.
        raters: boolean (raters, size, size).
        drawn_together: masks in a row that are not independent of each other.

    Returns:
        The scores; and of the voxels in the band around the contours of the members' mean and of what at least half of
        the radiologists marked, the probability and the share of the radiologists, (2, voxels).
    """
    mean, agreement = members.mean(0, keepdim=True), raters.float().mean(0, keepdim=True)
    mask, truth = mean > 0.5, agreement >= 0.5
    votes = (members > 0.5).expand(MEMBERS if len(members) == 1 else -1, -1, -1)
    group = torch.arange(len(votes)) // drawn_together
    scores = rater_scores(votes[:, None], raters[:, None], drawn_together)
    found = {name: values[0] for name, values in scores.items()}
    found |= {
        "pairwise": float((1 - iou_matrix(votes, votes))[group[:, None] != group].mean()),
        "dice": float(compute_dice(mask[None], truth[None], ignore_empty=False)),
        "brier": float((mean - raters.float()).square().mean()),
    }
    band = boundary_band(mask, truth, BAND)
    return found, torch.stack([mean[band], agreement[band]])


def evaluate(
    run: Callable[[Tensor, Tensor], Tensor],
    crops: Crops,
    drawn_together: int = 1,
    groups: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Score all slices: means over those that have a value, calibration over the bands of all, and the median time.

    Args:
        run: draws members (1, members, size, size) for an image (1, 1, size, size); the radiologists' masks are for
            bounds.
        crops: the slices.
        drawn_together: see :func:`score`.
        groups: of slices, boolean (slices,), whose means are told, too.
    """
    rows, bands, times = [], [], []
    for image, raters in zip(crops.images, crops.raters):
        start = time.process_time()
        with torch.no_grad():
            members = run(image[None], raters)[0]
        times.append(time.process_time() - start)
        found, band = score(members, raters, drawn_together)
        rows.append(found)
        bands.append(band)
    table = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    near = torch.cat(bands, 1)[:, None]

    def means(some: Tensor) -> dict[str, float]:
        return {name: round(value, 5) for name, value in zip(rows[0], some.nanmean(0).tolist())}

    by_group = {name: {"cases": int(of.sum()), **means(table[of])} for name, of in (groups or {}).items() if of.any()}
    return {
        **means(table),
        **({"groups": by_group} if by_group else {}),
        "ece_band": round(float(expected_calibration_error(*near)), 5),
        "of_patients": {key: of_patients([row[key] for row in rows], crops.patients) for key in PAIRED},
        "members": len(members),
        "cases": len(crops),
        "seconds_per_image": round(statistics.median(times), 5),
    }


def of_patients(values: list[float], patients: Sequence[str]) -> dict[str, list[float]]:
    """The values of each patient's slices: patients, not slices, are independent of each other."""
    found: dict[str, list[float]] = {}
    for value, patient in zip(values, patients):
        found.setdefault(patient, []).append(round(value, 4))
    return found


BOUNDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bound: perfect majority mask": lambda image, raters: (raters.float().mean(0) >= 0.5).float()[None, None],
    "bound: empty mask": lambda image, raters: torch.zeros_like(image),
    "bound: the radiologists' own masks, drawn": lambda image, raters: raters[torch.randint(len(raters), (MEMBERS,))][
        None
    ].float(),
}


def key(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What tells one run from another; bounds have no training."""
    run = {"method": name, "seed": seed, "size": options.size, "split": options.split}
    if name in BOUNDS:
        return {**run, "seconds": 0}
    method = METHODS.get(name, METHODS["ours"])  # other names are of ours, with a number of steps
    on = {} if options.device == "cpu" else {"device": options.device}
    if method.build is ours:
        on["flip_axes"] = configured(method, options.size, seed)["flip_axes"]  # along which some members see the image
    return {**run, "seconds": options.seconds, "learning_rate": method.learning_rate, **on, "version": __version__}


def rows_of(name: str, options: argparse.Namespace) -> dict[str, int]:
    """The rows that one training of a method gives, and the number of steps of each."""
    if name != "ours":
        return {name: 1}
    return {name if steps == 1 else f"{name}, {steps} steps": steps for steps in options.steps}


def runs(name: str, seed: int, some: list[Part], crops: Crops, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Score what a method has learnt; yields the missing lines of the results file."""
    run, networks, iterations = segmenter(some)
    method = METHODS[name]
    config = configured(method, options.size, seed)
    how = {
        "iterations": iterations,
        "parameters_m": round(sum(map(parameters, networks)), 4),
        "batch_size": config["batch_size"],
        **({} if options.device == "cpu" else {"card": some[0].training.card}),
        **({"train_num_members": config["train_num_members"]} if name == "ours" else {}),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "date": datetime.date.today().isoformat(),
    }
    for row, steps in rows_of(name, options).items():
        if not is_known(options.results, known := key(row, seed, options)):
            torch.manual_seed(seed)
            stepped = run if steps == 1 else more_steps(name, steps, seed, options.size, networks[0])
            scores = evaluate(lambda image, _, draw=stepped: draw(image), crops, some[0].peer.drawn_together)
            yield {**known, **how, "passes": sum(part.peer.passes for part in some) * steps, **scores}


def subgroups(crops: Crops) -> dict[str, Tensor]:
    """Slices by the number of radiologists who marked a nodule, and by its mean area in their outlines, in pixels."""
    areas = crops.raters.flatten(2).sum(2).float()
    marked = (areas > 0).sum(1)
    area = areas.sum(1) / marked.clamp(min=1)
    by_number = {f"marked by {n}": marked == n for n in range(1, areas.shape[1] + 1)}
    edges = [0.0, 50.0, 200.0, float("inf")]
    names = ("nodule below 50 pixels", "50 to 200 pixels", "200 pixels and more")
    return {**by_number, **{name: (area >= a) & (area < b) for name, a, b in zip(names, edges, edges[1:])}}


def shipped(options: argparse.Namespace) -> dict[str, Any]:
    """Score the weights of the bundle on pictures of full size, with the settings of their overlay."""
    config = ConfigParser()
    config.read_config([str(CONFIGS / "inference.json"), str(CONFIGS / "datasets" / "lidc.json")])
    config.update({"bundle_root": str(ROOT / "bundle"), "device": "cpu", "num_members": MEMBERS})
    network, inferer = (config.get_parsed_content(name) for name in ("network_def", "inferer"))
    weights = Path(config.get_parsed_content("checkpoint"))
    network.load_state_dict(torch.load(weights, weights_only=True))
    size = config["roi_size"][0]
    crops = load(options.data_root, options.split, size)
    run = partial(inferer, network=network.eval())
    known = {"method": "shipped", "seed": 0, "size": size, "seconds": options.shipped, "split": options.split}
    how = {
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "parameters_m": round(parameters(network), 4),
        "passes": MEMBERS,
        "torch": torch.__version__,
        "monai": monai.__version__,
        "date": datetime.date.today().isoformat(),
    }
    return {**known, **how, **evaluate(lambda image, _: run(image), crops, DRAWN_TOGETHER, subgroups(crops))}


def missing(name: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether a line of a method is not in the results file."""
    return not all(is_known(options.results, key(row, seed, options)) for row in rows_of(name, options))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder that holds LIDC4")
    parser.add_argument("--size", type=int, default=64, help="of the centre crops: 64, or 128 for the whole pictures")
    parser.add_argument(
        "--seconds", type=positive, default=300, help="CPU time of each training; by the clock on a GPU"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="that trains; scored on the CPU")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[1], help="with each of which ours is scored")
    parser.add_argument("--shipped", type=float, help="score the weights in the bundle, trained for so many seconds")
    parser.add_argument("--split", default="test", help="that is scored")
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "results" / "ambiguity.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "ambiguity.png")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, append it to the results, and write them down."""
    options = arguments()
    torch.set_num_threads(1)
    if options.shipped:
        append(options.results, shipped(options))
        write(options.results, list(METHODS), options.page, options.figure)
        return
    training, crops = (load(options.data_root, split, options.size) for split in ("training", options.split))
    for name, bound in BOUNDS.items():
        if not is_known(options.results, known := key(name, 0, options)):
            torch.manual_seed(0)
            append(options.results, {**known, **evaluate(bound, crops)})
    for seed in options.seeds:
        some = {name: parts(name, seed, training, options) for name in options.methods if missing(name, seed, options)}
        train_in_turns({p.file: p.training for made in some.values() for p in made if not p.file.is_file()})
        for name, made in some.items():
            for row in runs(name, seed, made, crops, options):
                append(options.results, row)
    if "ours" in options.methods:
        seed = options.seeds[0]
        run, *_ = segmenter(parts("ours", seed, training, options))
        draw(run, crops, f"{options.split}, {options.seconds:g} s of training, seed {seed}", options.figure)
    write(options.results, list(METHODS), options.page, options.figure)


if __name__ == "__main__":
    main()

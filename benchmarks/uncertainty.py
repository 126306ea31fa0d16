"""Which segmenter knows when and where it is wrong? Ours beside a U-Net, five, dropout and flips, trained equally long.

``python -m benchmarks.uncertainty --data_root DIR`` trains the methods on each data set with each seed, in turns (see
``benchmarks.peers``), and scores them on the cases that evaluation uses. It appends a line to
``benchmarks/uncertainty.jsonl`` for each run, and writes ``benchmarks/results/uncertainty.md`` from what is there. Runs
that are there are not repeated; the weights stay in ``--work_dir``.

A fifth of the training cases, whole patients at a time, is held out from all methods. From these, and from no case that
is scored, each method learns the calibration of its probabilities (ours the bundle's own, all others a temperature for
each class) and what Dice to expect at which agreement of its members (all of them as the bundle does).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import monai
import torch
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from monai.utils import set_determinism
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from medsegdiff_monai import __version__
from medsegdiff_monai.data.datalist import hold_out
from medsegdiff_monai.data.entries import read_data_list
from medsegdiff_monai.ensembles import Dropout, EnsembleInferer, Flips, Members, Networks
from medsegdiff_monai.files import write_atomically
from medsegdiff_monai.fusion import binary_entropy
from medsegdiff_monai.grading import ReliabilityCounts, fit_grading, grade, members_agreement
from medsegdiff_monai.metrics import boundary_band, error_auroc, expected_calibration_error
from medsegdiff_monai.networks import TrainingRecord
from medsegdiff_monai.networks.record import CALIBRATION_BINS, MAX_LOGIT, clipped_logit
from medsegdiff_monai.report.statistics import Grading

from .accuracy import BAND, ROOT, SETS, Case, append, configure, is_known, segment
from .forward import parameters
from .opponents import dropout_unet
from .peers import CONFIGS, UNET_LEARNING_RATE, Peer, Training, finish, ours, train_in_turns, unet
from .uncertainty_page import write

RESULTS = ROOT / "benchmarks" / "uncertainty.jsonl"
WORK = ROOT / "benchmarks" / "work" / "uncertainty"
MEMBERS: int = ConfigParser.load_config_file(CONFIGS / "inference.json")["num_members"]


@dataclass(frozen=True)
class Learner:
    """What is trained.

    Attributes:
        build: makes a network and its loss.
        nets: networks that are trained one after the other, in an equal part of the time each.
        learning_rate: first one; None: the peer's, else the config's.
    """

    build: Callable[[ConfigParser], Peer]
    nets: int = 1
    learning_rate: float | None = None


LEARNERS = {
    "ours": Learner(ours),
    "UNet": Learner(unet),
    "five UNets": Learner(unet, nets=5),
    "UNet with dropout": Learner(dropout_unet, learning_rate=UNET_LEARNING_RATE),
}


@dataclass(frozen=True)
class Method:
    """How members come of what was trained.

    Attributes:
        learner: name of what is trained.
        members: of the networks and the config; None: as the peer itself draws them.
    """

    learner: str
    members: Callable[[Sequence[nn.Module], ConfigParser], Members] | None = None


METHODS = {
    "ours": Method("ours"),
    "UNet, temperature": Method("UNet", lambda networks, config: Networks(networks)),
    "five UNets": Method("five UNets", lambda networks, config: Networks(networks)),
    "UNet, MC dropout": Method("UNet with dropout", lambda networks, config: Dropout(MEMBERS, config["seed"])),
    "UNet, flips as in training": Method("UNet", lambda networks, config: Flips(config["flip_axes"])),
    "UNet, all flips": Method("UNet", lambda networks, config: Flips(range(config["spatial_dims"]))),
}


def write_lists(data: str, seed: int, options: argparse.Namespace) -> Path:
    """Write ``dataset.json`` anew, with a fifth of the training cases as ``validation``, and all scored ones as ``test``.

    Returns:
        The folder that holds the data set's folder, see :func:`benchmarks.accuracy.configure`.
    """
    lists, root = read_data_list(options.data_root / data), options.work_dir / "lists" / str(seed)
    kept, held = hold_out([entry.item() for entry in lists.of("training")], seed)
    scored = [entry.item() for entry in lists.of("validation") or lists.of("test")]
    keys = {"image": "image", "label": "label", "raters": "labels", "group": "patient"}
    content = {
        split: [{keys[key]: value for key, value in item.items()} for item in items]
        for split, items in (("training", kept), ("validation", held), ("test", scored))
    }
    write_atomically(root / data / "dataset.json", json.dumps(content, indent=1).encode())
    return root


class Part(NamedTuple):
    """A network, its training, the file of its weights, and the config of both."""

    peer: Peer
    training: Training
    file: Path
    config: ConfigParser


def learning_rate(name: str, config: ConfigParser) -> float:
    """The first learning rate of what is trained."""
    return LEARNERS[name].learning_rate or (config["learning_rate"] if name == "ours" else UNET_LEARNING_RATE)


def shaped_by(data: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All that shapes a training."""
    rate = learning_rate(name, configure("train", data, options.data_root, seed))
    lists = hashlib.sha256((options.data_root / data / "dataset.json").read_bytes()).hexdigest()[:12]
    how = {"learning_rate": rate, "lists": lists, "version": __version__}
    return {"data": data, "seed": seed, "seconds": options.seconds, **how}


def parts(data: str, name: str, seed: int, lists: Path, options: argparse.Namespace) -> list[Part]:
    """Return the networks of a learner, not yet trained."""
    learner, made = LEARNERS[name], []
    shaped = shaped_by(data, name, seed, options)
    for i in range(learner.nets):
        config = configure("train", data, lists, seed, {"num_members": MEMBERS})
        set_determinism(seed * learner.nets + i)
        peer = learner.build(config)
        loader = config.get_parsed_content("train#dataloader")
        training = Training(peer, loader, options.seconds / learner.nets, shaped["learning_rate"])
        words = [name, *shaped.values(), i]
        file = " ".join(f"{word:g}" if isinstance(word, float) else str(word) for word in words)
        made.append(Part(peer, training, options.work_dir / f"{file}.pt", config))
    return made


def drawing(method: Method, some: Sequence[Part]) -> tuple[Callable[[Tensor], Tensor], list[nn.Module], int]:
    """Return what takes images to members (batch, members * classes, *field), the networks, and all iterations."""
    trained = [finish(part.training, part.file) for part in some]
    networks, config = [network for network, _ in trained], some[0].config
    iterations = sum(count for _, count in trained)
    if method.members is None:
        return (lambda image: some[0].peer.segment(networks[0], image)), networks, iterations
    inferer = EnsembleInferer(method.members(networks, config), config["roi_size"])
    return (lambda image: inferer(image, networks[0])), networks, iterations


@dataclass(frozen=True)
class Lessons:
    """What a method has learnt from cases that were held out.

    Attributes:
        calibrate: takes probabilities (classes, *spatial) to calibrated ones.
        grading: see :func:`medsegdiff_monai.grading.grade`.
    """

    calibrate: Callable[[Tensor], Tensor]
    grading: Tensor


def fit_temperature(counts: Tensor) -> Tensor:
    """Temperature of each class that gives held-out voxels the least negative log-likelihood (arXiv 1706.04599).

    Args:
        counts: voxels, and those that are foreground, in each bin of the logit, (2, classes, bins), see
            :class:`medsegdiff_monai.grading.ReliabilityCounts`.
    """
    logit = torch.linspace(-MAX_LOGIT, MAX_LOGIT, CALIBRATION_BINS + 1, dtype=torch.float64)

    def fit(n: Tensor, positive: Tensor) -> float:
        def loss(log_temperature: float) -> float:
            scaled = logit / torch.tensor(log_temperature, dtype=torch.float64).exp()
            return float((n * nn.functional.softplus(scaled) - positive * scaled).sum())

        return float(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)

    return torch.tensor([fit(*both) for both in counts.transpose(0, 1)], dtype=torch.float64).exp()


def learn(cases: Iterable[Case], config: ConfigParser, own: bool) -> Lessons:
    """Fit calibration and expected Dice on cases that were held out.

    Args:
        cases: with members and labels.
        config: of the method.
        own: whether probabilities are calibrated as the bundle does, or else by temperatures.
    """
    classes = config["num_classes"]
    counts, seen = ReliabilityCounts(classes), []
    for case in cases:
        mean, votes, mask, truth = observed(case)
        counts.add(mean, truth)
        seen.append((mean, votes, mask, truth))
    if own:
        record = TrainingRecord(config["spatial_dims"], config["in_channels"], classes)
        record.reliability.copy_(counts.table())

        def calibrate(mean: Tensor) -> Tensor:
            return record(mean[None])[0]
    else:
        temperature = fit_temperature(counts.counts)

        def calibrate(mean: Tensor) -> Tensor:
            return (clipped_logit(mean) / temperature.float().view(-1, *[1] * (mean.ndim - 1))).sigmoid()

    pairs = [(members_agreement(v, calibrate(p), m), dice_of(m, y)) for p, v, m, y in seen]
    fits = [fit_grading([float(a[k]) for a, _ in pairs], [float(d[k]) for _, d in pairs]) for k in range(classes)]
    return Lessons(calibrate, torch.tensor(fits, dtype=torch.float64))


def observed(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of the members, their masks, the fused mask and the label, all on the grid of the input."""
    mean, votes, mask, truth = (torch.as_tensor(case.output[key]) for key in ("mean", "member_masks", "mask", "label"))
    plain = [x.as_subclass(Tensor) for x in (mean, votes, mask, truth)]
    return plain[0], plain[1], plain[2] > 0.5, plain[3] > 0.5


def dice_of(mask: Tensor, truth: Tensor) -> Tensor:
    """Dice of each class, (classes,); two empty masks have 1."""
    return compute_dice(mask[None], truth[None], ignore_empty=False)[0].double()


@dataclass
class Scored:
    """A scored case: what the results keep of it, and the voxels in the band of each class.

    Attributes:
        row: means over the classes.
        bands: of each class probability and truth, (2, voxels).
    """

    row: dict[str, Any]
    bands: list[Tensor]


def score(case: Case, lessons: Lessons) -> Scored:
    """Score a case by what its method says of it, and by its label."""
    mean, votes, mask, truth = observed(case)
    probability = lessons.calibrate(mean)
    entropy = binary_entropy(probability)
    agreement = members_agreement(votes, probability, mask)
    band = boundary_band(mask, truth, BAND)
    values = {
        "dice": dice_of(mask, truth),
        "expected_dice": grade(agreement, lessons.grading).expected,
        "pairwise_dice": agreement if len(votes) > 1 else torch.tensor([torch.nan]),
        "ece_band": expected_calibration_error(probability, truth, where=band),
        "ece_band_before": expected_calibration_error(mean, truth, where=band),
        "auroc": error_auroc(entropy, mask != truth, band),
    }
    row = {name: round(float(value.nanmean()), 5) for name, value in values.items()}
    row |= {"case": case.item["case"], "entropy": round(float(entropy.amax(0).mean()), 7), "seconds": case.seconds}
    return Scored(row, [torch.stack([p[b], y[b].float()]) for p, y, b in zip(probability, truth, band)])


CONFIDENCE = {  # how sure a method is of a case, in three ways
    "expected": lambda row: row["expected_dice"],
    "pairwise": lambda row: row["pairwise_dice"],
    "entropy": lambda row: -row["entropy"],
}


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """What all cases say together, and each by itself."""
    rows = [one.row for one in scored]
    true = [row["dice"] for row in rows]
    found: dict[str, Any] = {"dice": statistics.mean(true)}
    for name, confidence in CONFIDENCE.items():
        grading = Grading(name, [row["case"] for row in rows], [confidence(row) for row in rows], true)
        found |= {f"aurc_{name}": grading.aurc, f"e_aurc_{name}": grading.excess_aurc}
        if name == "expected":
            found |= {"spearman": grading.correlation, "error": grading.error}
    for name in ("ece_band", "ece_band_before", "auroc"):
        found[name] = float(torch.tensor([row[name] for row in rows]).nanmean())
    pooled = [torch.cat(bands, 1)[:, None] for bands in zip(*(one.bands for one in scored))]
    found["ece_band_pooled"] = float(torch.stack([expected_calibration_error(*both) for both in pooled]).mean())
    found = {name: round(value, 5) for name, value in found.items()}
    columns = [name for name in rows[0] if name != "seconds"]
    seconds = round(statistics.median(row["seconds"] for row in rows), 4)
    return {**found, "seconds_per_image": seconds, "cases": {name: [row[name] for row in rows] for name in columns}}


def run(
    data: str, name: str, seed: int, some: Sequence[Part], lists: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Score a trained method; returns the line of the results file."""
    method = METHODS[name]
    draw, networks, iterations = drawing(method, some)

    def cases(split: str) -> Iterator[Case]:
        return segment(configure("evaluate", data, lists, seed, {"eval_split": split}), draw)

    lessons = learn(cases("validation"), some[0].config, method.learner == "ours")
    scored, members = [], 0
    for case in cases("test"):
        members = len(case.members)
        scored.append(score(case, lessons))
    how = {
        "members": members,
        "iterations": iterations,
        "parameters_m": round(sum(map(parameters, networks)), 4),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "date": datetime.date.today().isoformat(),
    }
    return {**key(data, name, seed, options), **how, **summarise(scored)}


def key(data: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What tells one run from another."""
    return {"method": name, **shaped_by(data, METHODS[name].learner, seed, options)}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data", nargs="+", choices=SETS, default=[name for name in SETS if "3D" not in name])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=120, help="CPU time of each training")
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "results" / "uncertainty.md")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, append it to the results, and write them down."""
    options = arguments()
    torch.set_num_threads(1)
    for seed in options.seeds:  # all sets get a first figure before any gets a second
        for data in options.data:
            todo = [m for m in options.methods if not is_known(options.results, key(data, m, seed, options))]
            if not todo:
                continue
            lists = write_lists(data, seed, options)
            learners = dict.fromkeys(METHODS[name].learner for name in todo)
            made = {name: parts(data, name, seed, lists, options) for name in learners}
            train_in_turns({p.file: p.training for some in made.values() for p in some if not p.file.is_file()})
            for name in todo:
                append(options.results, run(data, name, seed, made[METHODS[name].learner], lists, options))
    write(options.results, list(METHODS), options.page)


if __name__ == "__main__":
    main()

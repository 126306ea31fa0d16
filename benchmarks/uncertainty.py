"""Can one act on the uncertainty? Ours beside other ways to be unsure, trained for equally long on the same cases.

``python -m benchmarks.uncertainty --data_root DIR`` trains, for each data set and seed, our network, MONAI's ``UNet``,
the same with dropout, and five of it with a fifth of the time each, in turns (see ``benchmarks.peers``). Scores are of
cases that none of them has seen, and whatever is fitted - our calibration, the temperature of the others, the guess of
each case's Dice - is fitted on training cases that were held out. A line for each run is appended to
``benchmarks/uncertainty.jsonl``; runs that are there are not repeated. ``benchmarks/results/uncertainty.md`` is written
from what is there. Weights stay in ``--work_dir``, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import monai
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from medsegdiff_monai import __version__
from medsegdiff_monai.data.datalist import hold_out
from medsegdiff_monai.data.entries import read_data_list
from medsegdiff_monai.ensembles import Dropout, EnsembleInferer, Flips, Networks
from medsegdiff_monai.files import write_atomically
from medsegdiff_monai.fusion import binary_entropy
from medsegdiff_monai.grading import ReliabilityCounts, fit_grading, grade, members_agreement
from medsegdiff_monai.networks.record import TrainingRecord, clipped_logit
from medsegdiff_monai.report.statistics import Grading

from .accuracy import CHOSEN, ROOT, SETS, append, calibration, configure, is_known, segment
from .forward import parameters
from .opponents import dropout_unet
from .peers import UNET_LEARNING_RATE, Peer, Training, finish, ours, start, train_in_turns, unet
from .uncertainty_page import OUR_SCORE, OURS, write

RESULTS = ROOT / "benchmarks" / "uncertainty.jsonl"
PAGE = ROOT / "benchmarks" / "results" / "uncertainty.md"
WORK = ROOT / "benchmarks" / "work" / "uncertainty"
MEMBERS = 16  # of what can draw any number
NAMES = ("LGG_MRI", "DRISHTI_roi", "TG3K_thyroid", "Hippocampus3D")

Run = Callable[[Tensor], Tensor]  # an image (1, channels, *field) to members (1, members * classes, *field)
Trained = Sequence[tuple[Peer, nn.Module]]


@dataclass(frozen=True)
class Method:
    """What is trained, and the ways to be unsure that it is used in.

    Attributes:
        build: makes a network.
        uses: by name, what makes members of the trained networks, under a config.
        nets: networks that are trained, in an equal part of the time each.
    """

    build: Callable[[ConfigParser], Peer]
    uses: Mapping[str, Callable[[Trained, ConfigParser], Run]]
    nets: int = 1


def _ours(trained: Trained, config: ConfigParser) -> Run:
    ((peer, module),) = trained
    return partial(peer.segment, module)


def _ensemble(members: Any, trained: Trained, config: ConfigParser) -> Run:
    inferer = EnsembleInferer(members, config.get_parsed_content("field_size"))
    return partial(inferer, network=trained[0][1])


def _networks(trained: Trained, config: ConfigParser) -> Run:
    return _ensemble(Networks([module for _, module in trained]), trained, config)


def _flips(trained: Trained, config: ConfigParser) -> Run:
    return _ensemble(Flips(config["flip_axes"]), trained, config)  # those along which training flips


def _all_flips(trained: Trained, config: ConfigParser) -> Run:
    return _ensemble(Flips(range(config["spatial_dims"])), trained, config)


def _dropout(trained: Trained, config: ConfigParser) -> Run:
    return _ensemble(Dropout(MEMBERS), trained, config)


def _dropout_unet(parser: ConfigParser) -> Peer:
    return replace(dropout_unet(parser), learning_rate=UNET_LEARNING_RATE)


METHODS = {
    OURS: Method(ours, {OURS: _ours}),
    "UNet": Method(unet, {"UNet": _networks, "UNet, flips": _flips, "UNet, all flips": _all_flips}),
    "UNet, dropout": Method(_dropout_unet, {"UNet, MC dropout": _dropout}),
    "five UNets": Method(unet, {"five UNets": _networks}, nets=5),
}


def save_lists(folder: Path, lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write ``dataset.json`` with cases as :meth:`medsegdiff_monai.data.entries.Entry.item` has them, by split."""
    keys = {"image": "image", "label": "label", "raters": "labels", "group": "patient"}
    content = {
        split: [{keys[key]: value for key, value in item.items()} for item in items] for split, items in lists.items()
    }
    write_atomically(folder / "dataset.json", json.dumps(content, indent=1).encode())


def read_lists(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cases of a data set to train on, and those to score: of a list for validation where it has one, else test."""
    listed = read_data_list(folder)
    scored = listed.of("validation") or listed.of("test")
    return [entry.item() for entry in listed.of("training")], [entry.item() for entry in scored]


def write_lists(data: str, seed: int, options: argparse.Namespace) -> Path:
    """Write ``dataset.json`` anew: cases to train on, ``validation`` held out of them, and as ``test`` what is scored.

    Returns:
        The folder that holds the data set's folder, see :func:`benchmarks.accuracy.configure`.
    """
    training, scored = read_lists(options.data_root / data)
    kept, held = hold_out(training, seed)
    root = options.work_dir / "lists" / str(seed)
    save_lists(root / data, {"training": kept, "validation": held, "test": scored})
    return root


@dataclass
class Part:
    """A network of a method, its training, and the file of its weights."""

    peer: Peer
    training: Training
    file: Path


@lru_cache(maxsize=1)
def checked(data: str, seed: int, root: Path) -> dict[str, list[dict[str, Any]]]:
    """The cases to train and to validate with, checked once for all networks."""
    splits = configure("train", data, root, seed).get_parsed_content("splits")
    return {name: splits[name] for name in ("training", "validation")}


@lru_cache(maxsize=2)
def to_score(data: str, seed: int, root: Path, split: str) -> ConfigParser:
    """Return ``evaluate.json`` for a list of a data set, checked once for all methods."""
    return configure("evaluate", data, root, seed, {"eval_split": split})


def to_train(data: str, seed: int, options: argparse.Namespace) -> ConfigParser:
    """Return ``train.json`` for a data set."""
    return configure("train", data, options.data_root, seed, {"num_members": MEMBERS})


def learning_rate(data: str, name: str, config: ConfigParser) -> float:
    """At the start: of a U-Net the one that was chosen on held-out cases, where it was (``accuracy.CHOSEN``).

    It was chosen for a single U-Net, which has the whole time.
    """
    chosen = CHOSEN.get((data, "MONAI UNet")) if "UNet" in name and METHODS[name].nets == 1 else None
    return chosen or METHODS[name].build(config).learning_rate or config["learning_rate"]


def parts(data: str, name: str, seed: int, options: argparse.Namespace) -> list[Part]:
    """Return the networks of a method, not yet trained."""
    method, made = METHODS[name], []
    root = write_lists(data, seed, options)
    for i in range(method.nets):
        config = to_train(data, seed * method.nets + i, options)
        config["splits"] = checked(data, seed, root)
        rate = learning_rate(data, name, config)
        peer, training = start(method.build, config, options.seconds / method.nets, rate)
        words = [*key(data, name, seed, training.lr, options).values(), i]
        made.append(Part(peer, training, options.work_dir / f"{' '.join(map(str, words))}.pt"))
    return made


@dataclass
class Seen:
    """What a method says of a case, on the grid of the input.

    Attributes:
        name: of the case.
        mean: probability, (classes, *spatial).
        mask: boolean (classes, *spatial).
        truth: boolean (classes, *spatial).
        agreement: mean Dice over pairs of masks, (classes,); None where there is one mask.
        masks: their number.
        seconds: CPU time.
    """

    name: str
    mean: Tensor
    mask: Tensor
    truth: Tensor
    agreement: Tensor | None
    masks: int
    seconds: float

    @property
    def dice(self) -> Tensor:
        """Of each class."""
        return compute_dice(self.mask[None].float(), self.truth[None].float(), ignore_empty=False)[0]


def look(config: ConfigParser, run: Run) -> list[Seen]:
    """Segment the cases of an ``evaluate.json`` as the bundle does, whatever makes the members."""
    found = []
    for case in segment(config, run):
        mask, truth = (masks[0] > 0.5 for masks in case.masks)
        mean, members = case.output["mean"].as_tensor(), case.output["member_masks"]
        agreement = members_agreement(members, mean, mask) if len(members) > 1 else None
        found.append(Seen(case.item["case"], mean, mask, truth, agreement, len(members), case.seconds))
    return found


def fit_temperature(probabilities: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """Temperature by which logits are divided, for the least negative log-likelihood (arXiv 1706.04599).

    Args:
        probabilities: of a class in each case.
        truths: boolean, of the same shapes.
    """
    logits = torch.cat([clipped_logit(p).flatten() for p in probabilities])
    y = torch.cat([t.flatten() for t in truths]).float()

    def loss(log_temperature: float) -> float:
        return float(F.binary_cross_entropy_with_logits(logits / 2.0**log_temperature, y))

    return float(2.0 ** minimize_scalar(loss, bounds=(-4, 6), method="bounded", options={"xatol": 0.01}).x)


def calibrator(held: Sequence[Seen], is_ours: bool) -> tuple[Callable[[Tensor], Tensor], list[float]]:
    """Fit what makes calibrated probabilities of a mean (classes, *spatial): our table, or a temperature per class.

    Returns:
        The function, and the temperatures; none for ours.
    """
    classes = len(held[0].mean)
    if is_ours:
        counts = ReliabilityCounts(classes)
        for one in held:
            counts.add(one.mean, one.truth)
        record = TrainingRecord(held[0].mean.ndim - 1, 1, classes)
        record.reliability.copy_(counts.table())
        return lambda mean: record(mean[None])[0], []
    found = [fit_temperature([o.mean[k] for o in held], [o.truth[k] for o in held]) for k in range(classes)]
    temperature = torch.tensor(found)
    return lambda mean: (clipped_logit(mean) / temperature.view(-1, *[1] * (mean.ndim - 1))).sigmoid(), found


def guesses(one: Seen, calibrate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What may tell the Dice of each class, (classes,): agreement of members, or of the mask with a probability."""
    single = one.mask[None]  # of which the agreement is that with the probability
    found = {
        "soft Dice": members_agreement(single, one.mean, one.mask),
        "soft Dice, calibrated": members_agreement(single, calibrate(one.mean), one.mask),
    }
    return found if one.agreement is None else found | {OUR_SCORE: one.agreement}


def entropies(one: Seen) -> dict[str, Tensor]:
    """How certain a case is by its entropy, (classes,), the larger the surer: over the image, and by mask size."""
    total = binary_entropy(one.mean).flatten(1).sum(1)
    size = one.mask.flatten(1).sum(1)
    return {"entropy": -total / one.mean[0].numel(), "entropy by size": -total / size.clamp(min=1)}


def confidence(held: Sequence[Seen], seen: Sequence[Seen], calibrate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All scores of confidence, (cases, classes); those that guess a Dice are fitted to it on the held-out cases."""
    known, asked = ([guesses(one, calibrate) for one in some] for some in (held, seen))
    dice = torch.stack([one.dice for one in held])
    found = {}
    for name in known[0]:
        table = torch.stack([row[name] for row in known])
        fits = torch.tensor([fit_grading(table[:, k].tolist(), dice[:, k].tolist()) for k in range(dice.shape[1])])
        found[name] = torch.stack([grade(row[name], fits).expected for row in asked])
    plain = [entropies(one) for one in seen]
    return found | {name: torch.stack([row[name] for row in plain]) for name in plain[0]}


def voxels(seen: Sequence[Seen], calibrate: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Calibration and AUROC near the contours: means over cases and classes that have a value."""
    rows: dict[str, list[float]] = {}
    for one in seen:
        plain = calibration(one.mean, one.mask, one.truth)
        fitted = calibration(calibrate(one.mean), one.mask, one.truth)
        more = {f"{name}_calibrated": fitted[name] for name in ("ece", "ece_band")}
        for name, values in {**plain, **more}.items():
            rows.setdefault(name, []).extend(values)
    return {name: round(float(torch.tensor(values).nanmean()), 5) for name, values in rows.items()}


def score(held: Sequence[Seen], seen: Sequence[Seen], is_ours: bool) -> dict[str, Any]:
    """Score what a method says of cases, with what is fitted on others.

    Args:
        held: to fit on.
        seen: to score.
        is_ours: whether probabilities are calibrated as the bundle does, or by a temperature.
    """
    calibrate, temperatures = calibrator(held, is_ours)
    dice = torch.stack([one.dice for one in seen]).double().mean(1).tolist()
    names = [one.name for one in seen]
    scores, of_cases = {}, {"case": names, "dice": [round(value, 4) for value in dice]}
    for name, table in confidence(held, seen, calibrate).items():
        sure = table.double().mean(1).tolist()
        found = Grading(name, names, sure, dice)
        scores[name] = {"aurc": found.aurc, "e_aurc": found.excess_aurc, "spearman": found.correlation}
        if not name.startswith("entropy"):  # which is no guess of a Dice
            scores[name]["error"] = found.error
        of_cases[name] = [float(f"{value:.5g}") for value in sure]
    return {
        "cases": len(seen),
        "held_out": len(held),
        "masks": seen[0].masks,
        "dice": round(statistics.mean(dice), 5),
        **voxels(seen, calibrate),
        **({"temperatures": [round(value, 3) for value in temperatures]} if temperatures else {}),
        "scores": {name: {key: round(value, 5) for key, value in row.items()} for name, row in scores.items()},
        "of_cases": of_cases,
        "seconds_per_image": round(statistics.median(one.seconds for one in seen), 4),
    }


def key(data: str, name: str, seed: int, learning_rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """What tells one run from another."""
    run = {"data": data, "method": name, "seed": seed, "seconds": options.seconds}
    lists = hashlib.sha256((options.data_root / data / "dataset.json").read_bytes()).hexdigest()[:12]
    return {**run, "learning_rate": learning_rate, "lists": lists, "version": __version__}


def scored_by(run: Mapping[str, Any], use: str, config: ConfigParser) -> dict[str, Any]:
    """The key of a line: of the training, and for ours along which axes members see the image flipped."""
    return {**run, "method": use, **({"flip_axes": config["flip_axes"]} if use == OURS else {})}


def missing(data: str, name: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether a line of a method is not in the results file."""
    config = to_train(data, seed, options)
    run = key(data, name, seed, learning_rate(data, name, config), options)
    return not all(is_known(options.results, scored_by(run, use, config)) for use in METHODS[name].uses)


def runs(data: str, name: str, seed: int, some: list[Part], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Score what has been trained in each of its uses; yields the missing lines of the results file."""
    finished = [finish(part.training, part.file) for part in some]
    trained = [(part.peer, module) for part, (module, _) in zip(some, finished)]
    root = write_lists(data, seed, options)
    for use, members in METHODS[name].uses.items():
        config = to_train(data, seed, options)
        known = scored_by(key(data, name, seed, some[0].training.lr, options), use, config)
        if is_known(options.results, known):
            continue
        torch.manual_seed(seed)
        run = members(trained, config)
        held, seen = (
            look(configure("evaluate", data, root, seed, {"eval_split": split}), run)
            for split in ("validation", "test")
        )
        yield {
            **known,
            "iterations": sum(count for _, count in finished),
            "parameters_m": round(sum(parameters(module) for _, module in trained), 4),
            "torch": torch.__version__,
            "monai": monai.__version__,
            "date": datetime.date.today().isoformat(),
            **score(held, seen, use == OURS),
        }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=180, help="CPU time of the training of each method")
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, append it to the results, and write them down."""
    options = arguments()
    torch.set_num_threads(1)
    for seed in options.seeds:  # all sets get a first figure before any gets a second
        for data in options.sets:
            some = {name: parts(data, name, seed, options) for name in METHODS if missing(data, name, seed, options)}
            train_in_turns({p.file: p.training for p in chain.from_iterable(some.values()) if not p.file.is_file()})
            for name, made in some.items():
                for row in runs(data, name, seed, made, options):
                    append(options.results, row)
    write(options.results, options.page)


if __name__ == "__main__":
    main()

"""What validations show besides their score."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.metrics import compute_dice
from torch import Tensor

from ..cases import distinct_members, raters_of, read_source
from ..files import write_atomically
from ..inferers import DRAWN_TOGETHER
from ..metrics import generalised_energy_distance, known_part
from ..pictures import error_map, overlay_bytes
from ..transforms import Regions

__all__ = ["ClassMetrics", "CollapseWarning", "EnergyDistance", "SaturationWarning", "ValidationPictures"]

logger = logging.getLogger(__name__)

CAUSES = {
    "background": "The network has not found them yet, or they are rare or small in what it sees. While the loss "
    "falls, train on; else set --learning_rate lower, or a roi_size that shows more of them.",
    "foreground": "Usually the weights have run away, or the images do not have the intensities that the network "
    "expects. Set --learning_rate lower, and check intensity_range against the images.",
}


class ClassMetrics:
    """Give the values of a metric per class names of their own, as progress, tables and trackers show single numbers.

    Attach to the validator (:mod:`.order`). (MONAI's ``DiceMetric(return_with_label=...)`` rounds to four digits.)

    Args:
        metric: such as ``val_dice_per_class``, which becomes ``val_dice_<class>``.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
    """

    def __init__(self, metric: str, num_classes: int, regions: Mapping[str, Sequence[int]] | None = None) -> None:
        self.metric = metric
        self.names = Regions(num_classes, regions).names

    def attach(self, engine: Engine) -> None:
        """Attach to a validator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Replace the metric by one for each class."""
        values = torch.as_tensor(engine.state.metrics.pop(self.metric)).reshape(-1).tolist()
        prefix = self.metric.removesuffix("_per_class")
        engine.state.metrics.update({f"{prefix}_{name}": value for name, value in zip(self.names, values)})


class SaturationWarning:
    """Warn, in words, where every mask of a validation is all background or all foreground, and the labels are not.

    Args:
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
    """

    def __init__(self, num_classes: int, regions: Mapping[str, Sequence[int]] | None = None) -> None:
        self.names = Regions(num_classes, regions).names
        self._counts = torch.zeros(3, num_classes, dtype=torch.float64)

    def attach(self, engine: Engine) -> None:
        """Attach to a validator."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: self._counts.zero_())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _count(self, engine: Engine) -> None:
        outputs: Any = engine.state.output
        for output in outputs:
            known = (known.flatten(1) for known in known_part(output["label"], output["mask"]))
            label, mask = (one.sum(1, dtype=torch.float64).cpu() for one in known)
            self._counts += torch.stack([mask, label, torch.full_like(mask, output["mask"][0].numel())])

    def __call__(self, engine: Engine) -> None:
        """Log the warning; all ranks together have seen the whole split."""
        total: Any = idist.all_reduce(self._counts.clone())
        mask, label, everything = total
        for kind, extreme in (("background", torch.zeros_like(mask)), ("foreground", everything)):
            stuck = [name for name, s in zip(self.names, (mask == extreme) & (label != extreme)) if s]
            if stuck and idist.get_rank() == 0:
                logger.warning(
                    f"Epoch {engine.state.epoch}: every validation mask of {', '.join(stuck)} is all {kind}, "
                    f"the labels are not. {CAUSES[kind]}"
                )


class CollapseWarning:
    """Warn, in words, where a validation has less than half of the best score of this run.

    Sets of masks can end a training that went well: all masks follow the noise, whatever the image, or are empty. The
    loss shows little of that, since such masks differ. Where members come closer to several raters than before, the
    mask alone has become worse, which is no collapse.

    Args:
        metric: of the validation, the higher the better; nothing is compared where it is missing, or has never been as
            high as :attr:`LEAST`.
        distance: metric of members and raters, the lower the better, where there is one.
    """

    LEAST = 0.2

    def __init__(self, metric: str = "val_mean_dice", distance: str = "val_ged") -> None:
        self.metric, self.distance = metric, distance
        self.best = (0.0, 0)  # and its epoch
        self.nearest = math.inf

    def attach(self, engine: Engine) -> None:
        """Attach to a validator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compare with the best one before; all ranks have the same score."""
        state: Any = engine.state
        score, (best, epoch) = float(state.metrics.get(self.metric, math.nan)), self.best
        distance = float(state.metrics.get(self.distance, math.inf))
        if best >= self.LEAST and score < best / 2 and distance >= self.nearest and idist.get_rank() == 0:
            logger.warning(
                f"Epoch {state.epoch}: {self.metric} fell from {best:.3f} in epoch {epoch} to {score:.3f}: the "
                "training has collapsed. Unless it recovers, train anew with a lower --learning_rate, such as half of "
                "it; --objective mask does not collapse in this way, but its members hardly differ."
            )
        self.best, self.nearest = max(self.best, (score, state.epoch)), min(self.nearest, distance)


class EnergyDistance:
    """Add the generalised energy distance of members and raters to the metrics: whether members differ as experts do.

    The mean over classes, then over the cases that have ``raters``; there is no such metric where no case does, or with
    fewer than five members. Attach to the validator (:mod:`.order`).

    Args:
        name: of the metric (:func:`medsegdiff_monai.metrics.generalised_energy_distance`, the smaller the better).
    """

    def __init__(self, name: str = "val_ged") -> None:
        self.name = name
        self._sum = torch.zeros(2, dtype=torch.float64)  # of the distances, and the number of cases

    def attach(self, engine: Engine) -> None:
        """Attach to a validator."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: self._sum.zero_())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _add(self, engine: Engine) -> None:
        state: Any = engine.state
        for item, output in zip(state.batch, state.output):
            raters, members = raters_of(item, output), output["member_masks"]
            if raters is not None and len(members) > DRAWN_TOGETHER:
                _, members, raters = known_part(output["label"], members, raters)
                pairs = zip(members.transpose(0, 1), raters.transpose(0, 1))  # class by class
                distance = np.mean([generalised_energy_distance(m, r, DRAWN_TOGETHER) for m, r in pairs])
                self._sum += torch.tensor([distance, 1.0], dtype=torch.float64)

    def __call__(self, engine: Engine) -> None:
        """Set the metric; all ranks together have seen the whole split."""
        total: Any = idist.all_reduce(self._sum.clone())
        if total[1] > 0:
            engine.state.metrics[self.name] = float(total[0] / total[1])


class ValidationPictures:
    """Write pictures of a few cases, the same at each validation: image, ground truth, prediction, errors and so on.

    The case's Dice stands above; false positives and false negatives have colours of their own.

    They are ``<output_dir>/validation/epoch_<N>/<case>.png``. Those of later epochs, from an earlier run, are removed.

    Args:
        output_dir: folder to write to.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
        number: how many cases, spread evenly over the split.
    """

    def __init__(
        self, output_dir: str, num_classes: int, regions: Mapping[str, Sequence[int]] | None = None, number: int = 4
    ) -> None:
        self.folder = Path(output_dir) / "validation"
        self.regions = Regions(num_classes, regions)
        self.number = number

    def attach(self, engine: Engine) -> None:
        """Attach to a validator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._remove_later)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    @idist.one_rank_only()
    def _remove_later(self, engine: Engine) -> None:
        for folder in self.folder.glob("epoch_*"):
            match = re.fullmatch(r"epoch_(\d+)", folder.name)
            if match and int(match[1]) >= engine.state.epoch:
                shutil.rmtree(folder)

    @idist.one_rank_only()
    def __call__(self, engine: Engine) -> None:
        """Write the pictures that are due."""
        state: Any = engine.state
        done = (state.iteration - 1) % state.epoch_length
        if done not in np.linspace(0, state.epoch_length - 1, self.number).round():
            return
        item, output = state.batch[0], state.output[0]
        _, image, affine = read_source(item)
        case = item.get("case", f"case_{done}")  # lists that others supply have no names
        picture = overlay_bytes(
            np.asarray(image),
            _array(output["pred"]),
            _array(output["uncertainty_entropy"]),
            _array(self.regions.label_map(output["label"])),
            affine,
            self.regions.legend,
            f"{case}   epoch {state.epoch}   Dice: {self._dice(output)}",
            distinct_members(output, self.regions),
            error_map(output["mask"], output["label"]),
        )
        write_atomically(self.folder / f"epoch_{state.epoch:03d}" / f"{case}.png", picture)

    def _dice(self, output: Mapping[str, Tensor]) -> str:
        """The Dice of each class, as in the tables."""
        label, mask = known_part(output["label"], output["mask"])
        values = compute_dice(mask[None], label[None], ignore_empty=False)[0].tolist()
        return ", ".join(f"{name} {value:.3f}" for name, value in zip(self.regions.names, values))


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.cpu())

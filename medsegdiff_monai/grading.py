"""Grades of a segmented case that need no label: calibrated probability, expected Dice, and reasons to look at it.

Everything here works on members from anywhere: several networks, dropout, or samples of one network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import isotonic_regression, minimize
from torch import Tensor

from .fusion import CHUNK, mean_pairwise_dice
from .metrics import mask_sizes
from .networks.record import CALIBRATION_BINS, MAX_LOGIT, TrainingRecord, clipped_logit

__all__ = [
    "CaseFacts",
    "Grade",
    "ReliabilityCounts",
    "fit_grading",
    "grade",
    "measure",
    "members_agreement",
    "reasons_to_look",
    "training_range",
]

CONFIDENCE = 0.9  # of the interval of the expected Dice
MIN_CASES = 10  # below which residuals say nothing of an interval of that confidence
DISAGREEMENT = 0.7  # an expected Dice below this is a reason to look
CONSTANT = 1e-6  # spread of an image by its mean, up to which it shows nothing
MARGIN = 0.25  # by which a case may leave the range of the training, as a share of it


def members_agreement(member_masks: Tensor, probability: Tensor, mask: Tensor) -> Tensor:
    """How far the members agree on each class: the mean Dice over their pairs.

    It estimates the Dice of a member with the truth, if the truth is as likely to be one member as another. A single
    member has no pairs; its Dice with its own probability, ``2 sum pm / (sum p + sum m)``, stands for it.

    Args:
        member_masks: boolean (members, classes, *spatial).
        probability: mean of the members, (classes, *spatial).
        mask: boolean or {0, 1} (classes, *spatial).

    Returns:
        (classes,), float64, in [0, 1]; empty masks agree.
    """
    if len(member_masks) > 1:
        return mean_pairwise_dice(member_masks)
    p, m = (x.flatten(1).cpu().double() for x in (probability, mask))
    total = (p + m).sum(1)
    return torch.where(total > 0, 2 * (p * m).sum(1) / total.clamp(min=1e-12), 1.0)


@dataclass(frozen=True)
class Grade:
    """The Dice that a mask is expected to have with the truth, each (classes,), float64.

    Attributes:
        expected: best guess.
        low: lower end of a 90 % interval; NaN where the training had too few validation cases, or none.
        high: upper end.
    """

    expected: Tensor
    low: Tensor
    high: Tensor


def _logit(dice: Tensor) -> Tensor:
    return torch.logit(dice.double().clamp(0.005, 0.995))  # cases that are wholly right or wrong do not rule a fit


def grade(agreement: Tensor, grading: Tensor | None = None) -> Grade:
    """Turn the agreement of the members into the Dice to expect, by what validation cases of such agreement had.

    Args:
        agreement: (classes,), see :func:`members_agreement`.
        grading: ``TrainingRecord.grading``, (classes, 3); without it, or where it is 0, the agreement itself is
            expected, which is usually too much: members share the faults of their network.
    """
    if grading is None:
        grading = torch.zeros(len(agreement), 3)
    scale, shift, width = grading.cpu().double().unbind(1)
    width = torch.where(width > 0, width, torch.nan)
    centre = scale * _logit(agreement) + shift
    expected, low, high = (torch.sigmoid(centre + k * width) if k else torch.sigmoid(centre) for k in (0, -1, 1))
    return Grade(torch.where(scale > 0, expected, agreement.double()), low, high)


def fit_grading(agreement: Sequence[float], dice: Sequence[float]) -> tuple[float, float, float]:
    """Fit what takes agreement to Dice, by the least mean absolute error on cases with labels.

    The logit of the Dice is a linear, rising function of the logit of the agreement. The interval is that of split
    conformal prediction (Vovk et al., 2005), from the fit's own residuals in the logit.

    Args:
        agreement: of each case.
        dice: of the mask with the label.

    Returns:
        Scale, shift and half-width of the interval; all 0 below three cases, the last one below ``MIN_CASES``.
    """
    if len(dice) < 3:
        return 0.0, 0.0, 0.0
    x, wanted = _logit(torch.tensor(agreement)).numpy(), np.asarray(dice, dtype=np.float64)

    def error(parameters: np.ndarray) -> float:
        found = 1 / (1 + np.exp(-(math.exp(parameters[0]) * x + parameters[1])))
        # smooth near zero, and a little drawn to the identity, which few cases do not overrule
        return float(np.sqrt((found - wanted) ** 2 + 1e-4).mean() + 0.02 * (parameters**2).sum() / len(x))

    best = minimize(error, np.zeros(2), method="L-BFGS-B", bounds=[(-2.3, 2.3), (-8, 8)]).x
    scale, shift = math.exp(best[0]), float(best[1])
    residuals = np.sort(np.abs(_logit(torch.tensor(wanted)).numpy() - (scale * x + shift)))
    rank = math.ceil(CONFIDENCE * (len(x) + 1))
    return scale, shift, float(residuals[rank - 1]) if len(x) >= MIN_CASES else 0.0


class ReliabilityCounts:
    """Count how often voxels of each probability are foreground, for ``TrainingRecord.reliability``.

    Args:
        num_classes: number of foreground classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(2, num_classes, CALIBRATION_BINS + 1, dtype=torch.float64)  # voxels, foreground

    def add(self, probability: Tensor, truth: Tensor, where: Tensor | None = None) -> None:
        """Count the voxels of a case.

        Args:
            probability: (classes, *spatial), such as the mean of the members.
            truth: (classes, *spatial), 0 or 1; of several raters the share that have the class.
            where: boolean (classes, *spatial), the voxels that count; by default all.
        """
        for k, (p, y) in enumerate(zip(probability.cpu(), truth.cpu())):
            inside = torch.ones_like(p, dtype=torch.bool) if where is None else where[k].cpu()
            self._count(k, p[inside], y[inside])

    def _count(self, k: int, probability: Tensor, truth: Tensor) -> None:
        position = (clipped_logit(probability) / MAX_LOGIT + 1) * (CALIBRATION_BINS / 2)
        bins = position.round().long()
        self.counts[0, k] += torch.bincount(bins, minlength=CALIBRATION_BINS + 1)
        self.counts[1, k] += torch.bincount(bins, weights=truth.double(), minlength=CALIBRATION_BINS + 1)

    def table(self) -> Tensor:
        """Frequencies that do not fall as the probability rises, by isotonic regression (Zadrozny and Elkan, 2002).

        Returns:
            (classes, ``CALIBRATION_BINS`` + 1), float64; 0 for a class of which nothing was counted.
        """
        return torch.stack([self._rising(n, positive) for n, positive in zip(*self.counts)])

    @staticmethod
    def _rising(n: Tensor, positive: Tensor) -> Tensor:
        seen = n > 0
        if not seen.any() or not positive.any():
            return torch.zeros_like(n)
        fitted = isotonic_regression((positive / n)[seen].numpy(), weights=n[seen].numpy()).x
        places = torch.arange(len(n))
        return torch.from_numpy(np.interp(places.numpy(), places[seen].numpy(), fitted))


@dataclass(frozen=True)
class CaseFacts:
    """What is compared with the training's cases.

    Attributes:
        extent: of the image, (spatial_dims,), mm, or pixels without spacing.
        intensity: mean and standard deviation of each channel, (2, channels).
        size: volume of each class, (classes,), mm^3 (mm^2, pixels).
    """

    extent: Tensor
    intensity: Tensor
    size: Tensor

    def to_json(self) -> str:
        """Return the facts as text, which data lists and loaders carry along unchanged."""
        return json.dumps([self.extent.tolist(), self.intensity.tolist(), self.size.tolist()])

    @classmethod
    def from_json(cls, text: str) -> CaseFacts:
        """Read what :meth:`to_json` wrote."""
        return cls(*(torch.tensor(values, dtype=torch.float64) for values in json.loads(text)))


def _mean(field: Tensor, function: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
    """Mean of a function of the values of each channel, (channels,), float64, without a copy of the field."""
    parts = field.flatten(1).split(CHUNK, 1)
    return torch.stack([function(part.double()).sum(1) for part in parts]).sum(0) / field[0].numel()


def measure(image: Tensor, spacing: Sequence[float], masks: Tensor) -> CaseFacts:
    """Measure a case on its own grid.

    Args:
        image: as stored, (channels, *spatial).
        spacing: of the voxels, (spatial_dims,); ones where the file has none.
        masks: {0, 1}, (classes, *spatial).
    """
    step = torch.as_tensor(list(spacing), dtype=torch.float64)
    mean = _mean(image)
    return CaseFacts(
        torch.tensor(image.shape[1:], dtype=torch.float64) * step,
        torch.stack([mean, _mean(image, lambda part: (part - mean[:, None]).square()).sqrt()]).cpu(),
        mask_sizes(masks[None])[0] * step.prod(),
    )


def training_range(values: Sequence[Tensor]) -> Tensor:
    """Least and greatest of what cases have, (2, ...), float64.

    Zeros, such as sizes of empty masks, do not count; where there is nothing else, both are 0.
    """
    table = torch.stack(list(values))
    low = torch.where(table == 0, torch.inf, table).amin(0)
    return torch.stack([torch.where(low.isinf(), 0.0, low), torch.where(low.isinf(), 0.0, table.amax(0))])


def _outside(value: float, low: float, high: float) -> bool:
    """Whether a value is clearly beyond a range; never where the range is not known."""
    if low == high == 0:
        return False
    margin = MARGIN * max(high - low, abs(low), abs(high))
    return value < low - margin or value > high + margin


def _touches_every_border(mask: Tensor) -> bool:
    return all(bool(mask.select(axis, end).any()) for axis in range(mask.ndim) for end in (0, -1))


def reasons_to_look(
    names: Sequence[str],
    graded: Grade,
    masks: Tensor,
    facts: CaseFacts,
    unit: str,
    record: TrainingRecord | None = None,
) -> list[str]:
    """Say in words why a person should look at a case: the column ``flag``.

    Args:
        names: of the classes.
        graded: see :func:`grade`.
        masks: what is written, {0, 1}, (classes, *spatial).
        facts: of the case.
        unit: of lengths, ``mm`` or ``px``.
        record: what the training saw; without it only the masks themselves are looked at.
    """
    found = []
    power = masks.ndim - 1
    for k, (name, expected) in enumerate(zip(names, graded.expected.tolist())):
        if expected < DISAGREEMENT:
            found.append(f"low expected Dice of {name} ({expected:.2f})")
        if not masks[k].any():
            found.append(f"{name} is empty")
            continue
        if _touches_every_border(masks[k]):
            found.append(f"{name} touches every border")
        seen = None if record is None else record.size[:, k]
        found += _beyond(f"size of {name}", facts.size[k], seen, f"{unit}^{power}")
    if record is not None:
        mean, spread = facts.intensity
        if (spread <= CONSTANT * mean.abs()).all():
            found.append("the image has the same value everywhere")
        for axis, (extent, seen) in enumerate(zip(facts.extent, record.extent.T), start=1):
            found += _beyond(f"extent of the image along axis {axis}", extent, seen, unit)
        for channel in range(facts.intensity.shape[1]):
            which = f" of channel {channel + 1}" if facts.intensity.shape[1] > 1 else ""
            for what, value, seen in zip(
                ("mean", "spread"), facts.intensity[:, channel], record.intensity[..., channel].T
            ):
                found += _beyond(f"{what} intensity{which}", value, seen, "")
    return found


def _beyond(what: str, value: Tensor, seen: Tensor | None, unit: str) -> list[str]:
    if seen is None or not _outside(float(value), *map(float, seen)):
        return []
    low, high = (f"{float(x):.4g}" for x in seen)
    return [f"{what} {float(value):.4g} {unit}".strip() + f" (training: {low} to {high})"]

"""The row that a segmented case has in ``cases.csv``, in parts: grades, sizes, uncertainty, scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from torch import Tensor
from torch.nn import functional as F

from .cleanup import clean
from .grading import Grade
from .metrics import boundary_band, expected_calibration_error, known_part, mask_sizes, rater_scores

__all__ = [
    "BAND",
    "SURFACE_TOLERANCE",
    "Case",
    "cleanup_row",
    "grade_row",
    "near_contours",
    "score_row",
    "size_row",
    "uncertainty_row",
]

BAND = 3  # voxels on both sides of the contours, where a probability is right or wrong
SURFACE_TOLERANCE = 1.0  # mm, or pixels
LEAST = 2.0**-23  # a probability that float32 tells from 0 and from 1

Row = dict[str, float | str]


@dataclass(frozen=True)
class Case:
    """A segmented case.

    Attributes:
        names: of the classes.
        mask: {0, 1}, (classes, *spatial).
        probability: as it is written, (classes, *spatial).
        member_masks: boolean (members, classes, *spatial).
        spacing: of the voxels, (spatial_dims,); ones where ``unit`` is ``px``.
        unit: ``mm``, or ``px`` where the file has no spacing.
    """

    names: Sequence[str]
    mask: Tensor
    probability: Tensor
    member_masks: Tensor
    spacing: Sequence[float]
    unit: str = "mm"


def _number(value: float, digits: int = 6) -> float | str:
    return "" if math.isnan(value) else round(float(value), digits)


def grade_row(names: Sequence[str], graded: Grade, reasons: Sequence[str]) -> Row:
    """``flag``, ``expected_dice``, and with the ends of its interval for each class.

    Args:
        names: of the classes.
        graded: see :func:`medsegdiff_monai.grading.grade`.
        reasons: see :func:`medsegdiff_monai.grading.reasons_to_look`.
    """
    row: Row = {"flag": "; ".join(reasons), "expected_dice": _number(float(graded.expected.mean()))}
    for key, values in (("", graded.expected), ("_low", graded.low), ("_high", graded.high)):
        row |= {f"expected_dice{key}_{name}": _number(float(value)) for name, value in zip(names, values)}
    return row


def size_row(case: Case) -> Row:
    """Size of each class, and its standard deviation over the members where there are several.

    The column says what is measured: ``volume_mm3_<class>``, ``area_mm2_<class>`` or ``area_px_<class>``.
    """
    dims = case.mask.ndim - 1
    column = f"{'area' if dims == 2 else 'volume'}_{case.unit}{dims if case.unit == 'mm' else ''}"
    unit = float(np.prod(case.spacing))
    row: Row = {f"{column}_{n}": _short(float(m.sum()) * unit) for n, m in zip(case.names, case.mask)}
    if len(case.member_masks) > 1:
        spread = mask_sizes(case.member_masks).std(0) * unit
        row |= {f"{column}_std_{n}": _short(float(s)) for n, s in zip(case.names, spread)}
    return row


def _short(size: float) -> float:
    """Nine digits: voxels may measure a micrometre or a centimetre."""
    return float(f"{size:.9g}")


def uncertainty_row(entropy: Tensor, mutual_information: Tensor) -> Row:
    """Means over the voxels of the image, in bits; they grow with the size of an object, whether it is right or not.

    Args:
        entropy: (1, *spatial).
        mutual_information: (1, *spatial).
    """
    return {
        "entropy_bits_per_voxel": _number(float(entropy.mean())),
        "mutual_information_bits_per_voxel": _number(float(mutual_information.mean())),
    }


def score_row(
    case: Case,
    label: Tensor,
    raters: Tensor | None = None,
    drawn_together: int = 1,
    tolerance: float = SURFACE_TOLERANCE,
) -> dict[str, float]:
    """Compare a case with its label; of several raters, probabilities with all of them.

    For each class: ``dice``, ``iou``, ``hd95`` and ``nsd`` (surfaces, in the case's unit), ``ece`` of all voxels, and
    ``ece_band``, ``brier`` and ``nll`` of the voxels within ``BAND`` of the contours of mask or label. A class that
    both lack is right: Dice, IoU and NSD are 1 and the distance 0. Where only one lacks it, the distance is infinite.

    Args:
        case: the case.
        label: {0, 1}, (classes, *spatial), NaN where nobody has labelled.
        raters: boolean (raters, classes, *spatial), where there are several.
        drawn_together: members in a row that are not independent of each other.
        tolerance: distance between surfaces up to which NSD counts them as equal, in the case's unit.

    Returns:
        ``<score>_<class>``, and with raters :func:`medsegdiff_monai.metrics.rater_scores` too.
    """
    parts = (case.mask, case.probability, case.member_masks)
    truth, mask, probability, members, *rated = known_part(label, *parts, *([] if raters is None else [raters]))
    wanted = rated[0].double().mean(0) if rated else truth
    scores: dict[str, Sequence[float] | Tensor] = {
        "dice": compute_dice(mask[None], truth[None], ignore_empty=False)[0],
        "iou": compute_iou(mask[None], truth[None], ignore_empty=False)[0],
        **_surfaces(case, label, tolerance),
        "ece": expected_calibration_error(probability, wanted),
        **_in_band(case, label, label if raters is None else raters.double().mean(0)),
    }
    row = {f"{key}_{name}": float(v) for key, values in scores.items() for name, v in zip(case.names, values)}
    if rated:
        endings = [f"_{name}" for name in case.names] if len(case.names) > 1 else [""]
        found = rater_scores(members, rated[0], drawn_together)
        row |= {f"{key}{ending}": v for key, values in found.items() for ending, v in zip(endings, values)}
    return {key: round(value, 6) for key, value in row.items()}


def cleanup_row(case: Case, before: Tensor | None = None, label: Tensor | None = None) -> Row:
    """Say what a clean-up of the mask has changed, or else what keeping the largest component alone would change.

    After a clean-up ``removed_voxels_<class>``, and with a label ``uncleaned_dice_<class>``; without one
    ``beside_largest_voxels_<class>`` and ``largest_component_dice_<class>``.

    Args:
        case: the case.
        before: its mask before the clean-up, {0, 1}, (classes, *spatial); None where there was none.
        label: {0, 1}, (classes, *spatial), NaN where nobody has labelled.
    """
    other = clean(case.mask, largest_component=True) if before is None else before
    voxels, dice = ("beside_largest", "largest_component") if before is None else ("removed", "uncleaned")
    counts = mask_sizes((torch.as_tensor(other).cpu() != case.mask.cpu())[None])[0].long().tolist()
    row: Row = {f"{voxels}_voxels_{name}": count for name, count in zip(case.names, counts)}
    if label is not None:
        truth, mask = known_part(label, other)
        scores = compute_dice(mask[None], truth[None], ignore_empty=False)[0].tolist()
        row |= {f"{dice}_dice_{name}": round(score, 6) for name, score in zip(case.names, scores)}
    return row


def _surfaces(case: Case, label: Tensor, tolerance: float) -> dict[str, list[float]]:
    """95th percentile of the distances between surfaces, and the share of the surfaces within a tolerance."""
    known = ~label[0].isnan()
    found: dict[str, list[float]] = {"hd95": [], "nsd": []}
    for mask, truth in zip((case.mask > 0) & known, (label > 0) & known):
        if not (mask.any() and truth.any()):
            same = not mask.any() and not truth.any()
            found["hd95"].append(0.0 if same else math.inf)
            found["nsd"].append(float(same))
            continue
        pair, spacing = (mask[None, None], truth[None, None]), [float(step) for step in case.spacing]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that it passes itself
            distance = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
            share = compute_surface_dice(*pair, [tolerance], include_background=True, spacing=spacing)
        found["hd95"].append(float(distance))
        found["nsd"].append(float(share))
    return found


def _in_band(case: Case, label: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Calibration near the contours, where it is decided: ECE, Brier score and negative log likelihood (nats)."""
    box, band = near_contours(case.mask, label)
    p, y = case.probability[box].cpu().double(), wanted[box].cpu().double().nan_to_num()
    brier, nll = [], []
    for inside, prob, truth in zip(band, p, y):
        brier.append((prob[inside] - truth[inside]).square().mean())
        nll.append(F.binary_cross_entropy(prob[inside].clamp(LEAST, 1 - LEAST), truth[inside]))
    return {
        "ece_band": expected_calibration_error(p, y, where=band),
        "brier": torch.stack(brier),
        "nll": torch.stack(nll),
    }


def near_contours(mask: Tensor, label: Tensor) -> tuple[tuple[slice, ...], Tensor]:
    """The voxels within ``BAND`` of the contours of mask or label.

    Args:
        mask: {0, 1}, (classes, *spatial).
        label: the same, NaN where nobody has labelled: such voxels are left out.

    Returns:
        A box of (classes, *spatial) that has all of them, and which voxels of it they are, boolean, on the CPU.
    """
    known = ~label[0].isnan()
    masks = [(mask > 0) & known, (label > 0) & known]
    box = (slice(None), *_box(masks[0] | masks[1], BAND + 1))
    return box, boundary_band(masks[0][box], masks[1][box], BAND) & known[box[1:]].cpu()


def _box(masks: Tensor, margin: int) -> tuple[slice, ...]:
    """Bounding box of all masks (classes, *spatial) with a margin; what lies outside of it is far from all contours."""
    places = masks.any(0).nonzero()
    if not len(places):
        return tuple(slice(0, 1) for _ in masks.shape[1:])
    low, high = (places.amin(0) - margin).clamp(min=0), places.amax(0) + margin + 1
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high))

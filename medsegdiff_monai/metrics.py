"""Calibration, and agreement of an ensemble with several raters."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = [
    "expected_calibration_error",
    "generalised_energy_distance",
    "hungarian_matched_iou",
    "iou_matrix",
    "nested_masks",
]


def expected_calibration_error(probability: Tensor, truth: Tensor, num_bins: int = 20) -> Tensor:
    """Mean distance between probability and frequency, weighted by the voxels of each bin (arXiv 1706.04599).

    In float64: MONAI's metric counts in float32, which ends at 2^24 voxels of a bin.

    Args:
        probability: (classes, *spatial), 0 to 1.
        truth: (classes, *spatial), 0 or 1.
        num_bins: bins of equal width.

    Returns:
        (classes,), float64, on the CPU.
    """
    errors = []
    for p, y in zip(probability.cpu().flatten(1).double(), truth.cpu().flatten(1).double()):
        bins = (p * num_bins).long().clamp(max=num_bins - 1)
        # of each bin, count * |mean probability - frequency|
        errors.append(torch.bincount(bins, weights=p - y, minlength=num_bins).abs().sum() / len(p))
    return torch.stack(errors)


def nested_masks(agreement: Tensor, num_raters: int) -> Tensor:
    """Turn a map of the number of raters that agree into masks, one for each least number.

    Where individual raters are not published, these masks stand for them: they have the raters' number and their
    agreement at every voxel, but are nested, which the raters' own need not be.

    Args:
        agreement: (*spatial), 0 to ``num_raters``.
        num_raters: number of raters.

    Returns:
        Boolean (num_raters, *spatial): agreement of at least 1, 2, ...
    """
    return torch.stack([agreement >= n for n in range(1, num_raters + 1)])


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each mask in ``a`` with each in ``b``; two empty masks have 1.

    Args:
        a: boolean (m, *spatial).
        b: boolean (n, *spatial).

    Returns:
        (m, n), float64, on the CPU.
    """
    a, b = a.cpu().flatten(1).double(), b.cpu().flatten(1).double()
    common = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)


def generalised_energy_distance(members: Tensor, raters: Tensor) -> float:
    """Squared generalised energy distance with 1 - IoU (Kohl et al., arXiv 1806.05034, equation 3).

    ``2 E d(S, Y) - E d(S, S') - E d(Y, Y')``, over all pairs, each with itself too.

    Args:
        members: boolean (members, *spatial), S.
        raters: boolean (raters, *spatial), Y.

    Returns:
        0 where both have the same distribution; the smaller the better.
    """
    across, within, between = (
        1 - iou_matrix(a, b).mean() for a, b in ((members, raters), (members, members), (raters, raters))
    )
    return float(2 * across - within - between)


def hungarian_matched_iou(members: Tensor, raters: Tensor) -> float:
    """Mean IoU of members and raters under the best one-to-one match (Kohl et al., arXiv 1905.13077, appendix B).

    Both sets are repeated to their least common multiple first.

    Args:
        members: boolean (members, *spatial).
        raters: boolean (raters, *spatial).

    Returns:
        In [0, 1]; the larger the better.
    """
    scores = iou_matrix(members, raters)
    common = math.lcm(*scores.shape)
    scores = scores.repeat_interleave(common // scores.shape[0], 0).repeat_interleave(common // scores.shape[1], 1)
    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return float(scores[rows, columns].mean())

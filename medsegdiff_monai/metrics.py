"""Calibration, errors that uncertainty tells of, and agreement of an ensemble with several raters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

__all__ = [
    "RATER_SCORES",
    "best_iou_per_rater",
    "boundary_band",
    "common_voxels",
    "error_auroc",
    "expected_calibration_error",
    "generalised_energy_distance",
    "hungarian_matched_iou",
    "iou_matrix",
    "known_part",
    "mask_sizes",
    "masks_and_labels",
    "nested_masks",
    "rater_scores",
    "variance_ncc",
]


def known_part(label: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Take what nobody has labelled out of a case before it is scored.

    Args:
        label: masks (classes, *spatial), NaN there.
        *others: (..., *spatial).

    Returns:
        All of them as they are where everything is labelled, else (..., voxels).
    """
    known = ~torch.as_tensor(label[0]).isnan()
    if known.all():
        return label, *others
    return tuple(torch.as_tensor(x)[..., known.to(x.device)] for x in (label, *others))


def masks_and_labels(outputs: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """What a metric of MONAI compares, from the output of an evaluator: ``mask`` and ``label`` where it is known."""
    pairs = [known_part(output["label"], output["mask"]) for output in outputs]
    return [mask for _, mask in pairs], [label for label, _ in pairs]


PART = 2**20  # voxels that are counted in float32 at a time, which is exact up to 2^24


def expected_calibration_error(
    probability: Tensor, truth: Tensor, num_bins: int = 20, where: Tensor | None = None
) -> Tensor:
    """Mean distance between probability and frequency, weighted by the voxels of each bin (arXiv 1706.04599).

    In float64: MONAI's metric counts in float32, which ends at 2^24 voxels of a bin.

    Args:
        probability: (classes, *spatial), 0 to 1.
        truth: (classes, *spatial), 0 or 1; of several raters the share that have the class.
        num_bins: bins of equal width.
        where: boolean (classes, *spatial), the voxels that count, such as a :func:`boundary_band`; by default all.

    Returns:
        (classes,), float64, on the CPU; NaN where no voxel counts.
    """
    where = torch.ones_like(truth, dtype=torch.bool) if where is None else where
    errors = []
    for values, wanted, some in zip(probability.cpu(), truth.cpu(), where.cpu()):
        p, y = values[some].double(), wanted[some].double()
        bins = (p * num_bins).long().clamp(max=num_bins - 1)
        # of each bin, count * |mean probability - frequency|
        errors.append(torch.bincount(bins, weights=p - y, minlength=num_bins).abs().sum() / len(p))
    return torch.stack(errors)


def boundary_band(a: Tensor, b: Tensor, width: float = 3) -> Tensor:
    """Voxels near the contour of either of two masks, on both sides of it.

    Where a probability is right or wrong is decided there; what is far from all contours is mostly certain, and would
    flatter a score.

    Args:
        a: boolean (classes, *spatial).
        b: boolean, same shape.
        width: distance in voxels to the nearest voxel on the other side of the contour, at most.

    Returns:
        Boolean (classes, *spatial), on the CPU. A mask that is empty or full has no contour.
    """
    return torch.stack([_near_contour(x, width) | _near_contour(y, width) for x, y in zip(a.cpu(), b.cpu())])


def _near_contour(mask: Tensor, width: float) -> Tensor:
    if not mask.any() or mask.all():
        return torch.zeros_like(mask)
    inside, outside = (distance_transform_edt(side.numpy()) for side in (mask, ~mask))
    return torch.from_numpy(inside + outside <= width)  # one of them is 0


def error_auroc(uncertainty: Tensor, wrong: Tensor, where: Tensor) -> Tensor:
    """Area under the ROC curve by which uncertainty tells wrong voxels from right ones.

    It is the probability that a wrong voxel is more uncertain than a right one; ties count half.

    Args:
        uncertainty: (classes, *spatial).
        wrong: boolean (classes, *spatial).
        where: boolean (classes, *spatial), the voxels that count, such as a :func:`boundary_band`.

    Returns:
        (classes,), float64; NaN where all voxels are right, or all wrong.
    """
    areas = []
    for values, errors, some in zip(uncertainty.cpu(), wrong.cpu(), where.cpu()):
        ranks, bad = torch.from_numpy(rankdata(values[some].numpy())), errors[some]
        n, rest = int(bad.sum()), int((~bad).sum())
        areas.append((float(ranks[bad].sum()) - n * (n + 1) / 2) / (n * rest) if n and rest else math.nan)
    return torch.tensor(areas, dtype=torch.float64)


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


def common_voxels(a: Tensor, b: Tensor) -> Tensor:
    """Number of voxels that each mask in ``a`` shares with each in ``b``.

    Args:
        a: boolean (m, *spatial).
        b: boolean (n, *spatial).

    Returns:
        (m, n), float64, on the CPU.
    """
    parts = zip(a.flatten(1).split(PART, 1), b.flatten(1).to(a.device).split(PART, 1))
    return torch.stack([_common_voxels(x, y) for x, y in parts]).sum(0)


def _common_voxels(a: Tensor, b: Tensor) -> Tensor:
    """The same of a part, (m, voxels) and (n, voxels), in which float32 counts exactly."""
    used = a.any(0) & b.any(0)  # most voxels are background: what follows is done without them
    return (a[:, used].float() @ b[:, used].float().T).cpu().double()


def mask_sizes(masks: Tensor) -> Tensor:
    """Number of voxels of each mask (members, classes, *spatial): (members, classes), float64, on the CPU."""
    # one by one: along an axis, torch makes 64 bits of each voxel first
    counts = [int(mask.count_nonzero()) for mask in masks.flatten(0, 1)]
    return torch.tensor(counts, dtype=torch.float64).reshape(masks.shape[:2])


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each mask in ``a`` with each in ``b``; two empty masks have 1.

    Args:
        a: boolean (m, *spatial).
        b: boolean (n, *spatial).

    Returns:
        (m, n), float64, on the CPU.
    """
    common = common_voxels(a, b)
    sizes = [masks.flatten(1).sum(1).cpu().double() for masks in (a, b)]
    union = sizes[0][:, None] + sizes[1] - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0)


def generalised_energy_distance(members: Tensor, raters: Tensor, drawn_together: int = 1) -> float:
    """Squared generalised energy distance with d = 1 - IoU (Kohl et al., arXiv 1806.05034, equation 3), unbiased.

    ``2 E d(S, Y) - E d(S, S') - E d(Y, Y')``. The raters are the reference: all pairs of them count, each with itself
    too. The members are a sample: only pairs that were drawn independently count, so that the expectation does not
    depend on the number of such groups. With a member's distance to itself, as the paper averages, a perfect sampler
    would be charged for its spread, and one that repeats itself rewarded.

    Args:
        members: boolean (members, *spatial), S.
        raters: boolean (raters, *spatial), Y.
        drawn_together: members in a row that are not independent of each other.

    Returns:
        The smaller the better; 0 in expectation where members are drawn from the raters, so that single cases may be
        below. NaN where no two members are independent.
    """
    across, between = (1 - iou_matrix(masks, raters).mean() for masks in (members, raters))
    group = torch.arange(len(members)) // drawn_together
    within = (1 - iou_matrix(members, members))[group[:, None] != group].mean()
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


def best_iou_per_rater(members: Tensor, raters: Tensor) -> float:
    """Mean over raters of the best IoU that any member has with them (D_max: whether each opinion is met by a member).

    Args:
        members: boolean (members, *spatial).
        raters: boolean (raters, *spatial).

    Returns:
        In [0, 1]; the larger the better. It grows with the number of members.
    """
    return float(iou_matrix(members, raters).amax(0).mean())


def variance_ncc(members: Tensor, raters: Tensor) -> float:
    """Normalised cross-correlation of the members' variance with the raters', voxel by voxel.

    Where a share p of the masks has a voxel, their variance there is p (1 - p). PHiSeg (arXiv 1906.04045) compares maps
    of cross-entropy so.

    Args:
        members: boolean (members, *spatial).
        raters: boolean (raters, *spatial).

    Returns:
        In [-1, 1]; the larger the better. 0 where the members' variance is the same everywhere, such as with one
        member; NaN where the raters' is, such as 0 where they agree.
    """
    # n^2 p (1 - p), in whole numbers: a map that is constant is exactly so
    counts = [(masks.flatten(1).sum(0), len(masks)) for masks in (members, raters)]
    found, wanted = ((have * (n - have)).cpu().double() for have, n in counts)
    if wanted.min() == wanted.max():
        return math.nan
    if found.min() == found.max():
        return 0.0
    found, wanted = found - found.mean(), wanted - wanted.mean()
    return float((found * wanted).sum() / (found.norm() * wanted.norm()))


RATER_SCORES = ("ged", "matched_iou", "best_iou", "ncc")


def rater_scores(members: Tensor, raters: Tensor, drawn_together: int = 1) -> dict[str, list[float]]:
    """All that this module says of members and raters, for each class.

    Args:
        members: boolean (members, classes, *spatial).
        raters: boolean (raters, classes, *spatial).
        drawn_together: see :func:`generalised_energy_distance`.

    Returns:
        ``ged``, ``matched_iou``, ``best_iou`` and ``ncc``, a value for each class.
    """
    distance = partial(generalised_energy_distance, drawn_together=drawn_together)
    scores: tuple[Callable[[Tensor, Tensor], float], ...] = (
        distance, hungarian_matched_iou, best_iou_per_rater, variance_ncc
    )  # fmt: skip
    classes = list(zip(members.transpose(0, 1), raters.transpose(0, 1)))
    return {name: [score(*masks) for masks in classes] for name, score in zip(RATER_SCORES, scores)}

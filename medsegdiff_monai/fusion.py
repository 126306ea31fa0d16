"""Fusion of the members of an ensemble, and their uncertainty."""

from __future__ import annotations

import itk
import numpy as np
import torch
from torch import Tensor

from .errors import InputError

__all__ = [
    "FUSIONS",
    "binary_entropy",
    "check_fusion",
    "fuse_members",
    "mutual_information",
    "predictive_entropy",
    "staple",
]


MAX_ITERATIONS = 500  # masks that have something in common take about ten


def _disagreement_box(votes: np.ndarray) -> tuple[slice, ...] | None:
    """Bounding box of the voxels on which the members disagree; None where they agree everywhere."""
    split = np.argwhere(votes.any(0) & ~votes.all(0))
    if not len(split):
        return None
    return tuple(slice(low, high + 1) for low, high in zip(split.min(0), split.max(0)))


def staple(votes: np.ndarray) -> np.ndarray:
    """Estimate the hidden true mask from the members' masks by STAPLE (Warfield et al., IEEE TMI 23, 2004), with ITK.

    ITK's filter runs on the bounding box of the disagreement alone. Voxels on which all members agree keep their
    common vote: the estimate cannot improve on that, and ITK returns NaN where a class is absent or fills everything.

    Args:
        votes: boolean (members, *spatial), with 2 or 3 spatial axes.

    Returns:
        float32 probability of the foreground, (*spatial).
    """
    probability = np.asarray(votes.all(0), dtype=np.float32)
    box = _disagreement_box(votes)
    if box is None:
        return probability
    image_type = itk.Image[itk.F, votes.ndim - 1]
    stapler = itk.STAPLEImageFilter[image_type, image_type].New()
    stapler.SetForegroundValue(1.0)
    stapler.SetMaximumIterations(MAX_ITERATIONS)
    cropped = votes[(slice(None), *box)]
    for i, vote in enumerate(cropped):
        stapler.SetInput(i, itk.image_from_array(np.ascontiguousarray(vote, dtype=np.float32)))
    stapler.Update()
    split = cropped.any(0) & ~cropped.all(0)
    # ITK takes an array one voxel wide for one in the other memory order, and swaps its axes
    estimate = np.asarray(itk.array_from_image(stapler.GetOutput())).reshape(split.shape)
    probability[box][split] = estimate[split]
    return probability


def check_fusion(fusion: str) -> str:
    """Return ``fusion`` if it names a fusion.

    Raises:
        InputError: otherwise.
    """
    if fusion not in FUSIONS:
        raise InputError(f"fusion={fusion!r} must be one of {', '.join(FUSIONS)}.")
    return fusion


def _fuse_staple(members: Tensor) -> Tensor:
    votes = (members > 0.5).cpu().numpy()
    return torch.from_numpy(np.stack([staple(votes[:, k]) for k in range(votes.shape[1])])).to(members.device)


def _fuse_mean(members: Tensor) -> Tensor:
    return members.mean(0)


def _fuse_vote(members: Tensor) -> Tensor:
    return (members > 0.5).float().mean(0)


FUSIONS = {"staple": _fuse_staple, "mean": _fuse_mean, "vote": _fuse_vote}


def fuse_members(members: Tensor, fusion: str = "staple") -> Tensor:
    """Fuse the members' probabilities.

    Args:
        members: (members, classes, *spatial), probabilities.
        fusion: ``staple`` (of the masks, class by class), ``mean`` (of the probabilities) or ``vote`` (share of
            members whose mask has the class).

    Returns:
        Fused probability (classes, *spatial), float32.

    Raises:
        InputError: for another ``fusion``.
    """
    return FUSIONS[check_fusion(fusion)](members.float())


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy in bits of a binary variable with that probability."""
    return (torch.special.entr(probability) + torch.special.entr(1 - probability)) / np.log(2)


def predictive_entropy(members: Tensor) -> Tensor:
    """Entropy of the mean of the members, in bits: all uncertainty, of the data and among the members.

    Args:
        members: (members, classes, *spatial), probabilities.

    Returns:
        (*spatial) in [0, 1]: the entropy of the class that is least certain.
    """
    return binary_entropy(members.float().mean(0)).amax(0)


def mutual_information(members: Tensor) -> Tensor:
    """Entropy of the mean minus mean of the entropies, in bits: how far the members disagree.

    Args:
        members: (members, classes, *spatial), probabilities.

    Returns:
        (*spatial) in [0, 1], the largest over the classes; 0 where the members agree.
    """
    members = members.float()
    return (binary_entropy(members.mean(0)) - binary_entropy(members).mean(0)).clamp(min=0).amax(0)

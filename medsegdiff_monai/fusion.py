"""Fusion of the members of an ensemble, and their uncertainty."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import itk
import numpy as np
import torch
from torch import Tensor

from .errors import InputError

__all__ = ["FUSIONS", "MemberSummary", "binary_entropy", "check_fusion", "staple"]


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
    """Return ``fusion`` if it names a fusion, ready for use.

    Raises:
        InputError: otherwise.
    """
    if fusion not in FUSIONS:
        raise InputError(f"fusion={fusion!r} must be one of {', '.join(FUSIONS)}.")
    if fusion == "staple":
        staple(np.eye(2, dtype=bool)[:, None])  # ITK loads its modules on first use: not while a case is timed
    return fusion


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy in bits of a binary variable with that probability."""
    return (torch.special.entr(probability) + torch.special.entr(1 - probability)) / np.log(2)


class MemberSummary:
    """What fusion and uncertainty need of an ensemble's members, gathered as they arrive.

    Only the members' masks are kept, a byte a voxel and class; of their probabilities and entropies only the sums.

    Args:
        members: probabilities of each member, (classes, *spatial), on one device.

    Raises:
        InputError: where there are no members.
    """

    def __init__(self, members: Iterable[Tensor]) -> None:
        votes: list[Tensor] = []
        for member in members:
            member = member.float()
            if not votes:
                self._probability, self._entropy = torch.zeros_like(member), torch.zeros_like(member)
            self._probability += member
            self._entropy += binary_entropy(member)
            votes.append(member > 0.5)
        if not votes:
            raise InputError("an ensemble without members cannot be fused: num_members must be at least 1.")
        self.votes = torch.stack(votes)  # (members, classes, *spatial)

    @property
    def mean(self) -> Tensor:
        """Mean of the members' probabilities, (classes, *spatial)."""
        return self._probability / len(self.votes)

    def fuse(self, fusion: str = "staple") -> Tensor:
        """Fuse the members.

        Args:
            fusion: ``staple`` (of the masks, class by class), ``mean`` (of the probabilities) or ``vote`` (share of
                members whose mask has the class).

        Returns:
            Fused probability (classes, *spatial), float32.
        """
        return FUSIONS[fusion](self)

    def predictive_entropy(self) -> Tensor:
        """Entropy of the members' mean, in bits: all uncertainty, of the data and among the members.

        Returns:
            (*spatial) in [0, 1]: the entropy of the class that is least certain.
        """
        return binary_entropy(self.mean).amax(0)

    def mutual_information(self) -> Tensor:
        """Entropy of the mean minus mean of the entropies, in bits: how far the members disagree.

        Returns:
            (*spatial) in [0, 1], the largest over the classes; 0 where the members agree.
        """
        return (binary_entropy(self.mean) - self._entropy / len(self.votes)).clamp(min=0).amax(0)

    def sizes(self) -> Tensor:
        """Number of voxels of each member's mask, (members, classes), float64."""
        return self.votes.flatten(2).sum(2).cpu().double()

    def pairwise_dice(self) -> Tensor:
        """Mean Dice over all pairs of members, (classes,), float64; two empty masks agree, one member gives NaN."""
        sizes = self.sizes()
        pairs = list(combinations(range(len(self.votes)), 2))
        scores = torch.full((len(pairs), sizes.shape[1]), float("nan"), dtype=torch.float64)
        for score, (a, b) in zip(scores, pairs):
            common = (self.votes[a] & self.votes[b]).flatten(1).sum(1).cpu()
            total = sizes[a] + sizes[b]
            score.copy_(torch.where(total > 0, 2 * common / total.clamp(min=1), 1.0))
        return scores.mean(0)


def _fuse_staple(members: MemberSummary) -> Tensor:
    votes = members.votes.cpu().numpy()
    fused = np.stack([staple(votes[:, k]) for k in range(votes.shape[1])])
    return torch.from_numpy(fused).to(members.votes.device)


def _fuse_mean(members: MemberSummary) -> Tensor:
    return members.mean


def _fuse_vote(members: MemberSummary) -> Tensor:
    return members.votes.float().mean(0)


FUSIONS = {"staple": _fuse_staple, "mean": _fuse_mean, "vote": _fuse_vote}

"""Fusion of the members of an ensemble, and their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial

import itk
import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .metrics import common_voxels, mask_sizes

__all__ = [
    "FUSIONS",
    "MemberSummary",
    "binary_entropy",
    "check_fusion",
    "dice_matrix",
    "expected_dice_threshold",
    "in_parts",
    "largest_entropy",
    "mean_pairwise_dice",
    "most_different",
    "staple",
]


MAX_ITERATIONS = 500  # of STAPLE; masks that have something in common take about ten
CHUNK = 2**22  # voxels for which intermediate results are in memory at a time
LEVELS = 1024  # thresholds that expected Dice tries; a power of two, so that float32 compares with them exactly


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
    return (torch.special.entr(1 - probability) + torch.special.entr(probability)) / np.log(2)


def in_parts(function: Callable[..., Tensor], *fields: Tensor) -> Tensor:
    """Apply what works voxel by voxel to a part of large fields at a time, so that its own fields stay small.

    Args:
        function: takes parts (classes, voxels) of the fields to (..., voxels).
        *fields: (classes, *spatial).

    Returns:
        (..., *spatial).
    """
    done, out = 0, torch.empty(0)
    for part in zip(*(_parts(field) for field in fields)):
        value = function(*part)
        if not done:
            out = value.new_empty(*value.shape[:-1], fields[0][0].numel())
        out[..., done : done + value.shape[-1]] = value
        done += value.shape[-1]
    return out.reshape(*out.shape[:-1], *fields[0].shape[1:])


def _parts(field: Tensor) -> Sequence[Tensor]:
    return field.flatten(1).split(CHUNK, 1)


def _above_half(probability: Tensor) -> Tensor:
    return probability > 0.5


def largest_entropy(probability: Tensor) -> Tensor:
    """Entropy in bits of the class that is least certain, (*spatial), of probabilities (classes, *spatial)."""
    return in_parts(lambda part: binary_entropy(part).amax(0), probability)


def _largest_information(mean: Tensor, entropy: Tensor) -> Tensor:
    return binary_entropy(mean).sub_(entropy).clamp_(min=0).amax(0)


def dice_matrix(masks: Tensor) -> Tensor:
    """Dice of each mask with each; two empty masks have 1.

    Args:
        masks: boolean (members, *spatial).

    Returns:
        (members, members), float64, on the CPU.
    """
    common = common_voxels(masks, masks)
    total = common.diag()[:, None] + common.diag()
    return torch.where(total > 0, 2 * common / total.clamp(min=1), 1.0)


def mean_pairwise_dice(masks: Tensor) -> Tensor:
    """Mean Dice over all pairs of members (members, classes, *spatial): (classes,), float64; NaN for one member."""
    n = len(masks)
    matrices = [dice_matrix(masks[:, k].contiguous()) for k in range(masks.shape[1])]
    return torch.stack([(m.sum() - m.trace()) / (n * (n - 1)) for m in matrices])


def most_different(masks: Tensor, number: int = 3) -> list[int]:
    """Choose the members that differ most: the pair of least Dice, then each time the one farthest from all chosen.

    Args:
        masks: boolean (members, classes, *spatial); the classes count together.
        number: how many to choose, where there are as many.

    Returns:
        Their numbers from 0, rising; none where there is one member only. Of equal ones the first are taken.
    """
    dice = dice_matrix(masks.flatten(1))
    if len(dice) < 2:
        return []
    dice.fill_diagonal_(torch.inf)  # no member is chosen twice
    chosen = [int(dice.amin(1).argmin())]
    while len(chosen) < min(number, len(dice)):
        chosen.append(int(dice[chosen].amax(0).argmin()))
    return sorted(chosen)


def expected_dice_threshold(mean: Tensor, votes: Tensor) -> float:
    """Find the threshold of the members' mean whose mask has the greatest mean Dice with the members' masks.

    That mask has the least Bayes risk, 1 - Dice, among those that a threshold gives, if the truth is as likely to be
    one member as another. Two empty masks have Dice 1. Of thresholds that are as good, the one nearest to one half is
    taken.

    Args:
        mean: probability (*spatial).
        votes: boolean (members, *spatial), on the same device.

    Returns:
        A multiple of 1 / 1024 in [0, 1]; values above it are in the mask, so that 1 makes it empty.
    """
    counts = torch.zeros(len(votes) + 1, LEVELS + 1, dtype=torch.long)  # of all voxels, and of each member's mask
    for part, voted in zip(mean.flatten().split(CHUNK), votes.flatten(1).split(CHUNK, 1)):
        level = (part * LEVELS).ceil().long()  # how many thresholds the value is above
        for count, levels in zip(counts, [level, *(level[vote] for vote in voted)]):
            count += torch.bincount(levels, minlength=LEVELS + 1).cpu()
    above = (counts.sum(1, keepdim=True) - counts.cumsum(1)).double()  # voxels in the mask of each threshold
    common, total = above[1:], above[0] + counts[1:].sum(1, keepdim=True).double()
    dice = torch.where(total > 0, 2 * common / total.clamp(min=1), 1.0).mean(0)
    best = torch.arange(LEVELS + 1)[dice > dice.max() - 1e-12] / LEVELS
    return float(best[(best - 0.5).abs().argmin()])


class MemberSummary:
    """What fusion and uncertainty need of an ensemble's members, gathered as they arrive.

    Args:
        members: probabilities of each member, (classes, *spatial), on one device.
        binarise: makes a member's masks of its probabilities, such as
            :meth:`medsegdiff_monai.transforms.Regions.binarise`; by default each class is cut at one half.

    Attributes:
        mean: of their probabilities, (classes, *spatial).

    Raises:
        InputError: where there are no members.
    """

    def __init__(self, members: Iterable[Tensor], binarise: Callable[[Tensor], Tensor] | None = None) -> None:
        self._votes: list[Tensor] = []
        for member in members:
            if not self._votes:
                sums = [torch.zeros(member.shape, device=member.device) for _ in range(2)]
            for probability, entropy, part in zip(*(_parts(field) for field in (*sums, member))):
                probability += part
                entropy += binary_entropy(part.float())
            self._votes.append(in_parts(binarise or _above_half, member))
            del member  # before the next one is made: a field of a large volume takes much memory
        if not self._votes:
            raise InputError("an ensemble without members cannot be fused: num_members must be at least 1.")
        self.mean, self._mean_entropy = (total.div_(len(self._votes)) for total in sums)

    @cached_property
    def votes(self) -> Tensor:
        """The members' masks, boolean (members, classes, *spatial), copied into one field on first use."""
        votes = torch.stack(self._votes)
        self._votes.clear()
        return votes

    @cached_property
    def _information(self) -> Tensor:
        information = in_parts(_largest_information, self.mean, self._mean_entropy)
        del self._mean_entropy
        return information

    def fuse(self, fusion: str = "expected_dice") -> Tensor:
        """Fuse the members.

        Args:
            fusion: ``staple`` (of the masks, class by class), ``mean`` (of the probabilities), ``vote`` (share of
                members whose mask has the class) or ``expected_dice`` (the mean, cut where the mean Dice of the mask
                with the members' is greatest, and rescaled so that this threshold becomes one half).

        Returns:
            A value in [0, 1] for each class, (classes, *spatial), float32: above one half the class is in the mask.
            :attr:`mean` is the probability.
        """
        return FUSIONS[fusion](self)

    def predictive_entropy(self) -> Tensor:
        """Entropy of the members' mean, in bits: all uncertainty, of the data and among the members.

        Returns:
            (*spatial) in [0, 1]: the entropy of the class that is least certain.
        """
        return largest_entropy(self.mean)

    def mutual_information(self) -> Tensor:
        """Entropy of the mean minus mean of the entropies, in bits: how far the members disagree.

        Returns:
            (*spatial) in [0, 1], the largest over the classes; 0 where the members agree.
        """
        return self._information

    def sizes(self) -> Tensor:
        """Number of voxels of each member's mask, (members, classes), float64."""
        return mask_sizes(self.votes)

    def pairwise_dice(self) -> Tensor:
        """Mean Dice over all pairs of members, (classes,), float64; two empty masks agree, one member gives NaN."""
        return mean_pairwise_dice(self.votes)


def _fuse_staple(members: MemberSummary) -> Tensor:
    votes = members.votes.cpu().numpy()
    fused = np.stack([staple(votes[:, k]) for k in range(votes.shape[1])])
    return torch.from_numpy(fused).to(members.votes.device)


def _fuse_mean(members: MemberSummary) -> Tensor:
    return members.mean


def _fuse_vote(members: MemberSummary) -> Tensor:
    return members.votes.float().mean(0)


def _fuse_expected_dice(members: MemberSummary) -> Tensor:
    pairs = zip(members.mean, members.votes.transpose(0, 1))
    found = torch.tensor([expected_dice_threshold(mean, votes) for mean, votes in pairs])
    return in_parts(partial(_moved_to_half, threshold=found.to(members.mean)[:, None]), members.mean)


def _moved_to_half(probability: Tensor, threshold: Tensor) -> Tensor:
    """Rescale probabilities (classes, voxels) so that the threshold of each becomes one half; their order stays."""
    below = 0.5 * probability / threshold.clamp(min=1 / LEVELS)
    above = 0.5 + 0.5 * (probability - threshold) / (1 - threshold).clamp(min=1 / LEVELS)
    half = torch.tensor(0.5, device=probability.device)
    above = above.maximum(half.nextafter(half + 1))  # what is just above the threshold is not rounded to one half
    return torch.where(probability > threshold, above, below.minimum(half))


FUSIONS = {"staple": _fuse_staple, "mean": _fuse_mean, "vote": _fuse_vote, "expected_dice": _fuse_expected_dice}

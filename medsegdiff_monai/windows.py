"""Windows over an image that is larger than the network's field, with members that keep their opinion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import prod
from typing import Any

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from .objective import soft_jaccard_distance

__all__ = ["MemberWindows", "best_match"]

PATIENCE = 5.0
LARGE = 2**28  # values of the members' probabilities: 1 GiB in single precision


def best_match(members: Tensor, reference: Tensor) -> Tensor:
    """Return the order of members in which they are most like the members of a reference, one to one.

    Args:
        members: probabilities (members, classes, *spatial).
        reference: same shape.

    Returns:
        Indices (members,) into ``members``: the mean over classes of the soft Jaccard distance is least.
    """
    distances = soft_jaccard_distance(reference[None].float(), members[None].float()).mean((0, 1))
    return torch.from_numpy(linear_sum_assignment(distances.cpu().numpy())[1])


def _piece(noise: Tensor, window: Sequence[Any]) -> Tensor:
    """What a window sees of an endless field that noise (members, classes, *roi) fills by repeating itself."""
    starts = [axis.start for axis in window[1:]]
    return noise.roll([-start for start in starts], tuple(range(2, 2 + len(starts))))


def _first_row(window: Sequence[Any]) -> int:
    return window[1].start


class _Slab:
    """The rows of a field that windows are being added to; those that no later window meets are done.

    Args:
        whole: where finished rows go, (batch, members, classes, *field).
        rows: how many a window has along the first axis.
        dtype: of the sums.
    """

    def __init__(self, whole: Tensor, rows: int, dtype: torch.dtype) -> None:
        self.whole = whole
        self.start = 0
        self.total = whole.new_zeros((*whole.shape[:3], rows, *whole.shape[4:]), dtype=dtype)
        self.weight = self.total.new_zeros(self.total.shape[3:])

    def move_to(self, start: int) -> None:
        """Finish the rows before ``start``."""
        done = min(start - self.start, len(self.weight))
        if not done:
            return
        mean = self.total[:, :, :, :done].div_(self.weight[:done])
        self.whole[:, :, :, self.start : self.start + done] = mean
        for sums, axis in ((self.total, 3), (self.weight, 0)):
            kept = sums.narrow(axis, done, sums.shape[axis] - done).clone()
            sums.zero_().narrow(axis, 0, kept.shape[axis]).copy_(kept)
        self.start = start

    def add(self, out: Tensor, importance: Tensor, window: Sequence[Any]) -> None:
        """Add members (batch, members, classes, *roi) of a window, in the order that agrees with what is there."""
        across = (..., slice(None), *window[2:])
        total, weight = self.total[across], self.weight[across]
        if weight.any():
            reference, here = total / weight.clamp(min=1e-6), out * (weight > 0)
            out = torch.stack([one[best_match(*pair)] for one, *pair in zip(out, here, reference)])
        total += importance * out
        weight += importance


class MemberWindows:
    """Segment a large image by overlapping windows, fused with Gaussian weights as in MONAI's sliding windows.

    The same noise under another crop can give another opinion, and a member would be a patchwork of them. So each
    window's members are put into the order that agrees best with what earlier windows have left where they overlap.
    That changes which member an opinion belongs to, and nothing else: the mean over members stays as it is.

    Sums are kept for the rows that windows are being added to, not for the whole image.

    Args:
        roi_size: size of a window.
        sw_batch_size: windows that are segmented at a time.
        overlap: share by which windows overlap.

    Attributes:
        shows_progress: whether there is a bar over the windows, with the time left, where a volume takes longer than
            ``PATIENCE`` seconds; by default not.
    """

    mode = "gaussian"
    shows_progress = False

    def __init__(self, roi_size: Sequence[int], sw_batch_size: int = 1, overlap: float = 0.5) -> None:
        self.roi_size = tuple(roi_size)
        self.sw_batch_size = sw_batch_size
        self.overlap = overlap

    def _windows(self, field: Sequence[int]) -> list[Any]:
        """Where the windows are, as indices of tensors (..., *field)."""
        strides = [max(1, int(size * (1 - self.overlap))) for size in self.roi_size]
        return [(..., *slices) for slices in dense_patch_slices(field, self.roi_size, strides)]

    def __call__(self, image: Tensor, noise: Tensor, segment: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Segment images.

        Args:
            image: (batch, channels, *field), at least as large as a window.
            noise: (members, classes, *roi); it repeats itself along the field, of which each window has its piece.
            segment: gives probabilities (n, members, classes, *roi) for crops (n, channels, *roi) of the image and the
                noise (n, members, classes, *roi) of each.

        Returns:
            Probabilities (batch, members, classes, *field); of more than ``LARGE`` values, in half precision.
        """
        importance = compute_importance_map(self.roi_size, mode=self.mode, device=image.device)
        shape = (len(image), *noise.shape[:2], *image.shape[2:])
        whole = noise.new_empty(shape, dtype=torch.float16 if prod(shape) > LARGE else noise.dtype)
        slab = _Slab(whole, self.roi_size[0], noise.dtype)
        windows = self._windows(image.shape[2:])
        batches = [
            rows[i : i + self.sw_batch_size]
            for rows in (list(same) for _, same in groupby(windows, key=_first_row))
            for i in range(0, len(rows), self.sw_batch_size)
        ]
        bar = {"leave": False, "delay": PATIENCE, "dynamic_ncols": True, "disable": not self.shows_progress}
        for some in tqdm(batches, desc="Windows", **bar):
            slab.move_to(_first_row(some[0]))
            crops = torch.cat([image[window] for window in some])
            pieces = torch.cat([_piece(noise, window).expand(len(image), *noise.shape) for window in some])
            for window, out in zip(some, segment(crops, pieces).split(len(image))):
                slab.add(out, importance, window)
        slab.move_to(image.shape[2])
        return whole

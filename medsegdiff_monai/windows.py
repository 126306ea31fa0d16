"""Windows over an image that is larger than the network's field, with members that keep their opinion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from .objective import soft_jaccard_distance

__all__ = ["MemberWindows", "best_match"]

PATIENCE = 5.0


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


class MemberWindows:
    """Segment a large image by overlapping windows, fused with Gaussian weights as in MONAI's sliding windows.

    The same noise under another crop can give another opinion, and a member would be a patchwork of them. So each
    window's members are put into the order that agrees best with what earlier windows have left where they overlap.
    That changes which member an opinion belongs to, and nothing else: the mean over members stays as it is.

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
            noise: (batch, members, classes, *field).
            segment: gives probabilities (n, members, classes, *roi) for crops (n, channels, *roi) of the image and of
                the noise (n, members, classes, *roi).

        Returns:
            Probabilities (batch, members, classes, *field).
        """
        importance = compute_importance_map(self.roi_size, mode=self.mode, device=image.device)
        total, weight = torch.zeros_like(noise), torch.zeros(image.shape[2:]).to(noise)
        windows = self._windows(image.shape[2:])
        batches = [windows[i : i + self.sw_batch_size] for i in range(0, len(windows), self.sw_batch_size)]
        bar = {"leave": False, "delay": PATIENCE, "dynamic_ncols": True, "disable": not self.shows_progress}
        for some in tqdm(batches, desc="Windows", **bar):
            crops = [torch.cat([x[window] for window in some]) for x in (image, noise)]
            for window, out in zip(some, segment(*crops).split(len(image))):
                before, known = total[window], weight[window]
                if known.any():
                    reference, here = before / known.clamp(min=1e-6), out * (known > 0)
                    out = torch.stack([one[best_match(*pair)] for one, *pair in zip(out, here, reference)])
                before += importance * out
                weight[window] += importance
        return total.div_(weight)

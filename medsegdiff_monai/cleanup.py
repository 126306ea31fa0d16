"""Clean-up of masks: only the largest component of a class, or only those of a certain size.

MONAI's ``KeepLargestConnectedComponent`` and ``RemoveSmallObjects`` need scikit-image, with whose version 0.26 the
latter also removes what has just the size that should stay.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from .data.reading import image_spacing
from .settings import as_bool
from .structures import label_components
from .transforms import Regions

__all__ = ["BEFORE", "CleanUpd", "clean"]

BEFORE = "mask_before_cleanup"


def clean(masks: Tensor, largest_component: bool = False, least_voxels: float = 0) -> Tensor:
    """Remove connected components (of 8 or 26 neighbours), each class by itself.

    Args:
        masks: boolean or {0, 1}, (classes, *spatial).
        largest_component: whether only the largest component of each class stays; of equal ones the first.
        least_voxels: components of fewer voxels are removed.

    Returns:
        The same shape and type, on the CPU.
    """
    return torch.stack([_clean(mask.cpu(), largest_component, least_voxels) for mask in masks])


def _clean(mask: Tensor, largest_component: bool, least_voxels: float) -> Tensor:
    components, sizes = label_components(mask.numpy() > 0)
    stays = sizes >= least_voxels
    if largest_component and len(sizes) > 2:
        stays &= np.arange(len(sizes)) == 1 + sizes[1:].argmax()
    return mask * torch.from_numpy(np.stack([stays[plane] for plane in components]))


class CleanUpd(MapTransform):
    """Clean the mask that is written, and nothing else: members, probability and grades stay as they are.

    Reads ``mask`` (classes, *spatial) and writes it anew, and the label map in ``keys``; what ``mask`` was stays as
    ``mask_before_cleanup``. Without anything to do, nothing is touched.

    Args:
        keys: the label map, on the grid of the input, usually ``pred``.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
        largest_component: whether only the largest component of each class stays.
        min_size: least size of a component that stays, in mm^3 (mm^2 in 2D), or pixels of pictures: the unit that
            sizes have in the tables.
        image_key: image that names the file.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
        largest_component: bool | str = False,
        min_size: float | None = None,
        image_key: str = "image",
    ) -> None:
        super().__init__(keys)
        self.regions = Regions(num_classes, regions)
        self.largest_component = as_bool(largest_component)
        self.min_size = min_size
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the clean mask."""
        d = dict(data)
        if not self.largest_component and self.min_size is None:
            return d
        for key in self.key_iterator(d):
            least = 0 if self.min_size is None else self.min_size / self._voxel(d, key)
            before = d["mask"]
            # a hair less, so that rounding of the spacing removes nothing of exactly that size
            plain = before.as_tensor() if isinstance(before, MetaTensor) else before
            masks = clean(plain, self.largest_component, least * (1 - 1e-6))
            label = self.regions.label_map(masks)
            d |= {BEFORE: before, "mask": _like(masks, before), key: _like(label, d[key])}
        return d

    def _voxel(self, data: Mapping[Hashable, Any], key: Hashable) -> float:
        """Size of a voxel of the input."""
        file = data[self.image_key].meta["filename_or_obj"]
        return float(np.prod(image_spacing(file, data[key])[0]))


def _like(values: Tensor, other: Tensor) -> Tensor:
    return MetaTensor(values).copy_meta_from(other) if isinstance(other, MetaTensor) else values

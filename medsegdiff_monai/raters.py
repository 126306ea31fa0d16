"""Several raters of a case: loading their label maps, drawing some to train on, and their consensus."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, Transform
from monai.utils import ensure_tuple
from torch import Tensor

from .data.rules import DataSpec, read_label
from .transforms import LabelsToRegionsd

__all__ = ["Consensusd", "DrawRatersd", "LoadRatersd", "RatersAsLabeld", "RatersToRegionsd", "most_raters"]


def most_raters(items: Sequence[Mapping[str, Any]]) -> int:
    """Return the largest number of raters of any case in a data list; 1 where none has ``raters``."""
    return max((len(item.get("raters", [""])) for item in items), default=1)


class RatersAsLabeld(Transform):
    """Put the files of a case's raters, where it has any, in the place of its label.

    A training learns from the raters themselves; a consensus beside them is for scores.

    Args:
        label_key: key of the label map's file.
        raters_key: key of the files of the raters; it is removed.
    """

    def __init__(self, label_key: str = "label", raters_key: str = "raters") -> None:
        self.label_key = label_key
        self.raters_key = raters_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with one of the two keys."""
        d = dict(data)
        if self.raters_key in d:
            d[self.label_key] = d.pop(self.raters_key)
        return d


class LoadRatersd(MapTransform):
    """Load label maps as (raters, *spatial): a list of files, one for each rater, or one file.

    They are turned onto the grid of the image, or of the first label map where there is no image, and checked, so that
    none is taken that lies elsewhere or holds other values, whoever made the data list
    (:func:`medsegdiff_monai.data.rules.read_label`). Each file is read by itself. (MONAI's ``LoadImaged`` stacks no
    files whose affines differ by rounding, as those of different programs do, and none of different formats.)

    Args:
        keys: keys of the files.
        spec: what the config variables say of the data; default: values are not compared with it.
        image_key: key of the image, which is loaded already.
        allow_missing_keys: whether keys may be missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spec: DataSpec | None = None,
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spec = spec
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the label maps in place of the files.

        Raises:
            InputError: for a label map that has faults, or lies on another grid.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            grid, maps = d.get(self.image_key), []
            for file in ensure_tuple(d[key]):
                maps.append(read_label(str(file), grid, self.spec))
                grid = maps[0] if grid is None else grid
            d[key] = MetaTensor(torch.cat([m.as_tensor() for m in maps])).copy_meta_from(maps[0])
        return d


class RatersToRegionsd(LabelsToRegionsd):
    """Turn label maps (raters, *spatial) into masks (raters, classes, *spatial) in {0, 1}, even of a single rater.

    Args:
        keys: keys of the label maps.
        num_classes: number of mask channels.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
        allow_missing_keys: whether keys may be missing.
        ignore_label: see :class:`medsegdiff_monai.transforms.Regions`.
    """

    def masks(self, label: Tensor) -> Tensor:
        """Return the masks of all raters."""
        return torch.stack([self.regions.masks(one) for one in label.split(1)])


class Consensusd(Transform):
    """Make the masks of a case that is scored: a consensus always, those of the raters where there are several.

    Where the case has no label of its own, a voxel belongs to a region if at least half of the raters say so; of two
    raters one is enough. What any of them ignores (NaN) is ignored in all, so that every score counts the same voxels.

    Args:
        label_key: masks (classes, *spatial); kept where they are there.
        raters_key: masks (raters, classes, *spatial); removed where there is a single rater.
    """

    def __init__(self, label_key: str = "label", raters_key: str = "raters") -> None:
        self.label_key = label_key
        self.raters_key = raters_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the consensus."""
        d = dict(data)
        raters = d.get(self.raters_key)
        if raters is None:
            return d
        masks = torch.as_tensor(raters)
        if self.label_key not in d:
            consensus = (2 * masks.sum(0) >= len(masks)).to(masks.dtype)
            is_meta = isinstance(raters, MetaTensor)
            d[self.label_key] = MetaTensor(consensus).copy_meta_from(raters) if is_meta else consensus
        unknown = masks.isnan().any(0) | torch.as_tensor(d[self.label_key]).isnan()
        if unknown.any():
            d[self.label_key] = d[self.label_key].masked_fill(unknown, torch.nan)
        if len(raters) == 1:
            del d[self.raters_key]
        return d


class DrawRatersd(Randomizable, MapTransform):
    """Draw the same number of raters for every case: (raters, *any) becomes (num_raters, *any).

    Of a case with more raters a part is drawn, each rater once. Of a case with fewer, all are repeated equally often,
    and the remainder is drawn. Their order is random, since it says nothing about who they are.

    Args:
        keys: label maps or masks with the raters first; all keys get the same ones.
        num_raters: number of raters to draw.
        allow_missing_keys: whether keys may be missing.
    """

    def __init__(self, keys: KeysCollection, num_raters: int = 1, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.num_raters = num_raters
        self.drawn: list[int] = []

    def randomize(self, data: Any) -> None:
        """Draw from ``data`` raters."""
        rounds = math.ceil(self.num_raters / data)
        self.drawn = [i for _ in range(rounds) for i in self.R.permutation(data).tolist()][: self.num_raters]

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return a copy of ``data`` with the raters that were drawn."""
        d = dict(data)
        for i, key in enumerate(self.key_iterator(d)):
            if i == 0:
                self.randomize(len(d[key]))
            d[key] = d[key][self.drawn]
        return d

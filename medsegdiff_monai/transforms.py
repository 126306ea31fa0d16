"""Transforms of images, label maps, region masks and ensemble members."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import ClipIntensityPercentiles, Compose, MapTransform, NormalizeIntensity, ScaleIntensityRange
from torch import Tensor

from .errors import InputError
from .fusion import check_fusion, fuse_members, mutual_information, predictive_entropy

__all__ = ["FuseMembersd", "LabelsToRegionsd", "NormalizeImaged", "Regions"]


class Regions:
    """What each channel of a mask stands for.

    Args:
        num_classes: number of mask channels.
        regions: names of the channels with the label values that each one holds, for instance
            ``{"disc": [1, 2], "cup": [2]}``; by default one channel for each label from 1 to ``num_classes``.

    Raises:
        InputError: where ``regions`` and ``num_classes`` do not fit together.
    """

    def __init__(self, num_classes: int, regions: Mapping[str, Sequence[int]] | None = None) -> None:
        if regions is None:
            regions = {f"class_{i}": [i] for i in range(1, num_classes + 1)}
        if len(regions) != num_classes:
            raise InputError(f"num_classes={num_classes}, but regions names {len(regions)}: make them agree.")
        if any(not values or min(values) < 1 for values in regions.values()):
            raise InputError(f"regions={dict(regions)}: each region needs label values of at least 1.")
        self.names = list(regions)
        self.values = [list(values) for values in regions.values()]
        members = [value for values in self.values for value in values]
        self.labels = {0, *members}
        self.exclusive = len(members) == len(set(members))

    def masks(self, label: Tensor) -> Tensor:
        """Turn a label map (1, *spatial) into float32 masks (classes, *spatial) in {0, 1}."""
        channels = [torch.isin(label[0], torch.tensor(v, device=label.device).to(label.dtype)) for v in self.values]
        return torch.stack(channels).float()

    def binarise(self, probability: Tensor) -> Tensor:
        """Threshold probabilities (classes, *spatial) into masks of the same shape.

        Exclusive classes compete by arg-max, the background having 1 - max; overlapping regions are cut at one half.
        """
        above = probability > 0.5  # the same as winning against the background
        if not self.exclusive:
            return above
        winner = torch.zeros_like(above).scatter_(0, probability.argmax(0, keepdim=True), True)
        return above & winner

    def label_map(self, masks: Tensor) -> Tensor:
        """Turn masks (classes, *spatial) into a uint8 label map (1, *spatial).

        Channel i has the value i + 1; where regions overlap, the one declared later is on top.
        """
        label = torch.zeros_like(masks[:1], dtype=torch.uint8)
        for i, mask in enumerate(masks):
            label[0][mask > 0] = i + 1
        return label


class NormalizeImaged(MapTransform):
    """Bring the intensities of images (channels, *spatial) to the scale that the network expects.

    Args:
        keys: images in the dictionary.
        intensity_range: lowest and highest intensity that matter, brought to -1 and 1 and clipped beyond: where values
            mean the same in every image, such as CT in Hounsfield units, or slices of one volume. Default: each channel
            of each image is clipped to its percentiles 0.5 and 99.5, then brought to mean 0 and standard deviation 1,
            as suits MR, ultrasound and photographs.

    Raises:
        InputError: where ``intensity_range`` is not two rising numbers.
    """

    def __init__(self, keys: KeysCollection, intensity_range: Sequence[float] | None = None) -> None:
        super().__init__(keys)
        if intensity_range is None:
            percentiles = ClipIntensityPercentiles(lower=0.5, upper=99.5, channel_wise=True)
            self.normalize = Compose([percentiles, NormalizeIntensity(channel_wise=True)])
        elif len(intensity_range) != 2 or intensity_range[0] >= intensity_range[1]:
            raise InputError(f"intensity_range={list(intensity_range)} must be the lowest and the highest intensity.")
        else:
            low, high = intensity_range
            self.normalize = Compose(ScaleIntensityRange(a_min=low, a_max=high, b_min=-1.0, b_max=1.0, clip=True))

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Normalise the images."""
        return {**data, **{key: self.normalize(data[key]) for key in self.key_iterator(data)}}


class LabelsToRegionsd(MapTransform):
    """Turn label maps (1, *spatial) into masks (classes, *spatial) in {0, 1}.

    Args:
        keys: keys of the label maps.
        num_classes: number of mask channels.
        regions: see :class:`Regions`.
        allow_missing_keys: whether keys may be missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.regions = Regions(num_classes, regions)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return a copy of ``data`` with the masks in place of the label maps."""
        d = dict(data)
        for key in self.key_iterator(d):
            masks = self.regions.masks(torch.as_tensor(d[key]))
            d[key] = MetaTensor(masks).copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else masks
        return d


class FuseMembersd(MapTransform):
    """Fuse the members of an ensemble into mask, probability and uncertainty; thresholding comes last.

    Reads ``pred`` (members * classes, *spatial), the classes of a member in a row, and writes

    - ``pred``: label map (1, *spatial), uint8;
    - ``mask``: one channel for each class, in {0, 1};
    - ``prob``: fused probability of each class;
    - ``uncertainty_entropy`` and ``uncertainty_mi``: (1, *spatial), bits (:mod:`medsegdiff_monai.fusion`).

    Args:
        keys: the key to read, usually ``pred``.
        num_classes: number of foreground classes.
        regions: see :class:`Regions`.
        fusion: ``staple``, ``mean`` or ``vote``.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
        fusion: str = "staple",
    ) -> None:
        super().__init__(keys)
        self.regions = Regions(num_classes, regions)
        self.num_classes = num_classes
        self.fusion = check_fusion(fusion)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return a copy of ``data`` with the results."""
        d = dict(data)
        for key in self.key_iterator(d):
            source = d[key]
            plain = source.as_tensor() if isinstance(source, MetaTensor) else source
            members = plain.unflatten(0, (-1, self.num_classes)).clamp(0, 1)
            probability = fuse_members(members, self.fusion)
            masks = self.regions.binarise(probability)
            results = {
                key: self.regions.label_map(masks),
                "mask": masks.float(),
                "prob": probability,
                "uncertainty_entropy": predictive_entropy(members)[None],
                "uncertainty_mi": mutual_information(members)[None],
            }
            for name, value in results.items():
                d[name] = MetaTensor(value).copy_meta_from(source) if isinstance(source, MetaTensor) else value
        return d

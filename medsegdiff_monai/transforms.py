"""Transforms of images, label maps, region masks and ensemble members."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import (
    ClipIntensityPercentiles,
    Compose,
    MapTransform,
    NormalizeIntensity,
    RandCropByLabelClassesd,
    RandLambdad,
    RandomizableTrait,
    ScaleIntensityRange,
    Spacingd,
)
from monai.utils import fall_back_tuple
from torch import Tensor

from .errors import InputError
from .fusion import MemberSummary, check_fusion, in_parts, largest_entropy
from .windows import LARGE

__all__ = [
    "AugmentingCompose", "FuseMembersd", "LabelsToRegionsd", "NormalizeImaged", "RandCropByClassd", "Regions",
    "ToSpacingd",
]  # fmt: skip


class Regions:
    """What each channel of a mask stands for.

    Args:
        num_classes: number of mask channels.
        regions: names of the channels with the label values that each one holds, for instance
            ``{"disc": [1, 2], "cup": [2]}``; by default one channel for each label from 1 to ``num_classes``.
        ignore_label: value of voxels that nobody has labelled; masks are NaN there, and neither losses nor scores count
            them. Default: there are none.

    Raises:
        InputError: where ``regions``, ``num_classes`` and ``ignore_label`` do not fit together.
    """

    def __init__(
        self, num_classes: int, regions: Mapping[str, Sequence[int]] | None = None, ignore_label: int | None = None
    ) -> None:
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
        if ignore_label is not None and (type(ignore_label) is not int or ignore_label in self.labels):
            raise InputError(
                f"ignore_label={ignore_label!r} must be a whole number, and neither 0 nor a label of a class "
                f"({', '.join(map(str, sorted(self.labels - {0})))})."
            )
        self.ignore_label = ignore_label
        self.written = self._own_values()

    def _own_values(self) -> list[int]:
        """The value of each channel in a label map: the least label that it shares with no later one, if there is any.

        So labels come out as they went in, nested regions too.
        """
        own: list[int] = []
        later: set[int] = set()
        for values in map(set, reversed(self.values)):
            candidates = chain(sorted(values - later), sorted(values), count(max(self.labels) + 1))
            own.append(next(value for value in candidates if value not in own))
            later |= values
        return own[::-1]

    @property
    def legend(self) -> dict[int, str]:
        """The name of each value in a label map."""
        return dict(zip(self.written, self.names))

    def masks(self, label: Tensor) -> Tensor:
        """Turn a label map (1, *spatial) into float32 masks (classes, *spatial) in {0, 1}, NaN where it is ignored."""
        channels = [torch.isin(label[0], torch.tensor(v, device=label.device).to(label.dtype)) for v in self.values]
        masks = torch.stack(channels).float()
        return masks if self.ignore_label is None else masks.masked_fill_(label == self.ignore_label, torch.nan)

    def binarise(self, probability: Tensor) -> Tensor:
        """Threshold probabilities (classes, *spatial) into masks of the same shape.

        Exclusive classes compete by arg-max, the background having 1 - max; overlapping regions are cut at one half.
        """
        above = probability > 0.5  # the same as winning against the background
        if not self.exclusive or len(probability) == 1:
            return above
        winner = torch.zeros_like(above).scatter_(0, probability.argmax(0, keepdim=True), True)
        return above & winner

    def label_map(self, masks: Tensor) -> Tensor:
        """Turn masks (classes, *spatial) into a label map (1, *spatial), of uint8 where its values fit, else int32.

        Each channel has the value that it has in the label maps of the data (:attr:`written`); where regions overlap,
        the one declared later is on top.
        """
        label = torch.zeros_like(masks[:1], dtype=torch.uint8 if max(self.written) < 256 else torch.int32)
        for value, mask in zip(self.written, masks):
            label[0][mask > 0] = value
        return label


class AugmentingCompose(Compose):
    """MONAI's ``Compose`` that forgets the metadata of its items before the first random transform.

    Training has no use for them then, and on small images MONAI's transforms take longer to note what they do than to
    do it. They are kept where there is no random transform, or ``RandLambdad``, which fails without.
    """

    def __call__(
        self, input_: Any, start: int = 0, end: int | None = None, threading: bool = False, lazy: bool | None = None
    ) -> Any:
        """Transform items from one transform on up to another; see MONAI's ``Compose``."""
        stop = len(self.transforms) if end is None else end
        first = self.get_index_of_first(lambda transform: isinstance(transform, RandomizableTrait))
        if first is None or _has_function(self):
            return super().__call__(input_, start, end, threading, lazy)
        if start < first:
            input_ = super().__call__(input_, start, min(stop, first), threading, lazy)
        if stop < first:
            return input_
        tracked = get_track_meta()
        set_track_meta(False)
        try:
            return super().__call__(_without_metadata(input_), max(start, first), stop, threading, lazy)
        finally:
            set_track_meta(tracked)


def _has_function(transform: Any) -> bool:
    """Whether there is a ``RandLambdad``; MONAI's ``flatten`` would seed all transforms anew."""
    if isinstance(transform, Compose):
        return any(_has_function(one) for one in transform.transforms)
    return isinstance(transform, RandLambdad)


def _without_metadata(data: Any) -> Any:
    if isinstance(data, MetaTensor):
        return data.as_tensor()
    if isinstance(data, Mapping):
        return {key: _without_metadata(value) for key, value in data.items()}
    return [_without_metadata(one) for one in data] if isinstance(data, list) else data


class RandCropByClassd(RandCropByLabelClassesd):
    """MONAI's crop around a voxel of a class drawn at random, background among them, for label values of any size.

    Of several raters, a voxel has the classes that any of them gives it; background is what none of them has marked.

    Args:
        keys: what to crop.
        label_key: label maps (raters, *spatial), usually one.
        spatial_size: size of the patch.
        num_classes: see :class:`Regions`.
        regions: see :class:`Regions`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str,
        spatial_size: Sequence[int],
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        labels = sorted(Regions(num_classes, regions).labels)
        super().__init__(keys, label_key, spatial_size, num_classes=len(labels), warn=False)
        self.labels = torch.tensor(labels)

    def randomize(self, label: Tensor, indices: Any = None, image: Tensor | None = None) -> None:
        """Draw the centre; MONAI looks for every value up to the largest, so these are numbered without gaps.

        What is ignored has a number of its own, which no centre is drawn from.
        """
        plain, labels = torch.as_tensor(label), self.labels.to(label.device)
        numbers = torch.bucketize(plain, labels)
        numbers[~torch.isin(plain, labels.to(plain.dtype))] = len(labels)
        if len(numbers) > 1:  # one channel for each class, which MONAI takes as well
            marked = [(numbers == i).any(0) for i in range(1, len(self.labels))]
            numbers = torch.stack([(numbers == 0).all(0), *marked])
        super().randomize(numbers, indices, image)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> list[dict[Hashable, Tensor]]:
        """Return the patch, in a list; where that is the whole image, nothing is drawn."""
        size = data[self.label_key].shape[1:]
        if fall_back_tuple(self.cropper.spatial_size, size) == tuple(size):
            return [dict(data)]
        return super().__call__(data, lazy)


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


class ToSpacingd(Spacingd):
    """MONAI's ``Spacingd`` that touches nothing but its own keys.

    MONAI copies the metadata of an image read from NIfTI to whatever key begins with the image's and an underscore, and
    fails where that holds no dictionary, such as MONAI Label's ``image_path``.
    """

    def __call__(self, data: Mapping[Hashable, Tensor], lazy: bool | None = None) -> dict[Hashable, Tensor]:
        """Resample; see MONAI's ``Spacingd``."""
        return {**data, **super().__call__({key: data[key] for key in self.key_iterator(data)}, lazy)}


class LabelsToRegionsd(MapTransform):
    """Turn label maps (1, *spatial) into masks (classes, *spatial) in {0, 1}, NaN where they are ignored.

    Args:
        keys: keys of the label maps.
        num_classes: number of mask channels.
        regions: see :class:`Regions`.
        allow_missing_keys: whether keys may be missing.
        ignore_label: see :class:`Regions`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
        allow_missing_keys: bool = False,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.regions = Regions(num_classes, regions, ignore_label)

    def masks(self, label: Tensor) -> Tensor:
        """Return the masks of a label map."""
        return self.regions.masks(label)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return a copy of ``data`` with the masks in place of the label maps."""
        d = dict(data)
        for key in self.key_iterator(d):
            masks = self.masks(torch.as_tensor(d[key]))
            d[key] = MetaTensor(masks).copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else masks
        return d


def _release(members: Tensor) -> None:
    """Give the memory of a large volume's members back, which the engine would hold until all maps are made."""
    storage = members.untyped_storage()
    if members.numel() > LARGE and storage.nbytes() == members.numel() * members.element_size():
        storage.resize_(0)


class FuseMembersd(MapTransform):
    """Fuse the members of an ensemble into mask, probability and uncertainty; thresholding comes last.

    Reads ``pred`` (members * classes, *spatial), the classes of a member in a row, takes one member after the other
    back to the grid of the input, and writes

    - ``pred``: label map (1, *spatial), see :meth:`Regions.label_map`;
    - ``mask``: one channel for each class, in {0, 1};
    - ``mean``: the members' mean probability of each class, whatever the fusion of the masks;
    - ``prob``: the same, calibrated where a training has left a calibration;
    - ``uncertainty_entropy``: entropy of ``prob``, (1, *spatial), bits, the largest over the classes;
    - ``uncertainty_mi``: (1, *spatial), bits (:meth:`medsegdiff_monai.fusion.MemberSummary.mutual_information`);
    - ``member_masks`` (members, classes, *spatial): the mask that each member makes by itself, boolean;
    - ``member_sizes`` (members, classes): share of the voxels that each member's mask fills;
    - ``pairwise_dice`` (classes,): mean Dice over pairs of members.

    Of more than ``LARGE`` values, the members that were read are given up: their tensor is empty afterwards.

    Args:
        keys: the key to read, usually ``pred``.
        num_classes: number of foreground classes.
        regions: see :class:`Regions`.
        fusion: ``staple``, ``mean``, ``vote`` or ``expected_dice``
            (:meth:`medsegdiff_monai.fusion.MemberSummary.fuse`).
        invert: undoes the preprocessing of the image for the same key, such as MONAI's ``Invertd``. It gets one member
            at a time, so that not all of them are in memory on the input's grid.
        calibrate: takes the members' mean (1, classes, *spatial) to calibrated probabilities, such as a network's
            :class:`medsegdiff_monai.networks.TrainingRecord`; default: they are the mean itself.
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
        fusion: str = "expected_dice",
        invert: Callable[[dict], dict] | None = None,
        calibrate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(keys)
        self.regions = Regions(num_classes, regions)
        self.calibrate = calibrate
        self.num_classes = num_classes
        self.fusion = check_fusion(fusion)
        self.invert = invert

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return a copy of ``data`` with the results."""
        d = dict(data)
        for key in self.key_iterator(d):
            d.update(self._fuse(d, key))
        return d

    def _fuse(self, data: dict[Hashable, Tensor], key: Hashable) -> dict[Hashable, Tensor]:
        geometry: list[MetaTensor] = []
        summary = MemberSummary(self._members(data, key, geometry), self.regions.binarise)
        _release(data[key])
        information = summary.mutual_information()
        masks, mean = in_parts(self.regions.binarise, summary.fuse(self.fusion)), summary.mean
        calibrate = self.calibrate
        probability = mean.clone() if calibrate is None else in_parts(lambda part: calibrate(part[None])[0], mean)
        maps = {
            key: self.regions.label_map(masks),
            "mask": masks.to(torch.uint8),
            "mean": mean,
            "prob": probability,
            "uncertainty_entropy": largest_entropy(probability)[None],
            "uncertainty_mi": information[None],
        }
        if geometry:
            maps = {name: MetaTensor(value).copy_meta_from(geometry[0]) for name, value in maps.items()}
        return {
            **maps,
            "member_masks": summary.votes,
            "member_sizes": summary.sizes() / masks[0].numel(),
            "pairwise_dice": summary.pairwise_dice(),
        }

    def _members(self, data: dict[Hashable, Tensor], key: Hashable, geometry: list[MetaTensor]) -> Iterator[Tensor]:
        """Yield each member's probabilities (classes, *spatial) on the grid of the input.

        Args:
            data: of the case.
            key: of all members.
            geometry: takes, without voxels, what the first member knows of its place.
        """
        for member in data[key].split(self.num_classes):
            if self.invert is not None:
                member = _inverted(self.invert, data, key, member)
            if isinstance(member, MetaTensor):
                if not geometry:
                    geometry.append(MetaTensor(torch.empty(0)).copy_meta_from(member))
                member = member.as_tensor()
            # interpolation may overshoot; what it made is nobody else's, and a copy takes much memory
            yield member.clamp(0, 1) if self.invert is None else member.clamp_(0, 1)


def _inverted(invert: Callable[[dict], dict], data: dict[Hashable, Tensor], key: Hashable, member: Tensor) -> Tensor:
    """A member on the grid of the input; of a large volume class by class, since memory is short of copies of all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "inverse has been called")  # where nothing was to be undone
        if data[key].numel() <= LARGE:
            return invert({**data, key: member})[key]
        for k, one in enumerate(member.split(1)):
            found = invert({**data, key: one})[key]
            if k == 0:
                whole = found.new_empty((len(member), *found.shape[1:]), dtype=member.dtype)
            whole[k] = found[0]
    return whole

"""Check of a data list: every fault is named before any work starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from tqdm import tqdm

from ..distributed import is_main
from ..errors import InputError
from ..transforms import Regions
from .reading import load_image

__all__ = ["DataSpec", "check_items", "first_file", "rater_files"]

SHOWN = 20  # faults that a message lists in full


@dataclass(frozen=True)
class DataSpec:
    """What the config variables say of the data.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
    """

    spatial_dims: int
    in_channels: int
    num_classes: int
    regions: Mapping[str, Sequence[int]] | None = None


def first_file(image: str | Sequence[str]) -> str:
    """The file that names a case: the only one, or the first of several that are stacked as channels."""
    return image if isinstance(image, str) else image[0]


def rater_files(entry: Mapping[str, Any], place: str) -> list[str]:
    """The files that an entry of a data list names under ``labels``, one label map for each rater of the case.

    Args:
        entry: of the data list.
        place: file and position of the entry, for messages.

    Returns:
        The files as they are written there; none where the entry has no ``labels``.

    Raises:
        InputError: for anything but a list of different file names.
    """
    if "labels" not in entry:
        return []
    files = entry["labels"]
    if not (isinstance(files, list) and files and all(isinstance(file, str) and file for file in files)):
        raise InputError(
            f"{place}: 'labels' is {str(files)[:100]!r}, no list of file names: list one file for each rater, "
            "or leave it out."
        )
    counts = Counter(os.path.normpath(file) for file in files)
    twice = next((file for file, count in counts.items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{place}: 'labels' lists {twice[:200]!r} more than once: list each rater's file once.")
    return files


def _check_image(path: str | Sequence[str], spec: DataSpec) -> MetaTensor:
    image = load_image(path)
    name, dims, channels = first_file(path), image.ndim - 1, image.shape[0]
    if dims != spec.spatial_dims:
        raise InputError(
            f"{name}: has {dims} spatial axes, spatial_dims={spec.spatial_dims}: set --spatial_dims {dims}, "
            "or give the overlay that fits the data."
        )
    if channels != spec.in_channels:
        raise InputError(
            f"{name}: has {channels} channels, in_channels={spec.in_channels}: set --in_channels {channels}, "
            "or correct the file."
        )
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise InputError(f"{name}: {bad} voxels are NaN or infinite: replace them, for instance by 0.")
    return image


def same_affine(a: MetaTensor, b: MetaTensor) -> bool:
    """Whether two images lie at the same place, but for what rounding does to an affine in a file."""
    return np.allclose(to_affine_nd(3, a.affine), to_affine_nd(3, b.affine), rtol=1e-3, atol=1e-2)


def _check_label(path: str, image: MetaTensor, spec: DataSpec, regions: Regions) -> bool:
    """Check a label map; returns whether it has any foreground."""
    label = load_image(path)
    if label.shape[0] != 1:
        raise InputError(
            f"{path}: a label map has one channel, this has {label.shape[0]}: save label values, no colours."
        )
    if label.shape[1:] != image.shape[1:]:
        raise InputError(
            f"{path}: label of size {list(label.shape[1:])}, image of size {list(image.shape[1:])}: they must be equal."
        )
    if spec.spatial_dims == 3 and not same_affine(label, image):  # 2D images stay as they are stored
        raise InputError(f"{path}: its affine differs from the image's: copy the image's geometry to the label.")
    values = set(torch.unique(label.as_tensor()).tolist())
    unknown = sorted(values - regions.labels)
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:5])
        raise InputError(
            f"{path}: holds the values {shown}, declared are {sorted(regions.labels)} (num_classes={spec.num_classes}"
            f"{', regions' if spec.regions else ''}): set --num_classes or --regions, or correct the file."
        )
    return values != {0}


def _faults(items: Sequence[dict[str, Any]], check: Callable[[dict[str, Any]], None]) -> list[InputError | None]:
    """Check all items, several at a time, with a progress bar; an error or None for each."""

    def attempt(item: dict[str, Any]) -> InputError | None:
        try:
            check(item)
        except InputError as error:
            return error
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # a bar only where it takes a while: a handful of files is read at once
        return list(
            tqdm(
                pool.map(attempt, items), total=len(items), desc="Check data", disable=len(items) < 20 or not is_main()
            )
        )


def check_items(items: Sequence[dict[str, Any]], spec: DataSpec, labelled: bool) -> list[InputError | None]:
    """Read every file of a data list and check it against the config variables.

    Args:
        items: data list with ``image`` (a file, a DICOM folder, or several files to stack) and ``label``, ``raters``
            (a list of label maps) or both. Labelled items get the key ``foreground``: whether any of these has any.
        spec: what the config variables say.
        labelled: whether labels are needed.

    Returns:
        For each item its fault, or None.
    """
    regions = Regions(spec.num_classes, spec.regions)

    def check(item: dict[str, Any]) -> None:
        labels = [*([item["label"]] if "label" in item else []), *item.get("raters", [])]
        if labelled and not labels:
            raise InputError(
                f"{first_file(item['image'])}: has no label in the data list: add it, or take the case out."
            )
        image = _check_image(item["image"], spec)
        if labelled:
            # a list, since every file must be checked, even after one with foreground
            item["foreground"] = any([_check_label(label, image, spec, regions) for label in labels])

    return _faults(items, check)


def refuse(faults: Sequence[InputError | None], where: str) -> None:
    """Raise one error that lists all faults.

    Raises:
        InputError: if there is any fault.
    """
    found = [str(fault) for fault in faults if fault is not None]
    if len(found) == 1:
        raise InputError(found[0])
    if found:
        more = f"\n  ... and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise InputError(f"{where}: {len(found)} bad cases:\n  " + "\n  ".join(found[:SHOWN]) + more)

"""The faults of a case, said here for all who read one: check, prepare, training, evaluation and inference."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from tqdm import tqdm

from ..distributed import is_main
from ..errors import InputError
from ..grading import measure
from ..transforms import Regions
from .entries import first_file
from .geometry import is_invertible, onto_grid
from .pictures import too_many
from .reading import image_spacing, load_image, load_label

__all__ = [
    "SHOWN",
    "CaseRead",
    "DataSpec",
    "check_items",
    "fit_label",
    "image_faults",
    "no_label",
    "place_label",
    "read_case",
    "read_label",
    "refuse",
    "whole_numbers",
]

SHOWN = 20  # faults that a message lists in full
MAX_LABEL = 65535
MAX_LABELS = 256  # more values than this are no label map
ALMOST = 0.01  # a label may be off a whole number by so much: scale factors and resampling by floats leave that


@dataclass(frozen=True)
class DataSpec:
    """What the config variables say of the data.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
        ignore_label: see :class:`medsegdiff_monai.transforms.Regions`.
    """

    spatial_dims: int
    in_channels: int
    num_classes: int
    regions: Mapping[str, Sequence[int]] | None = None
    ignore_label: int | None = None


@dataclass
class CaseRead:
    """A case as it was read.

    Args:
        image: (channels, *spatial); None where it cannot be read.
        labels: label maps (1, *spatial) of whole numbers on the image's grid, by file; without those that have faults.
        faults: what is wrong, a sentence for each.
    """

    image: MetaTensor | None = None
    labels: dict[str, MetaTensor] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def image_faults(image: MetaTensor, name: str, spec: DataSpec | None = None) -> list[str]:
    """What is wrong with an image.

    Args:
        image: (channels, *spatial).
        name: its file.
        spec: what the config variables say, where there are any.
    """
    faults = []
    dims, channels = image.ndim - 1, image.shape[0]
    if dims not in (2, 3):
        faults.append(f"{name}: has {dims} spatial axes: 2 and 3 are supported.")
    elif spec is not None and dims != spec.spatial_dims:
        faults.append(
            f"{name}: has {dims} spatial axes, spatial_dims={spec.spatial_dims}: set --spatial_dims {dims}, "
            "or give the overlay and the weights that fit the data (--trained of medsegdiff segment)."
        )
    if spec is not None and channels != spec.in_channels:
        faults.append(
            f"{name}: has {channels} channels, in_channels={spec.in_channels}: set --in_channels {channels}, "
            "or correct the file."
        )
    bad = int((~torch.isfinite(image.as_tensor())).sum())
    if bad:
        faults.append(f"{name}: {bad} voxels are NaN or infinite: replace them, for instance by 0.")
    if not is_invertible(to_affine_nd(3, image.affine).numpy()):
        faults.append(f"{name}: its affine has no inverse (determinant 0): rewrite the geometry.")
    return faults


def fit_label(
    label: MetaTensor, name: str, image: MetaTensor | None = None, spec: DataSpec | None = None
) -> tuple[MetaTensor | None, list[str]]:
    """Turn a label map onto the grid of its image, with whole numbers; nothing is resampled.

    Args:
        label: (1, *spatial), as it was read.
        name: its file.
        image: (channels, *spatial) with a good affine; None to look at the values alone.
        spec: what the config variables say, where there are any.

    Returns:
        The label map, and what is wrong with it; None where anything is.
    """
    if label.shape[0] != 1:
        channels = label.shape[0]
        return None, [f"{name}: a label map has one channel, this has {channels}: save label values, no colours."]
    faults, fitted = [], label
    if image is not None:
        try:
            fitted = place_label(label, name, image)
        except InputError as error:
            faults.append(str(error))
    try:
        whole = whole_numbers(fitted, name)
    except InputError as error:
        return None, [*faults, str(error)]
    faults += _unknown_values(whole.as_tensor(), name, spec)
    return (None, faults) if faults else (whole, [])


def place_label(label: MetaTensor, name: str, image: MetaTensor) -> MetaTensor:
    """Turn a label map (1, *spatial) onto the grid of its image; nothing is resampled.

    Raises:
        InputError: where that is another grid.
    """
    placed, difference = onto_grid(label, image)
    if placed is None:
        raise InputError(f"{name}: {difference}: resample the label onto the image's grid.")
    return placed


def whole_numbers(label: MetaTensor, name: str) -> MetaTensor:
    """Round label values that are off by what scale factors and floats leave.

    Raises:
        InputError: for other values.
    """
    values = label.as_tensor()
    whole = values.round()
    odd = values[~(((values - whole).abs() <= ALMOST) & (whole >= 0) & (whole <= MAX_LABEL))]  # NaN is odd as well
    if len(odd):
        raise InputError(
            f"{name}: holds {odd[0]:.7g}, which is no label: save whole numbers from 0, the background, to {MAX_LABEL}."
        )
    return MetaTensor(whole).copy_meta_from(label)


def _unknown_values(whole: torch.Tensor, name: str, spec: DataSpec | None) -> list[str]:
    found = torch.bincount(whole.flatten().to(torch.int32)).nonzero().flatten().tolist()
    if len(found) > MAX_LABELS:
        return [f"{name}: {too_many(len(found))}"]
    if spec is None:
        return []
    known = Regions(spec.num_classes, spec.regions, spec.ignore_label).labels
    unknown = sorted(set(found) - known - {spec.ignore_label})
    if not unknown:
        return []
    return [
        f"{name}: holds the values {', '.join(map(str, unknown[:5]))}, declared are {sorted(known)} "
        f"(num_classes={spec.num_classes}{', regions' if spec.regions else ''}): set --num_classes, --regions or "
        "--ignore_label, or correct the file."
    ]


def read_label(path: str, image: MetaTensor | None = None, spec: DataSpec | None = None) -> MetaTensor:
    """Read a label map (1, *spatial) onto the grid of its image; see :func:`fit_label`.

    Raises:
        InputError: with all that is wrong with it.
    """
    label, faults = fit_label(load_label(path), path, image, spec)
    if label is None:
        raise InputError("\n  ".join(faults))
    return label


def read_case(item: Mapping[str, Any], spec: DataSpec | None = None, channels: int | None = None) -> CaseRead:
    """Read a case and say all that is wrong with it.

    Args:
        item: ``image`` (a file, a DICOM folder, or several files to stack), and ``label``, ``raters`` (a list of label
            maps), both or none.
        spec: what the config variables say, where there are any.
        channels: of the network, where they are known without ``spec``.
    """
    case = CaseRead()
    placed = None
    try:
        case.image = load_image(item["image"], channels if spec is None else spec.in_channels)
    except InputError as error:
        case.faults.append(str(error))
    else:
        case.faults += image_faults(case.image, first_file(item["image"]), spec)
        placed = case.image if is_invertible(to_affine_nd(3, case.image.affine).numpy()) else None
    for path in [*([item["label"]] if "label" in item else []), *item.get("raters", [])]:
        try:
            case.labels[path] = read_label(path, placed, spec)
        except InputError as error:
            case.faults += str(error).split("\n  ")
    return case


def no_label(image: str | Sequence[str]) -> str:
    """The fault of a case that needs a label and has none."""
    return f"{first_file(image)}: has no label in the data list: add it, or take the case out."


def _attempt_all(items: Sequence[dict[str, Any]], check: Callable[[dict[str, Any]], None]) -> list[InputError | None]:
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
        items: data list, see :func:`read_case`. Labelled items get the key ``foreground``, whether any of their label
            maps has any, and ``facts``, :class:`medsegdiff_monai.grading.CaseFacts` as JSON.
        spec: what the config variables say.
        labelled: whether labels are needed.

    Returns:
        For each item its faults as one error, or None.
    """
    regions = Regions(spec.num_classes, spec.regions, spec.ignore_label)  # is at fault itself, not each case

    def check(item: dict[str, Any]) -> None:
        if labelled and not {"label", "raters"} & item.keys():
            raise InputError(no_label(item["image"]))
        case = read_case(item if labelled else {"image": item["image"]}, spec)
        if case.faults:
            raise InputError("\n  ".join(case.faults))
        if labelled:
            maps = [label.as_tensor() for label in case.labels.values()]
            item["foreground"] = any(bool(((one != 0) & (one != spec.ignore_label)).any()) for one in maps)
            image: Any = case.image  # without faults it was read
            masks = torch.stack([regions.masks(one).nan_to_num() for one in maps]).mean(0)
            item["facts"] = measure(image, image_spacing(item["image"], image)[0], masks).to_json()

    return _attempt_all(items, check)


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

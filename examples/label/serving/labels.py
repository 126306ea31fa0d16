"""Label maps that people submit, with the values that the model trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from medsegdiff_monai.data.geometry import onto_grid
from medsegdiff_monai.data.reading import load_image, load_label
from medsegdiff_monai.errors import InputError

from .legend import Legend
from .refusals import Conflict
from .seg_nrrd import read_seg_nrrd

__all__ = ["combine", "model_values", "read_submitted"]


def _by(label_info: Sequence[Mapping[str, Any]], key: str | None) -> dict[int, str]:
    """Names of values: by a key of the entries, or by their position."""
    if key is None:
        return {i: str(entry.get("name", "")) for i, entry in enumerate(label_info, start=1)}
    return {int(entry[key]): str(entry.get("name", "")) for entry in label_info if str(entry.get(key, "")).isdigit()}


def _names(label_info: Sequence[Mapping[str, Any]], present: Sequence[int], legend: Legend) -> dict[int, str]:
    """What the values of a label map are called.

    ``idx`` (3D Slicer, in one of its requests ``id``) should be the value. But Slicer counts segments there that it
    then leaves out of the file, whose values follow the order of the entries.

    Raises:
        InputError: where the entries do not name all values, or can be read in two ways.
    """
    if not label_info:
        return {one.value: one.name for one in legend.in_label_maps}
    readings = [_by(label_info, key) for key in ("idx", "id")]
    if all(list(names) == sorted(names) for names in readings):  # Slicer counts upwards; who does not means the value
        readings.append(_by(label_info, None))
    fitting = [names for names in readings if set(present) <= set(names)]
    meant = [{value: names[value] for value in present} for names in fitting]
    if not meant:
        raise InputError(f"label_info does not name the values {list(present)} of the label: name each with its idx.")
    if any(names != meant[0] for names in meant):
        raise InputError(
            f"label_info can be read in two ways for the values {list(present)} (by idx, or by order): give each "
            "segment the idx that it has in the label."
        )
    return meant[0]


def model_values(values: np.ndarray, label_info: Sequence[Mapping[str, Any]], legend: Legend) -> np.ndarray:
    """Give each voxel the value that the model has for the segment's name.

    Segments of uncertainty count as the mask did that they were drawn on.

    Args:
        values: label map.
        label_info: what MONAI Label's clients say of it, entries with ``name`` and ``idx``; empty: the values are the
            model's already.
        legend: of the model.

    Raises:
        InputError: for values that are no label's, or names that are no class of the model.
    """
    if not isinstance(label_info, list) or not all(isinstance(entry, Mapping) for entry in label_info):
        raise InputError('label_info: must be a list of objects, such as [{"name": "anterior", "idx": 1}].')
    if not np.isfinite(values).all():
        raise InputError("label: has values that are no numbers: save it as a label map.")
    present = [int(value) for value in np.unique(values) if value]
    if not np.array_equal(values, np.round(values)) or (present and not 0 < min(present) <= max(present) <= 65535):
        raise InputError("label: must hold whole numbers from 0: save it as a label map.")
    names = _names(label_info, present, legend)
    table = np.zeros(max([0, *present]) + 1, dtype=np.uint8)
    for value in present:
        found = legend.find(names.get(value, ""))
        if found is None or found.counts_as is None:
            what = f"value {value}" + (f" ({names[value]!r})" if value in names else "")
            raise InputError(f"label: {what} is no class of the model ({legend.names}): rename or delete the segment.")
        table[value] = found.counts_as
    return table[values.astype(np.int64)]


def combine(segments: Sequence[tuple[str, np.ndarray]], legend: Legend) -> np.ndarray:
    """Make a label map of segments that may overlap.

    Args:
        segments: name and boolean (*spatial) of each; segments where members disagree say nothing of the mask.
        legend: of the model.

    Raises:
        InputError: for a segment that is no class of the model, or two classes that overlap.
    """
    label = np.zeros(segments[0][1].shape, dtype=np.uint8)
    taken: dict[int, str] = {}
    for name, voxels in segments:
        found = legend.find(name)
        if found is None and voxels.any():
            raise InputError(f"segment {name!r} is no class of the model ({legend.names}): rename or delete it.")
        if found is None or not found.counts_as:
            continue
        other = [int(value) for value in np.unique(label[voxels]) if value not in (0, found.counts_as)]
        if other:
            raise InputError(f"segments {taken[other[0]]!r} and {name!r} overlap: make them exclusive.")
        label[voxels] = found.counts_as
        taken[found.counts_as] = name
    return label


def read_submitted(
    label: str | Path, image: str | Path, label_info: Sequence[Mapping[str, Any]], legend: Legend
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Read a label that was submitted for an image.

    Args:
        label: file, a label map or ``.seg.nrrd``.
        image: file, or folder of a DICOM series.
        label_info: see :func:`model_values`.
        legend: of the model.

    Returns:
        Label map (*spatial) on the grid of the image, uint8; its affine (4, 4); and whether the file holds just that.

    Raises:
        InputError: for a label that cannot be read, or has values or segments that are no class.
        Conflict: for a label on another grid than the image.
    """
    reference = load_image(image)
    if str(label).lower().endswith(".seg.nrrd"):
        segments, affine = read_seg_nrrd(label)
        values, raw = combine(segments, legend), None
        loaded = MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(affine))
        loaded.meta["original_affine"] = affine
    else:
        loaded = load_label(label)
        if len(loaded) != 1:
            raise InputError(f"label: has {len(loaded)} channels, not one: save it as a label map, or as .seg.nrrd.")
        raw = np.asarray(loaded[0])
        values = model_values(raw, label_info, legend)
        loaded = MetaTensor(torch.from_numpy(values)[None]).copy_meta_from(loaded)
    placed, difference = onto_grid(loaded, reference)
    if placed is None:
        raise Conflict(f"label: is not on the grid of its image ({difference}): export it in the image's geometry.")
    affine = np.asarray(reference.affine, dtype=np.float64)
    return np.asarray(placed[0]), affine, raw is not None and np.array_equal(placed[0], raw)

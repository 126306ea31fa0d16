"""Connected components of a segmented case, one by one, with what the members say of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist
from torch import Tensor

from .fusion import binary_entropy, in_parts

__all__ = ["COLUMNS", "label_components", "structures"]

COLUMNS = (
    "class", "structure", "kind", "voxels", "size", "unit", "largest_diameter", "centre_voxel", "centre_mm",
    "mean_probability", "share_of_members", "mean_entropy_bits",
)  # fmt: skip

MOST = 1000  # structures of a class that have rows of their own


class Component(NamedTuple):
    """A connected component.

    Attributes:
        box: its place in the field.
        inside: its voxels, boolean, of the box.
    """

    box: tuple[slice, ...]
    inside: np.ndarray

    def meets(self, mask: np.ndarray) -> bool:
        """Whether a mask, boolean (*spatial), has any of its voxels."""
        return bool((mask[self.box] & self.inside).any())


def structures(
    names: Sequence[str], masks: Tensor, member_masks: Tensor, probability: Tensor, affine: np.ndarray, unit: str = "mm"
) -> list[dict[str, Any]]:
    """Describe each connected component of each class (of 8 or 26 neighbours), the largest first.

    ``kind`` is ``in the mask``, or ``possible miss``: a component of what any member has that nowhere meets the mask.
    Where a class has more than ``MOST`` of a kind, a last row has the number of voxels and the size of the others
    together; its ``structure`` is such as ``1001-2345``.

    Args:
        names: of the classes.
        masks: what is written, boolean or {0, 1}, (classes, *spatial).
        member_masks: boolean (members, classes, *spatial).
        probability: calibrated, (classes, *spatial).
        affine: (4, 4), voxel to millimetres, RAS+.
        unit: of lengths, ``mm`` or ``px``.

    Returns:
        Rows with ``COLUMNS``: ``size`` in mm^3 (mm^2, pixels), ``largest_diameter`` between voxel centres in ``unit``,
        ``centre_voxel`` and ``centre_mm`` as numbers with spaces between them, ``mean_probability`` and
        ``mean_entropy_bits`` over the component's voxels, ``share_of_members`` that have any of its voxels.
    """
    rows = []
    for k, name in enumerate(names):
        mask, members, likely = (np.asarray(x.cpu()) for x in (masks[k] > 0, member_masks[:, k], probability[k]))
        for kind, of, apart_from in (("in the mask", mask, None), ("possible miss", members.any(0) | mask, mask)):
            components, sizes = _components(of, apart_from)
            for number, component in enumerate(components, start=1):
                found = {**_measured(component, affine, unit), **_said(component, members, likely)}
                rows.append({"class": name, "structure": number, "kind": kind, **found})
            if len(sizes) > MOST:
                others = {"class": name, "structure": f"{MOST + 1}-{len(sizes)}", "kind": kind}
                rows.append(
                    {**dict.fromkeys(COLUMNS, ""), **others, **_extent(sizes[MOST:].sum(), affine, unit, mask.ndim)}
                )
    return rows


def _extent(voxels: int, affine: np.ndarray, unit: str, dims: int) -> dict[str, Any]:
    size = np.linalg.norm(affine[:3, :dims], axis=0).prod() if unit == "mm" else 1.0
    return {"voxels": int(voxels), "size": round(float(voxels * size), 3), "unit": unit}


def _measured(component: Component, affine: np.ndarray, unit: str) -> dict[str, Any]:
    box, inside = component
    dims, count = inside.ndim, int(inside.sum())
    along = [inside.sum(tuple(other for other in range(dims) if other != axis)) for axis in range(dims)]
    centre = [part.start + float(n @ np.arange(len(n))) / count for part, n in zip(box, along)]
    place = affine @ np.array([*centre, *[0.0] * (3 - dims), 1.0])
    return {
        **_extent(count, affine, unit, dims),
        "largest_diameter": round(_diameter(_ends(inside) @ affine[:3, :dims].T), 2) if count > 1 else 0.0,
        "centre_voxel": " ".join(f"{x:.1f}" for x in centre),
        "centre_mm": " ".join(f"{x:.1f}" for x in place[:3]) if unit == "mm" else "",
    }


def _ends(inside: np.ndarray) -> np.ndarray:
    """First and last voxels of all lines along the last axis, (n, axes): the two farthest apart are among them."""
    lines = np.nonzero(inside.any(-1))
    first, last = inside.argmax(-1)[lines], inside.shape[-1] - 1 - inside[..., ::-1].argmax(-1)[lines]
    return np.concatenate([np.stack([*lines, ends], axis=1) for ends in (first, last)])


def _said(component: Component, members: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    likely = torch.from_numpy(probability[component.box][component.inside]).float()
    return {
        "mean_probability": round(float(likely.mean()), 4),
        "share_of_members": round(float(np.mean([component.meets(member) for member in members])), 4),
        "mean_entropy_bits": round(float(in_parts(binary_entropy, likely[None]).mean()), 4),
    }


def label_components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the connected components (of 8 or 26 neighbours) of a mask.

    Args:
        mask: boolean (*spatial).

    Returns:
        The number of each voxel's component from 1, 0 in the background, int32 (*spatial); and how many voxels the
        background and each component have, int64.
    """
    components, number = ndimage.label(mask, np.ones([3] * mask.ndim))
    sizes = np.zeros(number + 1, np.int64)
    for plane in components:  # NumPy counts in 64 bits, of which a large volume has no room for a copy
        sizes += np.bincount(plane.ravel(), minlength=len(sizes))  # one by one: in noise there are millions of sizes
    return components, sizes


def _components(mask: np.ndarray, apart_from: np.ndarray | None = None) -> tuple[Iterator[Component], np.ndarray]:
    """The components of a mask, the largest first.

    Args:
        mask: boolean (*spatial).
        apart_from: components that meet this mask do not count.

    Returns:
        At most ``MOST`` components; and the number of voxels of each, of the others too.
    """
    components, sizes = label_components(mask)
    sizes[0] = 0
    if apart_from is not None:
        for plane, met in zip(components, apart_from):
            sizes[plane[met]] = 0
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    shown = np.zeros(len(sizes), components.dtype)  # the place in that order; SciPy's boxes of all may be millions
    shown[order[:MOST]] = np.arange(1, len(order[:MOST]) + 1)
    for plane in components:
        plane[...] = shown[plane]
    boxes = ndimage.find_objects(components)
    return (Component(box, components[box] == i) for i, box in enumerate(boxes, start=1)), sizes[order]


def _diameter(points: np.ndarray) -> float:
    """Largest distance between two of the points (n, 3), of which some may be equal."""
    spread = points - points.mean(0)
    axes = np.linalg.svd(spread.T @ spread)[0]
    flat = spread @ axes  # principal axes first: what lies in a plane or on a line has no hull in space
    rank = int((np.ptp(flat, axis=0) > 1e-6 * max(np.ptp(flat), 1e-12)).sum())
    if len(points) > 16 and rank > 1:
        try:
            flat = flat[ConvexHull(flat[:, :rank]).vertices]
        except QhullError:  # nearly flat: all points are compared
            pass
    return float(pdist(flat).max()) if len(flat) > 1 else 0.0

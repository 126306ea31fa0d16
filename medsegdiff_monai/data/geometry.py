"""Where the voxels of a label map lie, seen from its image."""

from __future__ import annotations

from itertools import product

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

__all__ = ["is_invertible", "onto_grid"]

# Voxels of the image that a voxel of the label may lie off: what rounding of an affine does over a large volume stays
# below, and nearest neighbours would bring each voxel to the same place.
TOLERANCE = 0.25
FLAT = 1e-6  # volume of a voxel, as a share of the box of its edges, that counts as none


def is_invertible(affine: np.ndarray) -> bool:
    """Whether an affine (4, 4) makes voxels of any size into a volume."""
    edges = np.asarray(affine, dtype=np.float64)[:3, :3]
    sizes = np.sqrt((edges**2).sum(0))
    if not np.isfinite(affine).all() or sizes.min() <= 0:
        return False
    return bool(abs(np.linalg.det(edges / sizes)) > FLAT)


def _affine(image: MetaTensor) -> np.ndarray:
    return to_affine_nd(3, image.affine).numpy()  # ITK's is 3 x 3 in 2D


def _has_place(image: MetaTensor) -> bool:
    """Whether the file says where its voxels lie, as pictures do not."""
    return "original_affine" in image.meta


def onto_grid(label: MetaTensor, image: MetaTensor) -> tuple[MetaTensor | None, str]:
    """Turn a label map so that its voxels are those of its image; nothing is resampled.

    Its axes may be flipped or in another order. Where one of both is a picture, which has no place, only the size
    counts.

    Args:
        label: (1, *spatial).
        image: (channels, *spatial), with an affine that :func:`is_invertible`.

    Returns:
        The label map with the image's affine, and ""; or None, and how both differ.
    """
    size, wanted = tuple(label.shape[1:]), tuple(image.shape[1:])
    sizes = f"label of size {list(size)}, image of size {list(wanted)}"
    if len(size) != len(wanted):
        return None, sizes
    if not (_has_place(label) and _has_place(image)):
        return (None, sizes) if size != wanted else (_placed(label.as_tensor(), label, image), "")
    if not is_invertible(_affine(label)):
        return None, "its affine has no inverse"
    flat = [1] * (3 - len(size))
    to_image = np.linalg.inv(_affine(image)) @ _affine(label)
    turn = nib.io_orientation(to_image)
    array = nib.apply_orientation(label.numpy()[0].reshape(*size, *flat), turn)
    if array.shape != (*wanted, *flat):
        return None, sizes
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in array.shape))]).T
    off = np.abs(to_image @ nib.orientations.inv_ornt_aff(turn, (*size, *flat)) @ corners - corners).max()
    if off > TOLERANCE:
        return None, f"its voxels lie up to {off:.3g} voxels off the image's"
    return _placed(torch.from_numpy(np.ascontiguousarray(array).reshape(1, *wanted)), label, image), ""


def _placed(array: torch.Tensor, label: MetaTensor, image: MetaTensor) -> MetaTensor:
    """A label map with the affine of its image, so that transforms treat both alike to the last digit."""
    placed = MetaTensor(array).copy_meta_from(label)
    placed.affine = image.affine.clone()
    return placed

"""Studies to try the server on, made without a download: crops of the MNI152 template around the hippocampus."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn import datasets, image

CENTRE_MM = (28.0, -22.0, -14.0)  # of the right hippocampus in MNI152
SIZE_MM = (38.0, 56.0, 40.0)
README = """Crops of the MNI152 T1 template around the hippocampus, as packaged by nilearn: an average of 152 brains.
They are there to try the server on. They belong to nobody, have no true labels, and measure nothing.
"""


def _crop(template: nib.Nifti1Image, side: int, voxel_mm: tuple[float, float, float], axcodes: str) -> nib.Nifti1Image:
    """The template around the right (1) or left (-1) hippocampus, with voxels of that size and order."""
    centre = np.array(CENTRE_MM) * (side, 1, 1)
    shape = np.ceil(np.array(SIZE_MM) / voxel_mm).astype(int)
    affine = np.diag([*voxel_mm, 1.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (shape - 1) / 2
    crop = image.resample_img(template, affine, shape, force_resample=True, copy_header=True)
    values = np.round(1000 * crop.get_fdata()).astype(np.int16)
    ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    return nib.Nifti1Image(values, affine).as_reoriented(ornt)


def write_demo_studies(folder: str | Path) -> Path:
    """Write four volumes of different voxel sizes and orders of axes, and a note that says what they are.

    Args:
        folder: where to write ``mni152_*.nii.gz`` and ``README.txt``.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    template = datasets.load_mni152_template(resolution=1)
    for name, side, voxel_mm, axcodes in (
        ("right", 1, (1.0, 1.0, 1.0), "RAS"),
        ("left", -1, (1.0, 1.0, 1.0), "RAS"),
        ("right_thick_slices", 1, (0.8, 0.8, 2.0), "LPS"),
        ("left_coronal", -1, (1.2, 1.5, 1.2), "RSP"),
    ):
        nib.save(_crop(template, side, voxel_mm, axcodes), folder / f"mni152_{name}.nii.gz")
    (folder / "README.txt").write_text(README, encoding="utf-8")
    return folder

"""NIfTI files in memory."""

from __future__ import annotations

import gzip
import io

import nibabel as nib
import numpy as np

__all__ = ["nifti_bytes"]


def nifti_bytes(array: np.ndarray, affine: np.ndarray, spatial_dims: int, squeeze: bool = True) -> bytes:
    """Return a gzipped NIfTI file.

    Args:
        array: (channels, *spatial); channels are the fourth axis of the file.
        affine: (4, 4), voxel to millimetres, RAS+.
        spatial_dims: 2 or 3.
        squeeze: whether a single channel is written without that axis.
    """
    if squeeze and array.shape[0] == 1:
        array = array[0]
    else:
        array = np.moveaxis(array, 0, -1)
        array = array[:, :, None] if spatial_dims == 2 else array
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    buffer = io.BytesIO()
    # level 1 as nibabel: maps of noise get no smaller
    with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=buffer, mtime=0) as file:
        image.to_stream(file)  # slice by slice
    return buffer.getvalue()

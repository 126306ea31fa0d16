"""The converter of dcmqi, and what it cannot write: names in any letters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import numpy as np
import pydicom
import SimpleITK as sitk

from medsegdiff_monai.errors import InputError

__all__ = ["as_itk", "convert", "edited"]

TOOL = "itkimage2segimage"
UTF_8 = "ISO_IR 192"
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def as_itk(voxels: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """Return an image as dcmqi reads it.

    Args:
        voxels: (x, y, z).
        affine: (4, 4), voxel to millimetres, RAS+.
    """
    lps = TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def convert(arguments: Sequence[str]) -> None:
    """Run the converter.

    Raises:
        InputError: where it is missing, or refuses the series.
    """
    tool = which(TOOL, path=str(Path(sys.executable).parent)) or which(TOOL)
    if tool is None:
        raise InputError(f"{TOOL} is not there: pip install dcmqi.")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR:" in line.upper()]
        raise InputError(f"the series cannot carry a DICOM-SEG ({(said or ['no reason given'])[-1][:200]}).")


@contextmanager
def edited(path: str | Path) -> Iterator[pydicom.Dataset]:
    """Change a DICOM file, in which text may have any letters afterwards."""
    dataset = pydicom.dcmread(path)
    dataset.decode()  # the patient's name, in the series' own letters, before all is written in UTF-8
    dataset.SpecificCharacterSet = UTF_8
    yield dataset
    dataset.save_as(path)

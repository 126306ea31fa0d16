"""Pictures of the map of uncertainty over the image, as a DICOM series that any viewer shows.

Not as a parametric map, which would keep the numbers: dcmqi 1.5.7 writes the spacing of rows and columns in the wrong
order there, and the OHIF viewer in MONAI Label 0.8.5 refuses what it writes, and counts in bytes where it should count
values when it copies the frames of others.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import matplotlib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from medsegdiff_monai.panels import COLOUR_MAP
from medsegdiff_monai.pictures import grey, grey_window

from .converter import TO_LPS, UTF_8
from .legend import Legend
from .refusals import Conflict

__all__ = ["overlay_series"]

# of a slice of the series; where a viewer finds the patient, and the same place
KEPT = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "StudyInstanceUID", "FrameOfReferenceUID", "Rows",
    "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
)  # fmt: skip
MAY_BE_EMPTY = KEPT[:9]  # but must be there
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


def overlay_series(
    image: np.ndarray, entropy: np.ndarray, affine: np.ndarray, series: str | Path, legend: Legend
) -> list[FileDataset]:
    """Draw a map over the slices of a series, the more of it the less sure the mask is.

    Args:
        image: (x, y, z).
        entropy: (x, y, z), bits, from 0 where the members' mean is sure to 1 where it is one half.
        affine: (4, 4), voxel to millimetres, RAS+.
        series: folder of the series' files.
        legend: of the model.

    Returns:
        A secondary capture for each slice, in the slice's place.

    Raises:
        Conflict: for files that are no slices of the image.
    """
    window = grey_window(image)
    to_voxels = np.linalg.inv(TO_LPS @ affine)
    own, made = generate_uid(), []
    for file in sorted(Path(series).glob("*.dcm")):
        source = pydicom.dcmread(file, stop_before_pixels=True)
        source.decode()  # the patient's name, in the series' own letters, before all is written in UTF-8
        made.append(_capture(source, own, legend))
        made[-1].InstanceNumber = source.get("InstanceNumber") or len(made)
        voxels = _voxels(source, to_voxels, entropy.shape)
        made[-1].PixelData = _blend(image[voxels], entropy[voxels], window).tobytes()
    return made


def _blend(plane: np.ndarray, entropy: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """A slice (rows, columns) with its map, RGB."""
    share, colours = entropy[..., None], matplotlib.colormaps[COLOUR_MAP](entropy)[..., :3]
    return (255 * ((1 - share) * grey(plane[..., None], window) + share * colours)).round().astype(np.uint8)


def _voxels(source: pydicom.Dataset, to_voxels: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Where the pixels of a slice (rows, columns) lie in the image: its indices along x, y and z."""
    if any(name not in source for name in PLACE):
        raise Conflict("uncertainty_series: the files of the series are no single slices with a place: leave it out.")
    along_row, along_column = np.reshape(source.ImageOrientationPatient, (2, 3)).astype(float)
    between_rows, between_columns = map(float, source.PixelSpacing)
    row, column = np.indices((source.Rows, source.Columns))
    place = np.array(source.ImagePositionPatient, dtype=float) + (
        column[..., None] * between_columns * along_row + row[..., None] * between_rows * along_column
    )
    voxels = (place @ to_voxels[:3, :3].T + to_voxels[:3, 3]).round().astype(int)
    if (voxels < 0).any() or (voxels >= shape).any():
        raise Conflict("uncertainty_series: the image is not of all slices of its series: leave it out.")
    return tuple(np.moveaxis(voxels, -1, 0))


def _capture(source: pydicom.Dataset, series: str, legend: Legend) -> FileDataset:
    """A secondary capture without pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    made = FileDataset("", {}, file_meta=meta, preamble=bytes(128), is_implicit_VR=False, is_little_endian=True)
    made.SpecificCharacterSet = UTF_8
    for name in KEPT:
        if name in source:
            made[name] = source[name]
        elif name in MAY_BE_EMPTY:
            setattr(made, name, "")
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.SeriesInstanceUID, made.SeriesNumber = series, legend.series_number + 1
    made.SeriesDescription = legend.map_description
    made.Modality, made.ConversionType = "OT", "WSD"  # as MR it would be offered as a study to segment
    made.ImageType, made.BurnedInAnnotation = ["DERIVED", "SECONDARY"], "NO"
    now = datetime.now()
    for name in ("Series", "Content"):
        setattr(made, f"{name}Date", now.strftime("%Y%m%d"))
        setattr(made, f"{name}Time", now.strftime("%H%M%S"))
    reference = pydicom.Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    made.SourceImageSequence = [reference]
    made.PhotometricInterpretation, made.SamplesPerPixel, made.PlanarConfiguration = "RGB", 3, 0
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8, 8, 7, 0
    return made

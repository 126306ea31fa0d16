"""DICOM-SEG: label maps written with the bundle's names, and read back onto the grid of their image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
import pydicom_seg
import SimpleITK as sitk

from .converter import as_itk, convert, edited
from .labels import combine
from .legend import MODIFIER, Legend, Segment
from .refusals import Conflict

__all__ = ["is_label", "read_dicom_seg", "write_dicom_seg"]

AXES_TOLERANCE = 1e-3  # by which directions of axes may differ, which DICOM writes with few digits
VOLUME_TOLERANCE = 0.2  # share of a segment's volume that another grid may cost


def write_dicom_seg(
    path: str | Path,
    layers: Sequence[tuple[np.ndarray, Sequence[Segment]]],
    affine: np.ndarray,
    series: str | Path,
    legend: Legend,
    automatic: bool,
) -> None:
    """Write label maps of a series; segments without voxels are left out.

    Args:
        path: file.
        layers: each a label map (x, y, z) and its segments; a segment without a value has 1.
        affine: (4, 4), voxel to millimetres, RAS+.
        series: folder of the series' files.
        legend: of the model.
        automatic: whether the model drew it, rather than a person.

    Raises:
        Conflict: where nothing is marked: DICOM-SEG has no empty ones.
        InputError: where the converter refuses the series.
    """
    there = [(label, [one for one in segments if (label == (one.value or 1)).any()]) for label, segments in layers]
    there = [(label, segments) for label, segments in there if segments]
    if not there:
        raise Conflict("the label is empty, which DICOM-SEG cannot say: mark something, or leave the study unlabelled.")
    with TemporaryDirectory() as folder:
        files = [str(Path(folder, f"{i}.nrrd")) for i in range(len(there))]
        for file, (label, _) in zip(files, there):
            sitk.WriteImage(as_itk(label.astype(np.uint8), affine), file)
        meta = Path(folder, "meta.json")
        meta.write_text(json.dumps(_template([segments for _, segments in there], legend, automatic)))
        arguments = ["--inputImageList", ",".join(files), "--inputDICOMDirectory", str(series)]
        convert([*arguments, "--outputDICOM", str(path), "--inputMetadata", str(meta), "--skip"])
    _name_segments(path, [one for _, segments in there for one in segments], legend, automatic)


def _template(groups: Sequence[Sequence[Segment]], legend: Legend, automatic: bool) -> dict[str, Any]:
    """What dcmqi wants to know, in ASCII: names follow, in UTF-8."""
    attributes = [
        [
            {
                "labelID": one.value or 1,
                "SegmentDescription": f"segment {one.value}",
                "SegmentAlgorithmType": "AUTOMATIC" if automatic else "SEMIAUTOMATIC",
                "SegmentAlgorithmName": "MedSegDiff",
                "recommendedDisplayRGBValue": list(one.colour),
                **{key: {**code, "CodeMeaning": "to be named"} for key, code in one.codes.items()},
            }
            for one in group
        ]
        for group in groups
    ]
    return {
        "ContentCreatorName": "MONAI Label",
        "ClinicalTrialSeriesID": "Session1",
        "ClinicalTrialTimePointID": "1",
        "ClinicalTrialCoordinatingCenterName": "MONAI",
        "SeriesDescription": "to be named",
        "SeriesNumber": str(legend.series_number),
        "InstanceNumber": "1",
        "ContentLabel": "SEGMENTATION",
        "ContentDescription": "Image segmentation",
        "BodyPartExamined": "",
        "segmentAttributes": attributes,
    }


def _name_segments(path: str | Path, segments: Sequence[Segment], legend: Legend, automatic: bool) -> None:
    with edited(path) as dataset:
        dataset.SeriesDescription = legend.series_description if automatic else legend.label_description
        for item, one in zip(dataset.SegmentSequence, segments, strict=True):
            item.SegmentLabel = one.name[:64]
            item.SegmentDescription = one.name[:1024]
            item.SegmentAlgorithmName = f"{legend.model} {legend.version}"[:64]
            for key, code in one.codes.items():
                holder = item.SegmentedPropertyTypeCodeSequence[0] if key == MODIFIER else item
                holder[key].value[0].CodeMeaning = code["CodeMeaning"][:64]


def is_label(dataset: pydicom.Dataset, legend: Legend) -> bool:
    """Whether a DICOM-SEG has a class of the model, and is not what the model drew by itself."""
    items = list(dataset.get("SegmentSequence", []))
    classes = [legend.find(str(item.get("SegmentLabel", ""))) for item in items]
    own = all(
        item.get("SegmentAlgorithmType") == "AUTOMATIC"
        and str(item.get("SegmentAlgorithmName", "")).startswith(legend.model[:32])
        for item in items
    )
    return not own and any(one is not None and bool(one.counts_as) for one in classes)


def read_dicom_seg(path: str | Path, image: str | Path, legend: Legend) -> np.ndarray:
    """Read a DICOM-SEG as a label map on the grid of its image, with the model's values.

    Args:
        path: file.
        image: NIfTI of the series.
        legend: of the model.

    Returns:
        uint8 (x, y, z).

    Raises:
        InputError: for segments that are no class, or overlap.
        Conflict: for one that does not lie on the image.
    """
    dataset = pydicom.dcmread(path)
    result = pydicom_seg.SegmentReader().read(dataset)
    grid = sitk.ReadImage(str(image))
    names = {item.SegmentNumber: str(item.get("SegmentLabel", "")) for item in dataset.SegmentSequence}
    segments = []
    for number in sorted(result.available_segments):
        voxels = sitk.Cast(result.segment_image(number) > 0, sitk.sitkUInt8)
        segments.append((names[number], _onto(voxels, grid, names[number])))
    return combine(segments, legend)


def _onto(segment: sitk.Image, grid: sitk.Image, name: str) -> np.ndarray:
    """A segment on another grid, by nearest neighbours: exact where its voxels are some of the grid's."""
    moved = sitk.GetArrayFromImage(sitk.Resample(segment, grid, sitk.Transform(), sitk.sitkNearestNeighbor)) > 0
    step, wanted = (float(np.prod(one.GetSpacing())) for one in (segment, grid))
    before, after = float(sitk.GetArrayViewFromImage(segment).sum()) * step, float(moved.sum()) * wanted
    aligned = np.allclose(segment.GetDirection(), grid.GetDirection(), atol=AXES_TOLERANCE)
    aligned = aligned and np.allclose(segment.GetSpacing(), grid.GetSpacing(), rtol=AXES_TOLERANCE)
    if abs(after - before) > (AXES_TOLERANCE if aligned else VOLUME_TOLERANCE) * before:
        raise Conflict(
            f"segment {name!r} does not lie on its image: {before:.0f} mm^3, of which the image's grid has "
            f"{after:.0f}: draw it on the series that it refers to."
        )
    return moved.T

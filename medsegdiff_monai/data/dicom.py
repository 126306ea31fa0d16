"""DICOM: a folder is one regular stack of slices, or it is refused with the file and the reason."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.utils import orientation_ras_lps
from monai.utils import MetaKeys, SpaceKeys

from ..errors import InputError, reading
from .bounds import MAX_INFLATION, check_place, check_size
from .dicom_header import SYNTAX, Header, has_dicom_mark, read_header

__all__ = ["check_series", "is_dicom_file", "read_series"]

logger = logging.getLogger(__name__)

SUFFIXES = (".dcm", ".dicom", ".ima")
KIND, INSTANCE, MODALITY, PATIENT = 0x00080008, 0x00080018, 0x00080060, 0x00100020
THICKNESS, ECHO, DISTANCE = 0x00180050, 0x00180086, 0x00180088
STUDY, SERIES, NUMBER, POSITION, ORIENTATION, FRAME, TIME_POINT = (
    0x0020000D, 0x0020000E, 0x00200013, 0x00200032, 0x00200037, 0x00200052, 0x00200100,
)  # fmt: skip
SAMPLES, COLOURS, FRAMES, ROWS, COLUMNS, SPACING, ALLOCATED, STORED, HIGH_BIT, SIGNED, INTERCEPT, SLOPE = (
    0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011, 0x00280030,
    0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00281052, 0x00281053,
)  # fmt: skip
COMMON = {  # of all slices
    PATIENT: "patient", STUDY: "study", MODALITY: "modality", FRAME: "frame of reference", ECHO: "echo",
    TIME_POINT: "time point", SIGNED: "sign",
}  # fmt: skip
TOLERANCE = 0.05  # of the distance of slices, that one may lie off its place: files round positions
DRIFT = 1e-3  # of the length of a stack, that it may lean: files round directions
SAME_PLACE = 0.01  # of the mean distance of slices


@dataclass(frozen=True)
class _Slice:
    """A file of a series; lengths in millimetres, directions in LPS."""

    header: Header
    size: tuple[int, int]  # columns, rows
    spacing: tuple[float, ...] | None  # of rows, of columns
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None

    @property
    def path(self) -> Path:
        return self.header.path


def is_dicom_file(path: Path) -> bool:
    """Whether a file is DICOM by its first bytes, or claims to be by its name."""
    if path.name.upper() == "DICOMDIR":
        return False
    return path.is_file() and (path.suffix.lower() in SUFFIXES or has_dicom_mark(path))


def check_series(folder: Path) -> None:
    """Refuse a folder that is not one regular stack of slices; no pixels are read.

    Raises:
        InputError: naming the file and the reason.
    """
    _stack(folder)


def read_series(folders: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the DICOM series of a folder, or of several that become the channels.

    Returns:
        Values ([channels,] columns, rows, slices), rescaled as the files say, and metadata as MONAI's readers give; the
        affine is RAS+.

    Raises:
        InputError: for a folder that is not one regular stack of slices, and for series of different grids.
    """
    volumes = [_volume(Path(folder)) for folder in folders]
    array, affine = volumes[0]
    for folder, (other, place) in zip(folders[1:], volumes[1:]):
        if other.shape != array.shape or not np.allclose(place, affine, rtol=1e-4, atol=1e-3):
            raise InputError(
                f"{folder}: its grid, {list(other.shape)}, is not that of {folders[0]}, {list(array.shape)}, or lies "
                "elsewhere: resample one of them."
            )
    return np.stack([one for one, _ in volumes]) if len(volumes) > 1 else array, {
        MetaKeys.AFFINE: affine,
        MetaKeys.ORIGINAL_AFFINE: affine.copy(),
        MetaKeys.SPATIAL_SHAPE: np.array(array.shape),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.ORIGINAL_CHANNEL_DIM: 0 if len(volumes) > 1 else float("nan"),
    }


def _volume(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values (columns, rows, slices) of a series, and its affine (4, 4) in RAS+."""
    slices, affine = _stack(folder)
    planes = [_pixels(one) for one in slices]
    affine = orientation_ras_lps(planes[0][1] if affine is None else affine)
    return np.stack([plane for plane, _ in planes], axis=-1), affine


def _stack(folder: Path) -> tuple[list[_Slice], np.ndarray | None]:
    """The slices of a series in order, and its affine (4, 4) in LPS; None for a single slice, which ITK places."""
    slices = [_slice(header) for header in _one_series(folder, _headers(folder))]
    first = slices[0]
    check_size(folder, [*first.size, len(slices)], 4, math.inf)
    if len(slices) == 1:
        return slices, None
    _agree(slices)
    slices, along = _in_order(slices)
    _check_steps(slices, along)
    _check_numbers(folder, slices, (along[-1] - along[0]) / (len(along) - 1))
    return slices, _affine(slices)


def _headers(folder: Path) -> list[Header]:
    """The headers of all DICOM images of a folder; what else is there is named."""
    with reading(folder):
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        check_place(path)
    files = [path for path in paths if path.is_file()]
    marked = [path for path in files if has_dicom_mark(path)]
    headers = [read_header(path) for path in marked]
    images = [header for header in headers if not header.is_no_image]
    suffixes = {header.path.suffix.lower() for header in images}
    others = [path for path in files if path not in set(marked)]
    for path in others:
        if _is_named_as_slice(path, suffixes):
            raise InputError(
                f"{path}: is named like a DICOM file, but is not one: replace it if it is damaged, or move it away."
            )
    left_out = [header.path.name for header in headers if header.is_no_image] + [path.name for path in others]
    if not images:
        raise InputError(f"{folder}: holds no DICOM image{_instead(paths, left_out)}.")
    if left_out:
        _note(f"{folder}: skipped, not DICOM images: {_listed(left_out)}.")
    if within := [path.name for path in paths if path.is_dir() and any(map(is_dicom_file, path.iterdir()))]:
        _note(f"{folder}: the DICOM files in its folders {_listed(within)} are not part of the series.")
    return images


def _is_named_as_slice(path: Path, suffixes: set[str]) -> bool:
    """Whether a file that is no DICOM is likely to be a damaged slice: it has a slice's suffix, or none."""
    own = {suffix.lower() for suffix in path.suffixes}
    last = path.suffix.lower()
    return bool(own & {*SUFFIXES}) or last in suffixes or last[1:].isdigit() or (not last and "" in suffixes)


def _instead(paths: Sequence[Path], left_out: Sequence[str]) -> str:
    """What there is in place of slices, and what to do about it."""
    folders = [path.name for path in paths if path.is_dir()]
    if folders:
        return f", but the folders {_listed(folders)}: give the folder that holds the slices"
    return f" ({_listed(left_out)}): give the folder of a series" if left_out else ": give the folder of a series"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@cache
def _note(text: str) -> None:
    """Say something once: a series may be read more than once."""
    logger.warning(text)


def _one_series(folder: Path, headers: list[Header]) -> list[Header]:
    first = {header.text(SERIES): header.path.name for header in reversed(headers)}
    if len(first) > 1:
        counts = Counter(header.text(SERIES) for header in headers)
        shown = _listed([f"{name} and {counts[uid] - 1} more" for uid, name in first.items()])
        raise InputError(
            f"{folder}: holds {len(first)} DICOM series ({shown}): give each series a folder with its slices alone."
        )
    return headers


def _slice(header: Header) -> _Slice:
    """Check what one file says of itself."""
    path, rows, columns = header.path, header.whole(ROWS), header.whole(COLUMNS)
    if not rows or not columns or not header.pixel_bytes:
        raise InputError(f"{path}: holds no pixels: replace the file, or move it out of the folder.")
    _check_kind(header)
    bits = header.whole(ALLOCATED)
    used, high = header.whole(STORED), header.whole(HIGH_BIT)
    if bits not in (8, 16, 32) or not used or used > bits or high != used - 1 or header.whole(SIGNED) not in (0, 1):
        raise InputError(f"{path}: pixels of {bits} bits, of which {used} up to {high} are used, are not read.")
    slope, _ = (header.numbers(tag, 1) for tag in (SLOPE, INTERCEPT))
    if slope == (0,):
        raise InputError(f"{path}: its RescaleSlope is 0: correct it.")
    available = header.pixel_bytes * (MAX_INFLATION if header.compressed else 1)
    check_size(path, [columns, rows], bits // 8, available)
    spacing, orientation = header.numbers(SPACING, 2), header.numbers(ORIENTATION, 6)
    if spacing is not None and min(spacing) <= 0:
        raise InputError(f"{path}: its pixels are {spacing[0]:g} x {spacing[1]:g} mm: correct PixelSpacing.")
    if orientation is not None:
        axes = np.array(orientation).reshape(2, 3)
        if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-2:
            raise InputError(f"{path}: its rows and columns are not at right angles: correct ImageOrientationPatient.")
    return _Slice(header, (columns, rows), spacing, header.numbers(POSITION, 3), orientation)


def _check_kind(header: Header) -> None:
    """Refuse what would be read as something else than it looks."""
    path, colours = header.path, header.text(COLOURS)
    if header.text(FRAMES) not in ("", "1"):
        raise InputError(
            f"{path}: holds {header.text(FRAMES)[:20]} frames in one file, whose places are not read here: convert it "
            "to NIfTI, for instance with dcm2niix."
        )
    if "MOSAIC" in header.text(KIND):
        raise InputError(f"{path}: holds a mosaic of slices: convert it to NIfTI, for instance with dcm2niix.")
    if header.whole(SAMPLES) not in (None, 1) or colours != "MONOCHROME2":
        raise InputError(
            f"{path}: is {colours or 'of no known colour'}, read are grey images whose high values are bright "
            "(MONOCHROME2): convert it, or move it out of the folder."
        )


def _agree(slices: Sequence[_Slice]) -> None:
    """Refuse slices of different patients, sizes, directions and the like."""
    for tag, what in COMMON.items():
        _same(slices, what, [one.header.text(tag) for one in slices])
    _same(slices, "RescaleSlope, which is there or missing,", [bool(one.header.text(SLOPE)) for one in slices])
    columns, rows = Counter(one.size for one in slices).most_common(1)[0][0]
    _same(slices, f"size (not {columns} x {rows})", [one.size for one in slices])
    for one in slices:
        for name, value in (("PixelSpacing", one.spacing), ("ImageOrientationPatient", one.orientation),
                            ("ImagePositionPatient", one.position)):  # fmt: skip
            if value is None:
                raise InputError(
                    f"{one.path}: has no {name}, so its place in the stack is unknown: give a volume in another format."
                )
    for name, rtol, atol in (("spacing", 1e-3, 0.0), ("orientation", 0.0, 1e-3)):
        values = [getattr(one, name) for one in slices]
        usual = Counter(values).most_common(1)[0][0]
        for one, value in zip(slices, values):
            if not np.allclose(value, usual, rtol=rtol, atol=atol):
                raise InputError(
                    f"{one.path}: its {name} {_short(value)} differs from that of most slices, {_short(usual)} (a "
                    "localizer, or another series?): move it out of the folder."
                )


def _same(slices: Sequence[_Slice], what: str, values: Sequence[Hashable]) -> None:
    usual = Counter(values).most_common(1)[0][0]
    for one, value in zip(slices, values):
        if value != usual:
            raise InputError(
                f"{one.path}: its {what} differs from that of most slices: give each series a folder of its own."
            )


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _normal(one: _Slice) -> np.ndarray:
    row, column = np.array(one.orientation).reshape(2, 3)
    return np.cross(row, column) / np.linalg.norm(np.cross(row, column))


def _in_order(slices: Sequence[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """Sort slices by their place along the normal of the first one's plane; also return these places, in mm."""
    along = np.array([one.position for one in slices]) @ _normal(slices[0])
    order = np.argsort(along, kind="stable")
    return [slices[i] for i in order], along[order]


def _check_steps(slices: Sequence[_Slice], along: np.ndarray) -> None:
    """Refuse slices that are not in a straight row, each as far from the next.

    Args:
        slices: in order.
        along: their places along the normal.
    """
    gaps, mean = np.diff(along), (along[-1] - along[0]) / (len(along) - 1)
    if (same := gaps <= SAME_PLACE * mean).any():
        _refuse_twice(slices, int(np.argmax(same)), len(slices) // max(1, len(slices) - int(same.sum())))
    places = np.arange(len(along))
    even = np.polynomial.Polynomial.fit(places, along, 1)(places)
    if np.abs(along - even).max() > TOLERANCE * mean:
        _refuse_gap(slices, gaps)
    _check_lean(slices, along)


def _refuse_gap(slices: Sequence[_Slice], gaps: np.ndarray) -> None:
    """Name the gap that differs most from the usual one."""
    step = float(np.median(gaps))
    i = int(np.abs(gaps - step).argmax())
    gap, a, b = float(gaps[i]), slices[i].path, slices[i + 1].path.name
    missing = round(gap / step) - 1
    if missing > 0 and abs(gap / step - missing - 1) <= TOLERANCE * (missing + 1):
        raise InputError(
            f"{a}: between it and {b}, which lies {gap:g} mm away, others {step:g} mm, slices are missing ({missing}): "
            "add their files."
        )
    raise InputError(
        f"{a}: the next slice, {b}, lies {gap:g} mm away, others {step:g} mm: add slices that are missing, or resample "
        "the series to even distances."
    )


def _refuse_twice(slices: Sequence[_Slice], i: int, times: int) -> None:
    a, b = slices[i], slices[i + 1]
    if a.header.text(INSTANCE) and a.header.text(INSTANCE) == b.header.text(INSTANCE):
        raise InputError(f"{b.path}: is a copy of {a.path.name}: remove one of them.")
    raise InputError(
        f"{b.path}: lies at the same place as {a.path.name}, so the folder holds {max(2, times)} images of it (time "
        "points, echoes, b-values, two exports?): give each volume a folder of its own."
    )


def _check_lean(slices: Sequence[_Slice], along: np.ndarray) -> None:
    """Refuse a stack whose slices are shifted in their planes, as gantry tilt does."""
    places = np.array([one.position for one in slices])
    places = places - places[0]
    aside = np.linalg.norm(places - np.outer(along - along[0], _normal(slices[0])), axis=1)
    length = along[-1] - along[0]
    if aside.max() > max(TOLERANCE * length / (len(along) - 1), DRIFT * length):
        one = slices[int(aside.argmax())]
        raise InputError(
            f"{one.path}: lies {aside.max():.3g} mm beside the line of the other slices "
            f"(gantry tilt of {math.degrees(math.atan2(aside[-1], length)):.1f} degrees?): convert the series to NIfTI "
            "with dcm2niix, and take the file that it corrects for tilt (its name ends in _Tilt)."
        )


def _check_numbers(folder: Path, slices: Sequence[_Slice], step: float) -> None:
    """Refuse a stack of which every second or third slice is there, as numbers and distances (mm) tell.

    Where the numbers have other holes, a line says so: the slices that are there are a regular stack.
    """
    numbers = [int(n) for one in slices if (n := one.header.text(NUMBER)).lstrip("+-").isdigit()]
    apart = {abs(b - a) for a, b in pairwise(numbers)}
    if len(numbers) == len(slices) and len(apart) == 1 and (times := apart.pop()) > 1:
        header = slices[0].header
        told = (header.numbers(DISTANCE, 1) or header.numbers(THICKNESS, 1) or (0.0,))[0]
        if abs(step / times - told) <= TOLERANCE * told:
            raise InputError(
                f"{header.path}: the next slice is {step:g} mm and {times} numbers away, where one of {told:g} mm "
                "should follow: slices between them are missing, add their files."
            )
    numbers.sort()
    if numbers and (numbers[0] > 1 or any(b - a > 1 for a, b in pairwise(numbers))):
        _note(
            f"{folder}: its {len(slices)} slices are numbered {numbers[0]} to {numbers[-1]}: if others belong to the "
            "series, the mask will not cover them."
        )


def _affine(slices: Sequence[_Slice]) -> np.ndarray:
    """Affine (4, 4) of voxels (column, row, slice) in LPS."""
    first, last = slices[0], slices[-1]
    row, column = np.array(first.orientation).reshape(2, 3)
    assert first.spacing is not None  # told by _agree
    step = (np.array(last.position) - np.array(first.position)) @ _normal(first) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * first.spacing[1], column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = _normal(first) * step, first.position
    return affine


def _pixels(one: _Slice) -> tuple[np.ndarray, np.ndarray]:
    """The values of a slice (columns, rows), and the affine (4, 4) in LPS that ITK gives it."""
    import itk  # slow to import, needed for few files

    try:
        image = itk.imread(str(one.path), pixel_type=itk.F, imageio=itk.GDCMImageIO.New())
    except RuntimeError as error:
        raise InputError(
            f"{one.path}: its pixels cannot be decoded (coded as {one.header.text(SYNTAX)}): replace the file, or "
            "decompress the series, for instance with gdcmconv --raw."
        ) from error
    values = itk.array_from_image(image).T
    if values.shape != (*one.size, 1):
        raise InputError(f"{one.path}: decodes to {list(values.shape)} pixels, not {list(one.size)}: replace the file.")
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) @ np.diag(np.asarray(image.GetSpacing()))
    affine[:3, 3] = np.asarray(image.GetOrigin())
    return values[..., 0], affine

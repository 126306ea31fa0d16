"""DICOM files written byte by byte, so that tests can say anything in them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MR = "1.2.840.10008.5.1.4.1.1.4"
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
LONG = ("OB", "OW", "SQ", "UN")
FIELDS = {  # of a slice: tag and kind
    "kind": (0x00080008, "CS"), "storage": (0x00080016, "UI"), "instance": (0x00080018, "UI"),
    "date": (0x00080021, "DA"), "modality": (0x00080060, "CS"), "patient": (0x00100020, "LO"),
    "thickness": (0x00180050, "DS"), "echo": (0x00180086, "IS"), "distance": (0x00180088, "DS"),
    "study": (0x0020000D, "UI"), "series": (0x0020000E, "UI"), "number": (0x00200013, "IS"),
    "position": (0x00200032, "DS"), "orientation": (0x00200037, "DS"), "frame": (0x00200052, "UI"),
    "time": (0x00200100, "IS"),
    "samples": (0x00280002, "US"), "colours": (0x00280004, "CS"), "frames": (0x00280008, "IS"),
    "rows": (0x00280010, "US"), "columns": (0x00280011, "US"), "spacing": (0x00280030, "DS"),
    "allocated": (0x00280100, "US"), "stored": (0x00280101, "US"), "high": (0x00280102, "US"),
    "signed": (0x00280103, "US"), "intercept": (0x00281052, "DS"), "slope": (0x00281053, "DS"),
}  # fmt: skip


def element(
    tag: int, kind: str, value: Any, order: str = "<", explicit: bool = True, length: int | None = None
) -> bytes:
    """An element of a data set; ``length`` is what it claims, where that is not the truth."""
    if isinstance(value, int):
        value = struct.pack(order + "H", value)
    elif isinstance(value, str):
        value = value.encode("ascii") + b"\0" * (len(value) % 2)
    length = len(value) if length is None else length
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if not explicit:
        return head + struct.pack(order + "I", length) + value
    size = struct.pack(order + ("2xI" if kind in LONG else "H"), length)
    return head + kind.encode() + size + value


def numbers(values: Any) -> str:
    """Decimals as DICOM writes them, with at most 16 characters each."""
    return "\\".join(f"{value:.8f}"[:16] for value in values)


def rle(plane: np.ndarray) -> bytes:
    """Fragments of a plane of two bytes per pixel, each row in a run of up to 128 bytes that are given as they are."""
    segments = []
    for part in (plane >> 8 & 0xFF, plane & 0xFF):
        packed = b"".join(bytes([len(row) - 1]) + row.tobytes() for row in part.astype(np.uint8))
        segments.append(packed + b"\0" * (len(packed) % 2))
    head = struct.pack("<16I", 2, 64, 64 + len(segments[0]), *[0] * 13)
    frame = head + b"".join(segments)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, len(frame)) + frame
    return struct.pack("<HHI", 0xFFFE, 0xE000, 0) + item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def slice_file(plane: np.ndarray, syntax: str = EXPLICIT, **fields: Any) -> bytes:
    """A DICOM file of a plane (rows, columns) of int16.

    Args:
        plane: stored values.
        syntax: how it is coded.
        fields: as in ``FIELDS``; what is None is left out.
    """
    order, explicit = ">" if syntax == BIG_ENDIAN else "<", syntax != IMPLICIT
    told: dict[str, Any] = {
        "storage": MR, "modality": "MR", "patient": "anon", "study": "1.2.3", "series": "1.2.3.4", "frame": "1.2.3.5",
        "samples": 1, "colours": "MONOCHROME2 ", "rows": plane.shape[0], "columns": plane.shape[1],
        "allocated": 16, "stored": 16, "high": 15, "signed": 1, **fields,
    }  # fmt: skip
    meta = element(0x00020002, "UI", told["storage"]) + element(0x00020010, "UI", syntax)
    body = b""
    for name, (tag, kind) in FIELDS.items():
        value = told.get(name)
        if value is not None:
            body += element(tag, kind, value if isinstance(value, (str, int)) else numbers(value), order, explicit)
    if syntax == RLE:
        body += element(0x7FE00010, "OB", rle(plane), length=0xFFFFFFFF)
    else:
        body += element(0x7FE00010, "OW", plane.astype(order + "i2").tobytes(), order, explicit)
    if syntax == DEFLATED:
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(body) + packer.flush()
    return bytes(128) + b"DICM" + meta + body


def write_series(
    folder: Path,
    volume: np.ndarray,
    spacing: tuple[float, float, float] = (0.7, 0.9, 4.0),
    axes: np.ndarray | None = None,
    origin: tuple[float, float, float] = (5.0, -6.0, 7.0),
    name: str = "{}.dcm",
    edit: Callable[[int], dict[str, Any]] = lambda k: {},
    **fields: Any,
) -> list[Path]:
    """Write (x, y, z) of int16 as a series, one file for each z.

    Args:
        folder: made where it is not there.
        volume: values.
        spacing: of x, y and z, in mm.
        axes: directions of x, y and z as columns, in LPS.
        origin: of the first voxel, in LPS.
        name: of a file, with its number.
        edit: what slice k says otherwise.
        fields: what all slices say, see :func:`slice_file`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.eye(3) if axes is None else axes
    paths = []
    for k in range(volume.shape[2]):
        told = {
            "instance": f"1.2.3.4.{k + 1}",
            "number": str(k + 1),
            "position": np.array(origin) + k * spacing[2] * axes[:, 2],
            "orientation": axes[:, :2].T.ravel(),
            "spacing": (spacing[1], spacing[0]),
        }
        paths.append(folder / name.format(k + 1))
        paths[-1].write_bytes(slice_file(volume[:, :, k].T, **{**told, **fields, **edit(k)}))
    return paths

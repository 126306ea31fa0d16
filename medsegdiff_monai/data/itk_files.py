"""NRRD and MetaImage: the header is checked before ITK, whose parsers trust it, reads the file."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ITKReader
from monai.utils import ensure_tuple

from ..errors import InputError
from .bounds import MAX_INFLATION, check_size, inside

__all__ = ["ITK_FILES", "ItkReader", "check_itk"]

MAX_HEADER_BYTES = 2**16
ITK_FILES = (".nrrd", ".mha", ".mhd")
META_HEADER = re.compile(rb"((?:[ \t]*[^\s=]+[ \t]*=[\t\x20-\x7e]{0,1000}\r?\n)*?)ElementDataFile[ \t]*=([^\n]*)\n?")
META_FIELDS = {  # numbers that each holds, as a power of the number of axes
    "DimSize": 1,
    "ElementSpacing": 1,
    "ElementSize": 1,
    "Offset": 1,
    "Position": 1,
    "Origin": 1,
    "CenterOfRotation": 1,
    "TransformMatrix": 2,
    "Rotation": 2,
    "Orientation": 2,
}
META_SIZES = ("ElementSpacing", "ElementSize")
NRRD_HEADER = re.compile(rb"NRRD000\d\r?\n(.*?)\r?\n\r?\n", re.S)
NRRD_FIELD = re.compile(r"([\w ]+?): ?(.*)")
CHUNK = 2**16  # bytes to unpack at once
NRRD_PLACES = ("domain", "space", "none", "???")  # kinds of axes that voxels lie along


@dataclass(frozen=True)
class _Voxels:
    """Where the voxels of an image are.

    Args:
        file: its own, or another one.
        start: first byte of them.
        coding: ``raw``; ``skip``, as raw but with other bytes too; ``gzip`` (that of gzip or zlib), or another.
    """

    file: Path
    start: int
    coding: str

    @property
    def packed(self) -> bool:
        return self.coding not in ("raw", "skip")


class ItkReader(ITKReader):
    """MONAI's reader of what ITK reads, for voxels of any type, of one channel or several; all become floats."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Return the image, or a list of several.

        Args:
            data: a file, or several, after :func:`check_itk`.
            kwargs: of no meaning here.

        Raises:
            InputError: where packed voxels are damaged (ITK takes what it can unpack, and zeros for the rest), or
            axes are not at right angles, which few programs understand alike.
        """
        images = [_read(Path(name)) for name in ensure_tuple(data)]
        return images if len(images) > 1 else images[0]


def check_itk(path: Path) -> None:
    """Refuse a NRRD or MetaImage whose header is damaged, or claims more than the file or the memory can hold.

    Raises:
        InputError: for that.
    """
    data = _find(path)
    shape, channels, item_bytes = _shape(path)
    available = data.file.stat().st_size - data.start
    check_size(path, shape, channels * item_bytes, available * MAX_INFLATION if data.packed else available)
    claimed = math.prod(shape) * channels * item_bytes
    if data.coding == "raw" and available > claimed:
        raise InputError(
            f"{path}: claims {shape} voxels, {claimed} bytes, but there are {available}: correct the header, or "
            "replace the file."
        )


def _read(path: Path) -> Any:
    import itk  # slow to import, needed for few files

    data = _find(path)
    shape, channels, item_bytes = _shape(path)
    if data.coding == "gzip":
        _check_deflated(path, data, math.prod(shape) * channels * item_bytes)
    image = itk.imread(str(path), pixel_type=itk.F if channels == 1 else itk.VariableLengthVector[itk.F])
    axes = itk.array_from_matrix(image.GetDirection())
    if not np.allclose(axes.T @ axes, np.eye(len(axes)), atol=1e-2):
        raise InputError(f"{path}: its axes are not at right angles, {axes.tolist()}: resample it to axes that are.")
    return image


def _check_deflated(path: Path, data: _Voxels, size: int) -> None:
    """Refuse voxels whose checksum is wrong, or that are not as many as the header says."""
    unpacker, total = zlib.decompressobj(zlib.MAX_WBITS | 32), 0  # of zlib or gzip, as its first bytes say
    with data.file.open("rb") as file:
        file.seek(data.start)
        while not unpacker.eof and total <= size and (chunk := file.read(CHUNK)):
            total += len(unpacker.decompress(chunk))
    if not unpacker.eof or total != size:
        raise InputError(f"{path}: its voxels unpack to {total} bytes, not {size}: replace the file, it is damaged.")


def _find(path: Path) -> _Voxels:
    """Check the header that ITK's parsers trust, and say where the voxels are."""
    with path.open("rb") as file:
        head = file.read(MAX_HEADER_BYTES)
    name, start, coding = (_check_nrrd if path.suffix.lower() == ".nrrd" else _check_meta)(path, head)
    if name is not None and re.search(r"%\d*d|^LIST\b", name):
        raise InputError(f"{path}: keeps its voxels in several files: save it as one file.")
    if name is not None and not name.isprintable():
        raise _damaged(path, f"its voxels are in {name!r}")
    return _Voxels(path if name is None else inside(path.parent, name), start, coding)


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: its header is damaged ({what[:100]}): replace the file.")


def _numbers(path: Path, key: str, text: str, count: int) -> list[float]:
    """The finite numbers of a field."""
    try:
        found = [float(part) for part in text.split()]
    except ValueError:
        found = []
    if len(found) != count or not all(math.isfinite(value) for value in found):
        raise _damaged(path, f"{key} is {text.strip()[:60]!r}, not {count} numbers")
    return found


def _once(path: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise _damaged(path, f"{twice[0]} is there twice")
    return dict(pairs)


def _check_meta(path: Path, head: bytes) -> tuple[str | None, int, str]:
    """Where a MetaImage keeps its voxels: the file, None for its own, from which byte, and how they are coded.

    ITK's parser would write out of the bounds of its arrays.
    """
    found = META_HEADER.match(head)
    if found is None:
        raise _damaged(path, "it is not a list of fields that ends in ElementDataFile")
    lines = [line.split("=", 1) for line in found[1].decode("ascii").splitlines()]
    fields = _once(path, [(key.strip(), value.strip()) for key, value in lines])
    axes = len(fields.get("DimSize", "").split())
    if not axes or fields.get("NDims") != str(axes):
        raise _damaged(path, f"NDims is {fields.get('NDims')}, DimSize {fields.get('DimSize')}")
    for key, power in META_FIELDS.items():
        if key in fields:
            values = _numbers(path, key, fields[key], axes**power)
            if key in META_SIZES and 0 in values:
                raise _damaged(path, f"{key} is {fields[key]}")
    if not re.fullmatch(r"-?\d{1,9}", fields.get("HeaderSize", "0")):
        raise _damaged(path, f"HeaderSize is {fields['HeaderSize']}")
    name = found[2].strip().decode("utf-8", "replace")
    skip = int(fields.get("HeaderSize", "0"))
    coding = "gzip" if fields.get("CompressedData", "False")[:1] in "Tt1" else "raw" if skip >= 0 else "skip"
    return (None, found.end(), coding) if name.upper() == "LOCAL" else (name, max(0, skip), coding)


def _check_nrrd(path: Path, head: bytes) -> tuple[str | None, int, str]:
    """Where a NRRD keeps its voxels, as :func:`_check_meta`."""
    found = NRRD_HEADER.match(head) or re.match(rb"NRRD000\d\r?\n(.*)", head, re.S)  # of detached data
    if found is None:
        raise _damaged(path, "it does not begin with NRRD")
    lines = found[1].decode("latin-1").splitlines()
    matches = [NRRD_FIELD.fullmatch(line) for line in lines if not line.startswith("#") and ":=" not in line]
    if not all(matches):
        raise _damaged(path, "a line is not a field")
    fields = _once(path, [(match[1].lower().replace(" ", ""), match[2]) for match in matches if match])
    _check_nrrd_axes(path, fields)
    name = fields["datafile"].strip() if "datafile" in fields else None
    coding = {"gz": "gzip"}.get(told := fields.get("encoding", "").strip().lower(), told)
    if {"lineskip", "byteskip"} & fields.keys():
        coding = "skip" if coding == "raw" else "other"
    return name, (0 if name else found.end()), coding


def _check_nrrd_axes(path: Path, fields: dict[str, str]) -> None:
    dimension = fields.get("dimension", "").strip()
    if not re.fullmatch(r"\d{1,2}", dimension) or not 1 <= int(dimension) <= 16:
        raise _damaged(path, f"dimension is {dimension!r}")
    axes = int(dimension)
    sizes = _numbers(path, "sizes", fields.get("sizes", ""), axes)
    if min(sizes) < 1 or any(size != int(size) for size in sizes):
        raise _damaged(path, f"sizes are {fields['sizes']}")
    kinds = fields["kinds"].split() if "kinds" in fields else ["domain"] * axes
    if len(kinds) != axes:
        raise _damaged(path, f"{len(kinds)} kinds of {axes} axes")
    spatial = [kind.lower() in NRRD_PLACES for kind in kinds]
    if "spacings" in fields:
        parts = fields["spacings"].split()
        kept = [part for part, is_place in zip(parts, spatial) if is_place] if len(parts) == axes else parts
        if 0 in _numbers(path, "spacings", " ".join(kept), sum(spatial)):
            raise _damaged(path, f"spacings are {fields['spacings']}")
    _check_nrrd_space(path, fields, axes)


def _check_nrrd_space(path: Path, fields: dict[str, str], axes: int) -> None:
    vectors = re.findall(r"\(([^()]*)\)|none", fields.get("spacedirections", ""))
    if "spacedirections" in fields and len(vectors) != axes:
        raise _damaged(path, f"space directions of {len(vectors)} axes, of which there are {axes}")
    known = [vector for vector in vectors if vector]
    origin = re.findall(r"\(([^()]*)\)", fields.get("spaceorigin", ""))
    if "spaceorigin" in fields and len(origin) != 1:
        raise _damaged(path, f"space origin is {fields['spaceorigin']}")
    for vector in [*known, *origin]:
        _numbers(path, "a vector", vector.replace(",", " "), len((known or origin)[0].split(",")))


def _shape(path: Path) -> tuple[list[int], int, int]:
    """Voxels along each axis, their channels, and the bytes of each."""
    import itk

    header: Any = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if header is None:
        raise InputError(f"{path}: cannot be read as an image of its kind: replace the file, it may be truncated.")
    header.SetFileName(str(path))
    header.ReadImageInformation()
    shape = [int(header.GetDimensions(i)) for i in range(header.GetNumberOfDimensions())]
    return shape, header.GetNumberOfComponents(), header.GetComponentSize()

"""Reading of files that nobody vouches for: bounded, refused in one sentence, and never outside their folder."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from PIL import Image

from ..errors import InputError

__all__ = [
    "check_header",
    "files_below",
    "inside",
    "load_image",
    "memory_bytes",
    "open_picture",
    "picture_values",
    "read_json",
    "read_xml",
    "reading",
]

MAX_TEXT_BYTES = 64 * 2**20  # of a JSON or XML file
MAX_INFLATION = 1100  # a deflated byte holds at most 1032
MAX_HEADER_BYTES = 2**16  # of a NRRD or MetaImage
MAX_PIXELS = 89_478_485  # of a picture; Pillow warns above
MEMORY_SHARE = 4  # an image as float64 may fill one part in so many of the memory
NIFTI = (".nii", ".nii.gz")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
ITK_FILES = (".nrrd", ".mha", ".mhd")
META_FIELDS = {  # of a MetaImage: numbers that each holds, as a power of the number of axes
    b"DimSize": 1,
    b"ElementSpacing": 1,
    b"ElementSize": 1,
    b"Offset": 1,
    b"Position": 1,
    b"Origin": 1,
    b"CenterOfRotation": 1,
    b"TransformMatrix": 2,
    b"Rotation": 2,
    b"Orientation": 2,
}
IMAGE_SUFFIXES = (*NIFTI, *PICTURES, *ITK_FILES)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a reader raises into one sentence that names the file.

    Raises:
        InputError: in place of any other exception.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # readers raise whatever they like; the file is what matters
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: cannot be read ({reason[-1][:200]}): replace the file, it may be truncated."
        ) from error


def memory_bytes() -> int:
    """Physical memory of the machine, in bytes; 16 GiB where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return 16 * 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones (``.DS_Store``, ``._*``) and ``__MACOSX``."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        found += [Path(root, name) for name in sorted(files) if not name.startswith(".")]
    return found


def inside(folder: Path, name: Any) -> Path:
    """The file that a table or list names, which must lie below ``folder``.

    Raises:
        InputError: for a path that leads elsewhere.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{folder}: {str(name)[:100]!r} is no file name: correct the list.")
    base = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(base, name))
    if not path.startswith(base + os.sep):
        raise InputError(f"{folder}: the path {name[:200]!r} leads out of the folder: give paths inside it.")
    return Path(path)


def _bounded_bytes(path: Path) -> bytes:
    with reading(path):
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"{path}: is larger than {MAX_TEXT_BYTES >> 20} MiB, which no such file needs: replace it.")
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file of bounded size.

    Raises:
        InputError: where it is missing, too large or no JSON.
    """
    content = _bounded_bytes(path)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}): correct it.") from error


def read_xml(path: Path) -> ElementTree.Element:
    """Read an XML file of bounded size; one that declares a document type, and so entities, is refused unparsed.

    Raises:
        InputError: where it is missing, too large, malformed or declares a document type.
    """

    def refuse(*_: object) -> None:
        raise InputError(f"{path}: declares a document type (DTD), which may hide an entity attack: remove it.")

    content = _bounded_bytes(path)
    with reading(path):
        scan = expat.ParserCreate()  # sees through encodings, unlike a search for "<!DOCTYPE"
        scan.StartDoctypeDeclHandler = refuse
        scan.Parse(content, True)
        return ElementTree.fromstring(content)


def _check_size(path: Path, shape: Sequence[int], item_bytes: int, available: float) -> None:
    """Refuse an image that claims more voxels than its file or the memory can hold."""
    if not shape or min(shape) < 1:
        raise InputError(f"{path}: claims the size {list(shape)}: replace the file, its header is damaged.")
    voxels = math.prod(int(n) for n in shape)
    if voxels * item_bytes > available:
        raise InputError(
            f"{path}: claims {list(shape)} voxels, more than the file can hold: replace it, it is truncated or forged."
        )
    if voxels * 8 > memory_bytes() // MEMORY_SHARE:
        raise InputError(
            f"{path}: {list(shape)} voxels need {voxels * 8 / 2**30:.1f} GiB, more than a quarter of the memory: "
            "crop or resample the image."
        )


def _check_nifti(path: Path) -> None:
    header: Any = nib.load(path).header
    size = path.stat().st_size
    packed = path.name.lower().endswith(".gz")
    available = size * MAX_INFLATION if packed else size - header.get_data_offset()
    _check_size(path, header.get_data_shape(), header.get_data_dtype().itemsize, available)


def _picture(path: Path) -> Image.Image:
    """Open a picture: its size is checked, its pixels are not yet read."""
    image = Image.open(path, formats=("PNG", "JPEG", "BMP"))
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{path}: claims {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}: "
            "it may be a decompression bomb; replace it."
        )
    return image


def _detached_data(path: Path) -> str | None:
    """The file that holds the voxels of a NRRD or MetaImage, as the header names it; None where they follow it."""
    with path.open("rb") as file:
        head = file.read(MAX_HEADER_BYTES)
    if path.suffix.lower() == ".nrrd":
        found = re.search(rb"^data ?file:[ \t]*(.*)$", head, re.M | re.I)
        return found[1].strip().decode("utf-8", "replace") if found else None
    found = re.match(rb"((?:[ \t]*\w+[ \t]*=[\t\x20-\x7e]{0,1000}\r?\n)*?)ElementDataFile[ \t]*=(.*)", head)
    fields = dict(line.split(b"=", 1) for line in found[1].splitlines()) if found else {}
    lengths = {key.strip(): len(value.split()) for key, value in fields.items()}
    axes = lengths.get(b"DimSize", 0)
    wrong = [key for key, power in META_FIELDS.items() if lengths.get(key, axes**power) != axes**power]
    if (
        found is None
        or wrong
        or next((v.strip() for k, v in fields.items() if k.strip() == b"NDims"), b"") != b"%d" % axes
    ):
        raise InputError(f"{path}: its header is damaged: replace the file.")  # ITK's parser would write out of bounds
    name = found[2].strip().decode("utf-8", "replace")
    return None if name == "LOCAL" else name


def _check_itk(path: Path) -> None:
    import itk  # slow to import, needed for few files

    name = _detached_data(path)
    data = path if name is None else inside(path.parent, name)
    shape, item_bytes = _itk_shape(path, itk)
    _check_size(path, shape, item_bytes, data.stat().st_size * MAX_INFLATION)


def _itk_shape(path: Path, itk: Any) -> tuple[list[int], int]:
    header = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if header is None:
        raise InputError(f"{path}: is no image of its kind: replace the file, it may be truncated.")
    header.SetFileName(str(path))
    header.ReadImageInformation()
    shape = [int(header.GetDimensions(i)) for i in range(header.GetNumberOfDimensions())]
    return shape, header.GetNumberOfComponents() * header.GetComponentSize()


def _check_series(folder: Path) -> None:
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.SetDirectory(str(folder))
    series = names.GetSeriesUIDs()
    if len(series) != 1:
        raise InputError(f"{folder}: holds {len(series)} DICOM series: give a folder with exactly one.")
    files = [Path(name) for name in names.GetFileNames(series[0])]
    for file in files:
        shape, item_bytes = _itk_shape(file, itk)
        _check_size(file, shape, item_bytes, file.stat().st_size * MAX_INFLATION)
    _check_size(folder, [*shape[:2], len(files)], item_bytes, math.inf)


def check_header(path: str | Path) -> None:
    """Refuse, before any memory is taken, an image whose header claims what its file or the memory cannot hold.

    Args:
        path: NIfTI, PNG, JPEG, BMP, NRRD, MHA, MHD, or the folder of a DICOM series.

    Raises:
        InputError: for that, for a missing or unreadable file, and for other formats.
    """
    path = Path(path)
    name = path.name.lower()
    with reading(path):
        if not path.exists():
            raise InputError(f"{path}: no such file: correct the path in the data list, or add the file.")
        if path.is_dir():
            _check_series(path)
        elif name.endswith(NIFTI):
            _check_nifti(path)
        elif name.endswith(PICTURES):
            _picture(path).close()
        elif name.endswith(ITK_FILES):
            _check_itk(path)
        else:
            raise InputError(f"{path}: is of no kind that is read ({', '.join(IMAGE_SUFFIXES)}, DICOM folder).")


class _Loader(threading.local):
    """One loader for each thread: MONAI's ``NibabelReader`` keeps the file names of the image that it reads."""

    def __init__(self) -> None:
        self.load = Compose([LoadImage(image_only=True), EnsureChannelFirst()], map_items=False)


_loader = _Loader()


def load_image(path: str | Path | Sequence[str]) -> MetaTensor:
    """Read an image as (channels, *spatial), after :func:`check_header`; several files become the channels.

    Raises:
        InputError: where a file is missing, cannot be read or claims too much.
    """
    files = [str(path)] if isinstance(path, (str, Path)) else list(path)
    for file in files:
        check_header(file)
    with reading(files[0]):
        return _loader.load(files if len(files) > 1 else files[0])


def open_picture(path: Path) -> Image.Image:
    """Read a PNG, JPEG or BMP of bounded size, pixels included.

    Raises:
        InputError: where it cannot be read or is too large.
    """
    with reading(path):
        image = _picture(path)
        image.load()
    return image


def picture_values(path: Path) -> np.ndarray:
    """Read a mask saved as a picture: (rows, columns), the grey values of grey, palette and colour pictures.

    Raises:
        InputError: where it cannot be read.
    """
    return np.asarray(open_picture(path).convert("L"))

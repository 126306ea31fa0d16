"""Reading of files that nobody vouches for: bounded, refused in one sentence, and never outside their folder."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import nibabel as nib
import numpy as np
import torch
from monai.data import ImageReader, MetaTensor, NibabelReader
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from monai.utils import MetaKeys, ensure_tuple
from nibabel import FileHolder
from nibabel.openers import ImageOpener

from ..errors import InputError, reading
from .bounds import MAX_INFLATION, check_place, check_size, inside, memory_bytes
from .dicom import check_series, is_dicom_file, read_series
from .itk_files import ITK_FILES, ItkReader, check_itk
from .pictures import PICTURES, PictureReader, check_picture, label_values

__all__ = [
    "FileReader",
    "check_header",
    "files_below",
    "inside",
    "load_image",
    "load_label",
    "memory_bytes",
    "open_nifti",
    "read_json",
    "read_xml",
    "reading",
]

CHUNK = 2**20  # bytes to unpack at once
MAX_TEXT_BYTES = 64 * 2**20  # of a JSON or XML file
NIFTI = (".nii", ".nii.gz")
NIFTI_SIZES = (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # of headers: first in a file
GZIP = b"\x1f\x8b"
IMAGE_SUFFIXES = (*NIFTI, *PICTURES, *ITK_FILES)


def files_below(folder: Path, above: frozenset[str] = frozenset()) -> list[Path]:
    """All files below a folder, sorted, without hidden ones (``.DS_Store``, ``._*``) and ``__MACOSX``.

    Links to folders are followed, but for those that lead back to a folder that they lie in.

    Args:
        folder: folder.
        above: real paths of the folders that it was reached through.

    Raises:
        InputError: for a folder that cannot be read.
    """
    here = os.path.realpath(folder)
    if here in above:
        return []
    with reading(folder):
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    paths = [Path(folder, name) for name in names]
    found = [path for path in paths if not path.is_dir()]
    for path in paths:
        if path.is_dir():
            found += files_below(path, above | {here})
    return found


def _bounded_bytes(path: Path) -> bytes:
    with reading(path):
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"{path}: is larger than {MAX_TEXT_BYTES >> 20} MiB, too large for such a file: replace it.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, of which the parser would keep the last value of each key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file of bounded size.

    Raises:
        InputError: where it is missing, too large or no JSON.
    """
    content = _bounded_bytes(path)
    try:
        return json.loads(content, object_pairs_hook=_unique)  # in whichever UTF
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


def open_nifti(path: str | Path) -> Any:
    """Open a NIfTI file; its voxels are not yet read.

    nibabel knows suffixes in lower and upper case, and takes others for those of a file that is not there.
    """
    suffix = "".join(Path(path).suffixes)
    if suffix in (suffix.lower(), suffix.upper()):
        return nib.load(path)
    with ImageOpener(str(path)) as file:
        header = file.read(4)
    kind = nib.Nifti2Image if header in NIFTI_SIZES[2:] else nib.Nifti1Image
    return kind.from_file_map(kind.make_file_map({"image": str(path)}))


def _check_packing(path: Path, packed: bool) -> None:
    """Refuse what was packed or unpacked without a change of its name, which decides how nibabel reads it."""
    with path.open("rb") as file:
        begin = file.read(4)
    if begin[:2] == GZIP and not packed:
        raise InputError(f"{path}: is packed by gzip: rename it to {path.name}.gz.")
    if packed and begin in NIFTI_SIZES:
        raise InputError(f"{path}: is not packed by gzip: rename it to {path.name[: -len('.gz')]}.")


def _check_nifti(path: Path) -> None:
    packed = path.name.lower().endswith(".gz")
    _check_packing(path, packed)
    image = open_nifti(path)
    header, size = image.header, path.stat().st_size
    if image.dataobj.offset < header.sizeof_hdr:
        raise InputError(
            f"{path}: says that its voxels begin at byte {image.dataobj.offset}, within its header of "
            f"{header.sizeof_hdr}: correct vox_offset."
        )
    available = size * MAX_INFLATION if packed else size - image.dataobj.offset
    check_size(path, header.get_data_shape(), header.get_data_dtype().itemsize, available)
    if header.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: holds complex numbers or colours: save one number for each voxel and channel.")
    if not packed:
        _check_rest(path, image, available - math.prod(image.shape) * header.get_data_dtype().itemsize)
    unit = header.get_xyzt_units()[0]
    if unit in ("meter", "micron"):
        raise InputError(f"{path}: gives its voxel size in {unit}s: rewrite its header in mm.")


def _check_rest(path: str | Path, image: Any, rest: int) -> None:
    """Refuse a file of more slices than its header says; fewer bytes than a slice may be padding.

    Args:
        path: file.
        image: of nibabel.
        rest: bytes behind its voxels.
    """
    if rest >= math.prod(image.shape[:-1]) * image.get_data_dtype().itemsize:
        raise InputError(
            f"{path}: its header says {list(image.shape)} voxels, but {rest} bytes more are there: replace the file, "
            "or correct its header."
        )


def check_header(path: str | Path) -> None:
    """Refuse, before any memory is taken, an image whose header claims what its file or the memory cannot hold.

    Args:
        path: NIfTI, PNG, JPEG, BMP, TIFF, NRRD, MHA, MHD, or the folder of a DICOM series.

    Raises:
        InputError: for that, for a missing or unreadable file, and for other formats.
    """
    path = Path(path)
    name = path.name.lower()
    with reading(path):
        check_place(path)
        if path.is_dir():
            check_series(path)
        elif name.endswith(NIFTI):
            _check_nifti(path)
        elif name.endswith(PICTURES):
            check_picture(path)
        elif name.endswith(ITK_FILES):
            check_itk(path)
        else:
            remedy = "; give the folder of its series" if is_dicom_file(path) else ""
            raise InputError(f"{path}: has no supported format ({', '.join(IMAGE_SUFFIXES)}, DICOM folder){remedy}.")


class _NiftiReader(NibabelReader):
    """MONAI's reader of NIfTI, for suffixes in any mixture of cases too, such as ``.Nii.Gz``.

    An image lies where nibabel and viewers see it. (MONAI takes the qform, and where that is not set no direction at
    all, in place of an sform whose voxels are not exactly those of ``pixdim``.)
    """

    def read(self, data: Any, **kwargs: Any) -> Any:
        self.filenames = ensure_tuple(data)
        images = [open_nifti(name) for name in self.filenames]
        return images if len(images) > 1 else images[0]

    def _get_array_data(self, img: Any, filename: Any) -> np.ndarray:
        """The voxels of an image; a packed file is read to its end, where its checksum is.

        (nibabel stops behind the last voxel.)
        """
        if not str(filename).lower().endswith(".gz"):
            return np.asarray(super()._get_array_data(img, filename))
        with gzip.open(filename) as file:
            voxels = np.asanyarray(type(img).from_file_map({"image": FileHolder(fileobj=file)}).dataobj, order="C")
            rest = sum(map(len, iter(lambda: file.read(CHUNK), b"")))
        _check_rest(filename, img, rest)
        return voxels


class FileReader(ImageReader):
    """The reader of all kinds of files that are read here, for :class:`monai.transforms.LoadImaged`.

    ``LoadImaged`` tries other readers where ``read`` raises; therefore files are read in ``get_data``, so that what is
    refused stays refused.

    Args:
        channels: of the network, see :class:`medsegdiff_monai.data.pictures.PictureReader`.
    """

    def __init__(self, channels: int | None = None) -> None:
        self.channels = channels

    def verify_suffix(self, filename: Any) -> bool:
        """All suffixes are taken: what cannot be read is refused."""
        return True

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Return the names of the files."""
        return data

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Read a file, or several as channels, and return array and metadata.

        Raises:
            InputError: where one cannot be read.
        """
        files = [str(file) for file in ensure_tuple(img)]
        if all(os.path.isdir(file) for file in files):
            return read_series(files)
        for file in files:
            check_header(file)
        with reading(files[0]):
            reader = self._reader(Path(files[0]))
            return reader.get_data(reader.read(files if len(files) > 1 else files[0]))

    def _reader(self, path: Path) -> ImageReader:
        name = path.name.lower()
        if name.endswith(NIFTI):
            return _NiftiReader()
        return PictureReader(self.channels) if name.endswith(PICTURES) else ItkReader()


@cache
def _loader(channels: int | None = None) -> Compose:
    return Compose([LoadImage(FileReader(channels), image_only=True), EnsureChannelFirst()], map_items=False)


def load_image(path: str | Path | Sequence[str], channels: int | None = None) -> MetaTensor:
    """Read an image as (channels, *spatial), after :func:`check_header`; several files become the channels.

    Args:
        path: the file, or files.
        channels: of the network, where it is known; pictures of equal channels count as grey unless there are three.

    Raises:
        InputError: where a file is missing, cannot be read or claims too much.
    """
    files = [str(path)] if isinstance(path, (str, Path)) else list(path)
    with reading(files[0]):
        return _loader(channels)(files if len(files) > 1 else files[0])


def image_spacing(path: str | Path | Sequence[str], image: MetaTensor) -> tuple[list[float], str]:
    """Return the spacing of an image's voxels, one number for each axis, and its unit: ``mm``, or ``px`` for pictures.

    Pictures carry no spacing that could be relied on: theirs is 1.

    Args:
        path: the file, or files.
        image: what was read from it, (channels, *spatial).
    """
    dims = image.ndim - 1
    file = str(path) if isinstance(path, (str, Path)) else path[0]
    if file.lower().endswith(PICTURES):
        return [1.0] * dims, "px"
    return [float(step) for step in image.pixdim[:dims]], "mm"


def load_label(path: str | Path) -> MetaTensor:
    """Read a label map as (channels, *spatial), one channel where it is sound, after :func:`check_header`.

    Raises:
        InputError: where it is missing, cannot be read, or is a picture of something else than labels.
    """
    if not str(path).lower().endswith(PICTURES):
        return load_image(path)
    check_header(path)
    values = label_values(path)
    meta = {MetaKeys.SPATIAL_SHAPE: np.array(values.shape[::-1]), "filename_or_obj": str(path)}
    return MetaTensor(torch.from_numpy(values.T.astype(np.float32))[None], meta=meta)

"""Files that lie about their size, and other formats in disguise, are refused before memory is taken."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import dicom_files
import itk
import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw
from PIL import Image

from medsegdiff_monai.data import reading
from medsegdiff_monai.data.pictures import open_picture
from medsegdiff_monai.errors import InputError


def forged_nifti(shape, datatype=16, bits=32):
    header = bytearray(nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_bytes())
    header[40:56] = struct.pack("<8h", len(shape), *shape, *[1] * (7 - len(shape)))
    header[70:74] = struct.pack("<2h", datatype, bits)
    return bytes(header)


@pytest.mark.parametrize("packed", [False, True])
def test_nifti_that_claims_a_trillion_voxels(tmp_path, packed):
    content = forged_nifti((10000, 10000, 10000))
    path = tmp_path / ("x.nii.gz" if packed else "x.nii")
    path.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"claims \[10000, 10000, 10000\] voxels, more than the file can hold"):
        reading.load_image(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_nifti_too_large_for_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "x.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((40, 40, 40), np.uint8), np.eye(4)), path)
    monkeypatch.setattr("medsegdiff_monai.data.bounds.memory_bytes", lambda: 2**20)
    with pytest.raises(InputError, match="more than a quarter of the memory"):
        reading.load_image(path)


def test_nifti_of_no_size(tmp_path):
    path = tmp_path / "x.nii"
    path.write_bytes(forged_nifti((0, 5, 5)))
    with pytest.raises(InputError, match=r"claims the size \[0, 5, 5\]"):
        reading.load_image(path)


@pytest.mark.parametrize("text", ["ElementDataFile = ../secret.raw", "ElementDataFile = /etc/passwd"])
def test_detached_data_elsewhere(tmp_path, text):
    (tmp_path / "secret.raw").write_bytes(bytes(8))
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "x.mhd").write_text(f"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n{text}\n")
    with pytest.raises(InputError, match="leads out of the folder"):
        reading.load_image(folder / "x.mhd")


def test_detached_data_beside(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(range(8)))
    head = "ObjectType = Image\nNDims = 3\nDimSize = {} 2 2\nElementType = MET_UCHAR\nElementDataFile = x.raw\n"
    (tmp_path / "x.mhd").write_text(head.format(2))
    assert reading.load_image(tmp_path / "x.mhd").shape == (1, 2, 2, 2)
    (tmp_path / "x.mhd").write_text(head.format(1000000))
    with pytest.raises(InputError, match="more than the file can hold"):
        reading.load_image(tmp_path / "x.mhd")


def test_nrrd_that_claims_too_much(tmp_path):
    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 10000 10000 10000\nencoding: gzip\n\n"
    (tmp_path / "x.nrrd").write_bytes(head.encode() + gzip.compress(bytes(100)))
    with pytest.raises(InputError, match="more than the file can hold"):
        reading.load_image(tmp_path / "x.nrrd")
    (tmp_path / "y.nrrd").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"y.nrrd: "):
        reading.load_image(tmp_path / "y.nrrd")


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_decompression_bomb(tmp_path):
    (tmp_path / "x.png").write_bytes(png(50000, 50000))
    for read in (reading.load_image, open_picture):
        with pytest.raises(InputError, match="decompression bomb"):
            read(tmp_path / "x.png")


def test_other_format_in_disguise(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "x.png", "GIF")
    with pytest.raises(InputError, match="cannot be read"):
        reading.load_image(tmp_path / "x.png")


def test_text_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 2**20)
    (tmp_path / "x").write_bytes(b" " * (2**20 + 1))
    for read in (reading.read_json, reading.read_xml):
        with pytest.raises(InputError, match="is larger than 1 MiB"):
            read(tmp_path / "x")


def test_folder_that_is_no_series(tmp_path):
    with pytest.raises(InputError, match="holds no DICOM image: give the folder of a series"):
        reading.load_image(tmp_path)


def test_unknown_suffix(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(InputError, match="has no supported format"):
        reading.load_image(tmp_path / "x.pkl")


def test_images_of_several_files_in_threads(tmp_path):
    for i in range(4):
        nib.save(nib.Nifti1Image(np.full((6, 5), i, np.int16), np.eye(4)), tmp_path / f"{i}.nii.gz")
    files = [str(tmp_path / f"{i}.nii.gz") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        shapes = list(pool.map(lambda n: reading.load_image(files if n % 2 else files[0]).shape[0], range(200)))
    assert shapes == [1, 4] * 100


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"NDims = 3", b"NDims = 9"),
        (b"DimSize = 4 4 4", b"DimSize = 4 4 4 4"),
        (b"Offset = 0 0 0", b"Offset = \xff\0 0"),
        (b"L", b""),
    ],
)
def test_damaged_meta_image(tmp_path, old, new):
    path = tmp_path / "x.mha"
    itk.imwrite(itk.image_from_array(np.zeros((4, 4, 4), np.uint8)), str(path))
    assert reading.load_image(path).shape == (1, 4, 4, 4)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(InputError, match=r"x.mha: "):
        reading.load_image(path)


def test_dicom_series_is_checked_file_by_file(tmp_path):
    raw.dicom(tmp_path / "d", np.zeros((6, 7, 5), np.int16))
    assert reading.load_image(tmp_path / "d").shape == (1, 6, 7, 5)
    for file in (tmp_path / "d").iterdir():
        content = file.read_bytes()
        for tag, size in ((b"\x28\0\x10\0", b"\x07\0"), (b"\x28\0\x11\0", b"\x06\0")):  # rows, columns; implicit VR
            content = content.replace(tag + b"\2\0\0\0" + size, tag + b"\2\0\0\0\xff\xff")
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"dcm: claims .* more than the file can hold"):
        reading.load_image(tmp_path / "d")


def nifti(**header):
    """The bytes of a small volume, of which each voxel is another one."""
    image = nib.Nifti1Image(np.arange(720, dtype=np.int16).reshape(8, 9, 10), np.eye(4))
    for name, value in header.items():
        image.header[name] = value
    return image.to_bytes()


def damaged(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


PACKED = gzip.compress(nifti(), compresslevel=0)
DAMAGED = {
    "checksum.nii.gz": (damaged(PACKED, len(PACKED) - 6), "CRC check failed"),
    "voxel.nii.gz": (damaged(PACKED, len(PACKED) - 20), "CRC check failed"),
    "cut.nii.gz": (PACKED[:-3], "ended before"),
    "junk.nii.gz": (PACKED + b"junk", "Not a gzipped file"),
    "twice.nii.gz": (PACKED * 2, r"\[8, 9, 10\] voxels, but 1792 bytes more are there"),
    "slice.nii.gz": (gzip.compress(nifti() + bytes(144)), "144 bytes more are there"),
    "slice.nii": (nifti() + bytes(144), "144 bytes more are there"),
    "packed.nii": (PACKED, r"is packed by gzip: rename it to packed.nii.gz"),
    "plain.nii.gz": (nifti(), r"is not packed by gzip: rename it to plain.nii\."),
    "text.nii.gz": (b"<html>", "not a gzip file"),
    "begin.nii": (nifti()[:108] + bytes(4) + nifti()[112:], "begin at byte 0, within its header of 348"),
    "micron.nii": (nifti(xyzt_units=3), "voxel size in microns"),
    "colours.nii": (forged_nifti((2, 2, 2), 128, 24) + bytes(99), "complex numbers or colours"),
    "complex.nii": (forged_nifti((2, 2, 2), 32, 64) + bytes(99), "complex numbers or colours"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_nifti_that_is_not_what_its_header_says(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    for read in (reading.load_image, reading.load_label):
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize("rest", [bytes(9), b""])
def test_padding_behind_the_voxels_is_no_slice(tmp_path, rest):
    (tmp_path / "x.nii").write_bytes(nifti() + rest)
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(nifti() + rest) + bytes(64))
    for name in ("x.nii", "y.nii.gz"):
        assert reading.load_image(tmp_path / name).numpy().ravel().tolist() == list(range(720))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("name", ["pipe.nii.gz", "pipe.png", "pipe.mha", "series/9.dcm"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    dicom_files.write_series(tmp_path / "series", np.zeros((4, 5, 3), np.int16))
    os.mkfifo(tmp_path / name)
    given = tmp_path / name.split("/")[0]
    for read in (reading.load_image, reading.load_label, reading.check_header):
        with pytest.raises(InputError, match=f"{name}: is a pipe"):
            read(given)

"""NRRD and MetaImage lie where their headers say, or are refused before ITK reads them."""

from __future__ import annotations

import sys

import itk
import nibabel as nib
import numpy as np
import pytest

from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.errors import InputError

VOLUME = np.random.default_rng(0).integers(0, 999, (5, 4, 3)).astype(np.int16)
PLACES = {  # what a header says, and the affine (RAS+) that it means
    "lps": (
        ["space: left-posterior-superior", "space directions: (0.8,0,0) (0,1.2,0) (0,0,3)", "space origin: (5,-6,7)"],
        [[-0.8, 0, 0, -5], [0, -1.2, 0, 6], [0, 0, 3, 7]],
    ),
    "ras": (
        ["space: right-anterior-superior", "space directions: (0.8,0,0) (0,1.2,0) (0,0,3)", "space origin: (5,-6,7)"],
        [[0.8, 0, 0, 5], [0, 1.2, 0, -6], [0, 0, 3, 7]],
    ),
    "las": (
        ["space: LAS", "space directions: (0.8,0,0) (0,1.2,0) (0,0,3)", "space origin: (5,-6,7)"],
        [[-0.8, 0, 0, -5], [0, 1.2, 0, -6], [0, 0, 3, 7]],
    ),
    "turned": (
        ["space: LPS", "space directions: (0, 0.8, 0) (0, 0, 1.2) (3, 0, 0)", "space origin: (5, -6, 7)"],
        [[0, 0, -3, -5], [-0.8, 0, 0, 6], [0, 1.2, 0, 7]],
    ),
    "spacings": (["spacings: 0.8 1.2 3"], [[-0.8, 0, 0, 0], [0, -1.2, 0, 0], [0, 0, 3, 0]]),
}


def nrrd(lines=(), data=None, **fields):
    told = {"type": "short", "dimension": "3", "sizes": "5 4 3", "endian": "little", "encoding": "raw", **fields}
    head = ["NRRD0004", "# by hand", *(f"{key}: {value}" for key, value in told.items()), *lines, "note:=of no meaning"]
    data = VOLUME.astype("<i2").tobytes(order="F") if data is None else data
    return "\n".join([*head, "", ""]).encode() + data


def meta(data=None, **fields):
    told = {"ObjectType": "Image", "NDims": 3, "DimSize": "5 4 3", "ElementSpacing": "0.8 1.2 3", "Offset": "5 -6 7"}
    told |= {"ElementType": "MET_SHORT", **fields, "ElementDataFile": "LOCAL"}
    head = "".join(f"{key} = {value}\n" for key, value in told.items())
    return head.encode() + (VOLUME.astype("<i2").tobytes(order="F") if data is None else data)


@pytest.mark.parametrize("has_pynrrd", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_nrrd_lies_where_its_header_says(tmp_path, monkeypatch, name, has_pynrrd):
    """Whether or not pynrrd is installed, which MONAI would read it with."""
    if not has_pynrrd:
        monkeypatch.setitem(sys.modules, "nrrd", None)
    lines, affine = PLACES[name]
    (tmp_path / "x.nrrd").write_bytes(nrrd(lines))
    image = load_image(tmp_path / "x.nrrd")
    np.testing.assert_array_equal(image[0], VOLUME)
    np.testing.assert_allclose(image.affine[:3], affine, atol=1e-6)


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mhd"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_itk_writes_lies_where_it_writes_nifti(tmp_path, suffix, packed):
    image = itk.image_from_array(VOLUME)
    image.SetSpacing([0.8, 1.2, 3])
    image.SetOrigin([5, -6, 7])
    for name in (f"x.{suffix}", "x.nii.gz"):
        itk.imwrite(image, str(tmp_path / name), compression=packed)
    read = load_image(tmp_path / f"x.{suffix}")
    np.testing.assert_allclose(read.affine, nib.load(tmp_path / "x.nii.gz").affine, atol=1e-6)
    np.testing.assert_array_equal(read, load_image(tmp_path / "x.nii.gz"))


def test_channels_have_no_place(tmp_path):
    """Of types, too, that ITK's Python has no vectors of."""
    values = np.arange(40, dtype="<i2").reshape(2, 5, 4, order="F")
    lines = ["kinds: vector domain domain", "spacings: nan 0.8 1.2"]
    (tmp_path / "x.nrrd").write_bytes(nrrd(lines, values.tobytes(order="F"), sizes="2 5 4"))
    flat = {"NDims": 2, "DimSize": "5 4", "ElementSpacing": "0.8 1.2", "Offset": "0 0", "ElementNumberOfChannels": 2}
    (tmp_path / "x.mha").write_bytes(meta(values.tobytes(order="F"), **flat))
    for name in ("x.nrrd", "x.mha"):
        image = load_image(tmp_path / name)
        np.testing.assert_array_equal(image, values)
        np.testing.assert_allclose(np.abs(np.diag(image.affine)[:2]), [0.8, 1.2])


def test_bytes_before_the_voxels_are_skipped(tmp_path):
    voxels = VOLUME.astype("<i2").tobytes(order="F")
    (tmp_path / "x.nrrd").write_bytes(nrrd(["byte skip: -1"], b"more" + voxels))
    (tmp_path / "x.raw").write_bytes(b"more" + voxels)
    for skip in (-1, 4):
        head = meta(b"", HeaderSize=skip).replace(b"LOCAL", b"x.raw")
        (tmp_path / f"{skip}.mhd").write_bytes(head)
    for name in ("x.nrrd", "-1.mhd", "4.mhd"):
        np.testing.assert_array_equal(load_image(tmp_path / name)[0], VOLUME)


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_every_wrong_bit_of_packed_voxels_is_found(tmp_path, name):
    """ITK gives what it could unpack, and says nothing."""
    itk.imwrite(itk.image_from_array(VOLUME), str(tmp_path / name), compression=True)
    whole = (tmp_path / name).read_bytes()
    first = whole.index(b"LOCAL\n") + 6 if name == "x.mha" else whole.index(b"\n\n") + 12  # after the head of gzip
    for i in range(first, len(whole), 3):
        (tmp_path / name).write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        with pytest.raises(InputError, match=rf"{name}: "):
            load_image(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nrrd(["spacings: nan 1 1"]), "spacings is 'nan 1 1', not 3 numbers"),
        (nrrd(["spacings: 0 1 1"]), "spacings are 0 1 1"),
        (nrrd(["spacings: 1 1"]), "spacings is '1 1', not 3 numbers"),
        (nrrd(["space: LPS", "space directions: (1,0,0) (0,inf,0) (0,0,1)"]), "a vector is '0 inf 0'"),
        (nrrd(["space: LPS", "space directions: (1,0,0) (0,1,0)"]), "space directions of 2 axes, of which there are 3"),
        (nrrd(["space: LPS", "space origin: 1 2 3"]), "space origin is 1 2 3"),
        (nrrd(["space: LPS", "space directions: (1,0,0) (0.5,1,0) (0,0,1)"]), "its axes are not at right angles"),
        (nrrd(["kinds: domain domain"]), "2 kinds of 3 axes"),
        (nrrd(sizes="5 4 -3"), "sizes are 5 4 -3"),
        (nrrd(sizes="5 4"), "sizes is '5 4', not 3 numbers"),
        (nrrd(sizes="5 4 3000000"), r"claims \[5, 4, 3000000\] voxels, more than the file can hold"),
        (nrrd(dimension="99999999999"), "dimension is '99999999999'"),
        (nrrd(["type: float"]), "type is there twice"),
        (nrrd(["data file: slice%03d.raw 1 3 1"]), "keeps its voxels in several files"),
        (nrrd(["data file: LIST"]), "keeps its voxels in several files"),
        (nrrd(["data file: ../x.raw"]), "leads out of the folder"),
        (nrrd(data=bytes(119)), r"claims \[5, 4, 3\] voxels, more than the file can hold"),
        (nrrd(sizes="5 4 2"), r"claims \[5, 4, 2\] voxels, 80 bytes, but there are 120"),
        (nrrd(encoding="gzip", data=b"no zip"), "cannot be read"),
        (nrrd()[5:], "it does not begin with NRRD"),
    ],
)
def test_damaged_nrrd_is_refused(tmp_path, content, message):
    (tmp_path / "x.nrrd").write_bytes(content)
    with pytest.raises(InputError, match=rf"x.nrrd: .*{message}|{message}"):
        load_image(tmp_path / "x.nrrd")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (meta(ElementSpacing="nan 1 1"), "ElementSpacing is 'nan 1 1', not 3 numbers"),
        (meta(ElementSpacing="0 1 1"), "ElementSpacing is 0 1 1"),
        (meta(TransformMatrix="1 0 0 0 1 0 0 0"), "TransformMatrix is '1 0 0 0 1 0 0 0', not 9 numbers"),
        (meta(TransformMatrix="1 0 0 0.5 1 0 0 0 1"), "its axes are not at right angles"),
        (meta(HeaderSize="x"), "HeaderSize is x"),
        (meta(NDims=12), "NDims is 12, DimSize 5 4 3"),
        (meta(DimSize="5 4 -3"), r"claims|cannot be read"),
        (meta(DimSize="5 4 3000000"), "more than the file can hold"),
        (meta(data=bytes(119)), r"claims \[5, 4, 3\] voxels, more than the file can hold"),
        (meta(DimSize="5 4 2"), r"claims \[5, 4, 2\] voxels, 80 bytes, but there are 120"),
        (meta(CompressedData="True", data=b"no zip"), "cannot be read"),
        (meta().replace(b"LOCAL", b"LIST\na.raw"), "keeps its voxels in several files"),
        (meta().replace(b"LOCAL", b"LO\x01CAL"), r"its voxels are in 'LO.x01CAL'"),
        (meta().replace(b"NDims = 3", b"NDims = 3\nNDims = 3"), "NDims is there twice"),
        (meta()[:40], "is not a list of fields that ends in ElementDataFile"),
    ],
)
def test_damaged_meta_image_is_refused(tmp_path, content, message):
    (tmp_path / "x.mha").write_bytes(content)
    with pytest.raises(InputError, match=rf"x.mha: .*({message})"):
        load_image(tmp_path / "x.mha")


def test_keys_that_other_programs_add_to_a_header_are_no_damage(tmp_path):
    """Such as those of a NIfTI, which SimpleITK copies."""
    (tmp_path / "x.mha").write_bytes(meta(**{"dim[0]": 3, "ITK_FileNotes": "of no meaning", "pixdim[1]": 0.8}))
    np.testing.assert_array_equal(load_image(tmp_path / "x.mha")[0], VOLUME)

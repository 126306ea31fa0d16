"""A DICOM folder is one regular stack, placed as the standard says, or it is refused with the file and the reason."""

from __future__ import annotations

import logging
import math
import os
import shutil

import dicom_files as files
import numpy as np
import pytest
from monai.data import ITKReader
from monai.transforms import LoadImage
from scipy.spatial.transform import Rotation

from medsegdiff_monai.data import dicom
from medsegdiff_monai.data.reading import check_header, load_image
from medsegdiff_monai.errors import InputError

VOLUME = np.random.default_rng(0).integers(-500, 500, (7, 6, 5)).astype(np.int16)
RAS = np.diag([-1.0, -1.0, 1.0])
SYNTAXES = [files.EXPLICIT, files.IMPLICIT, files.BIG_ENDIAN, files.DEFLATED, files.RLE]
REPORT = "1.2.840.10008.5.1.4.1.1.88.22"


def at(k, **fields):
    """What slice k says otherwise."""
    return {"edit": lambda i: fields if i == k else {}}


def places(*z, **more):
    return {"edit": lambda i: {"position": (0, 0, z[i]), **more}}


def tilted(degrees):
    step = 4 * math.tan(math.radians(degrees))
    return {"edit": lambda i: {"position": (0, i * step, 4 * i)}}


@pytest.mark.parametrize("seed", range(4))
def test_voxels_lie_where_the_standard_says(tmp_path, seed):
    """As PS3.3 C.7.6.2.1.1 places each pixel of each file, and as ITK reads the series; in file names' order or not."""
    axes = Rotation.random(random_state=seed).as_matrix()
    spacing, origin = (0.7, 0.9, 2.5), (10.0, -20.0, 30.0)
    named = [3, 1, 5, 2, 4] if seed % 2 else [1, 2, 3, 4, 5]
    files.write_series(tmp_path / "s", VOLUME, spacing, axes, origin)
    for old, new in zip(range(1, 6), named):
        os.rename(tmp_path / f"s/{old}.dcm", tmp_path / f"s/IM{new}")
    image = load_image(tmp_path / "s")
    for i, j, k in ((0, 0, 0), (6, 0, 4), (0, 5, 2), (6, 5, 4)):
        position = np.array(origin) + k * spacing[2] * axes[:, 2]
        place = position + axes[:, 0] * spacing[0] * i + axes[:, 1] * spacing[1] * j
        np.testing.assert_allclose((image.affine.numpy() @ [i, j, k, 1])[:3], RAS @ place, atol=1e-5)
        assert image[0, i, j, k] == VOLUME[i, j, k]
    reference = LoadImage(ITKReader(), image_only=True)(str(tmp_path / "s"))
    np.testing.assert_allclose(image.affine, reference.affine, atol=1e-5)
    np.testing.assert_array_equal(image[0], reference)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_codings_give_the_same_values(tmp_path, syntax):
    volume = np.random.default_rng(0).integers(-500, 500, (17, 16, 3)).astype(np.int16)
    files.write_series(tmp_path / "s", volume, syntax=syntax)
    np.testing.assert_array_equal(load_image(tmp_path / "s")[0], volume)


def test_a_coding_that_is_not_decoded_is_refused(tmp_path):
    files.write_series(tmp_path / "s", VOLUME, syntax="1.2.840.10008.1.2.9")
    with pytest.raises(InputError, match=r"1.dcm: its pixels cannot be decoded \(coded as 1.2.840.10008.1.2.9\)"):
        load_image(tmp_path / "s")


def test_slices_are_rescaled_each_by_its_own_numbers(tmp_path):
    files.write_series(
        tmp_path / "s", VOLUME, edit=lambda k: {"slope": f"{k + 0.5} ", "intercept": "-10 "}, modality="PT"
    )
    np.testing.assert_allclose(load_image(tmp_path / "s")[0], VOLUME * (np.arange(5) + 0.5) - 10)


def test_a_single_slice_lies_where_itk_reads_it(tmp_path):
    files.write_series(tmp_path / "s", VOLUME[:, :, :1])
    image, reference = load_image(tmp_path / "s"), LoadImage(ITKReader(), image_only=True)(str(tmp_path / "s"))
    assert image.shape == (1, 7, 6, 1)
    np.testing.assert_allclose(image.affine, reference.affine, atol=1e-6)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (places(0, 4, 8, 20, 24), r"3.dcm: between it and 4.dcm, which lies 12 mm away, others 4 mm, .* missing \(2\)"),
        (places(0, 4, 8, 12, 20), r"4.dcm: between it and 5.dcm, .* missing \(1\)"),
        (places(0, 4, 8, 13, 17), "3.dcm: the next slice, 4.dcm, lies 5 mm away, others 4 mm"),
        (places(0, 4, 8, 13, 18), "others 4.5 mm"),
        (places(0, 4, 8, 0, 4), "4.dcm: lies at the same place as 1.dcm, so the folder holds 2 images of it"),
        (places(0, 0, 0, 0, 0), "2.dcm: lies at the same place as 1.dcm, so the folder holds 5 images"),
        (places(0, 4, 8, 12, 12, instance="1.2"), "5.dcm: is a copy of 4.dcm: remove one"),
        (tilted(20), r"5.dcm: lies 5.82 mm beside .*gantry tilt of 20.0 degrees.*dcm2niix"),
        (tilted(1.5), "gantry tilt of 1.5 degrees"),
        (at(2, orientation=(0, 1, 0, 0, 0, -1)), r"3.dcm: its orientation .* differs .*a localizer"),
        (at(2, spacing=(0.9, 0.8)), r"3.dcm: its spacing \(0.9, 0.8\) differs"),
        (at(2, series="1.9"), r"s: holds 2 DICOM series \(1.dcm and 3 more, 3.dcm and 0 more\)"),
        (at(2, study="1.9"), "3.dcm: its study differs"),
        (at(2, patient="else"), "3.dcm: its patient differs from that of most slices: give each series"),
        (at(2, frame="1.9"), "3.dcm: its frame of reference differs"),
        (at(2, position=None), "3.dcm: has no ImagePositionPatient"),
        (at(2, position=(0, 0)), r"3.dcm: \(0020,0032\) is '.*', not 3 numbers"),
        (at(2, position="0\\0\\nan "), r"3.dcm: \(0020,0032\) is '0..0..nan', not 3 numbers"),
        (at(2, spacing=None), "3.dcm: has no PixelSpacing"),
        (at(2, spacing=(0, 1)), "3.dcm: its pixels are 0 x 1 mm"),
        (at(2, orientation=(1, 0, 0, 1, 0, 0)), "3.dcm: its rows and columns are not at right angles"),
        (at(2, rows=7, columns=6), r"3.dcm: its size \(not 7 x 6\) differs"),
        (at(2, rows=600), "3.dcm: claims .* more than the file can hold"),
        (at(2, rows=0), "3.dcm: holds no pixels"),
        (at(2, frames="2 "), "3.dcm: holds 2 frames in one file"),
        (at(2, colours="MONOCHROME1 "), "3.dcm: is MONOCHROME1"),
        (at(2, colours="RGB ", samples=3), "3.dcm: is RGB"),
        (at(2, kind="ORIGINAL\\PRIMARY\\M\\MOSAIC"), "3.dcm: holds a mosaic"),
        (at(2, stored=17), "3.dcm: pixels of 16 bits, of which 17"),
        (at(2, signed=0), "3.dcm: its sign differs from that of most slices"),
        (at(2, slope="2 "), "3.dcm: its RescaleSlope, which is there or missing, differs"),
        (at(2, slope="0 "), "3.dcm: its RescaleSlope is 0"),
        (at(2, slope="2,5 "), r"3.dcm: \(0028,1053\) is '2,5', not a number"),
        (at(2, intercept="x "), r"3.dcm: \(0028,1052\) is 'x', not a number"),
    ],
)
def test_what_is_no_regular_stack_is_refused(tmp_path, told, message):
    files.write_series(tmp_path / "s", VOLUME, **told)
    for read in (check_header, load_image):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "s")


@pytest.mark.parametrize(
    "told",
    [
        places(*np.round(1.25 * np.arange(5), 1)),  # as some scanners round
        at(2, date="20200102"),  # midnight passed
        at(2, orientation=(1, 0, 0, 0, 0.99999, 0.0004)),
        tilted(0.01),
    ],
)
def test_rounding_and_midnight_are_no_faults(tmp_path, told):
    files.write_series(tmp_path / "s", VOLUME, **told)
    np.testing.assert_array_equal(load_image(tmp_path / "s")[0], VOLUME)


def test_every_cut_of_a_slice_is_refused(tmp_path):
    path = files.write_series(tmp_path / "s", VOLUME)[4]
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"5.dcm: "):
            check_header(tmp_path / "s")


def test_lengths_are_checked_before_memory_is_taken(tmp_path, monkeypatch):
    """ITK would take 2 GiB for this; a file that claims so much never gets to it."""
    monkeypatch.setattr(dicom, "_pixels", None)
    path = files.write_series(tmp_path / "s", VOLUME)[1]
    private = files.element(0x00090010, "UN", b"", length=2**31)
    path.write_bytes(path.read_bytes().replace(files.element(0x00100020, "LO", "anon"), private))
    with pytest.raises(
        InputError, match=r"2.dcm: element \(0009,0010\) claims 2147483648 bytes, but only \d+ are left"
    ):
        load_image(tmp_path / "s")


ITEM = b"\xfe\xff\x00\xe0"


@pytest.mark.parametrize(
    ("content", "length", "message"),
    [
        (ITEM + b"\4\0\0\0abcd", None, "it ends within an element|is of an unknown kind"),
        (ITEM + b"\xff\0\0\0", None, "an item claims 255 bytes, but only 0 are left"),
        (ITEM + b"\xff\xff\xff\xff", None, "an item has no end"),
        (b"\x08\0\0\1\0\0\0\0SHab", None, "element .* is of an unknown kind"),
        (files.element(0x00080100, "SH", "ab"), None, r"a sequence holds \(0008,0100\)"),
        (b"", 0xFFFFFFFF, r"a sequence holds \(0010,0020\)"),
    ],
)
def test_damaged_sequences(tmp_path, content, length, message):
    path = files.write_series(tmp_path / "s", VOLUME)[1]
    patient = files.element(0x00100020, "LO", "anon")
    sequence = files.element(0x00081140, "SQ", content, length=length)
    path.write_bytes(path.read_bytes().replace(patient, sequence + patient))
    with pytest.raises(InputError, match=rf"2.dcm: .*({message})"):
        check_header(tmp_path / "s")


def test_sequences_are_passed_over(tmp_path):
    """Nested, with and without lengths, also where their kind is unknown, as private ones are."""
    code = files.element(0x00080100, "SH", "ab")
    inner = files.element(0x00081150, "SQ", ITEM + b"\xff\xff\xff\xff" + code + b"\xfe\xff\x0d\xe0\0\0\0\0")
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    outer = files.element(0x00081140, "SQ", ITEM + len(inner).to_bytes(4, "little") + inner + end, length=0xFFFFFFFF)
    plain = ITEM + b"\x0a\0\0\0" + files.element(0x00090011, "", "ab", explicit=False) + end
    private = files.element(0x00090010, "UN", plain, length=0xFFFFFFFF)
    patient = files.element(0x00100020, "LO", "anon")
    for path in files.write_series(tmp_path / "s", VOLUME):
        path.write_bytes(path.read_bytes().replace(patient, outer + private + patient))
    np.testing.assert_array_equal(load_image(tmp_path / "s")[0], VOLUME)


def test_only_headers_are_read_to_check_and_pixels_once_to_load(tmp_path, monkeypatch):
    files.write_series(tmp_path / "s", VOLUME)
    read = []
    pixels = dicom._pixels
    monkeypatch.setattr(dicom, "_pixels", lambda one: read.append(one.path.name) or pixels(one))
    check_header(tmp_path / "s")
    assert read == []
    load_image(tmp_path / "s")
    assert read == [f"{k}.dcm" for k in range(1, 6)]


@pytest.mark.parametrize(
    "name", ["1.2.840.113619.2.5.{}", "MR.1.2.826.{}", "IM{:04d}", "{}.DCM", "{}.Ima", "slice {}", "{}.MRDC"]
)
def test_files_are_known_by_their_first_bytes(tmp_path, name):
    paths = files.write_series(tmp_path / "s", VOLUME, name=name)
    assert all(dicom.is_dicom_file(path) for path in paths)
    np.testing.assert_array_equal(load_image(tmp_path / "s")[0], VOLUME)
    paths[4].write_bytes(paths[4].read_bytes()[100:])
    with pytest.raises(InputError, match="is named like a DICOM file, but is not one"):
        load_image(tmp_path / "s")


@pytest.mark.parametrize("name", ["6.dcm", "6.dcm.part", "6.dcm.gz", "6", "1.2.840.6"])
def test_a_file_that_may_be_a_lost_slice_is_refused(tmp_path, name):
    files.write_series(tmp_path / "s", VOLUME, name="1.2.840.{}" if name.startswith("1.2") else "{}.dcm")
    if name == "6":
        shutil.move(tmp_path / "s/5.dcm", tmp_path / "s/5")
    (tmp_path / "s" / name).write_bytes(b"half")
    with pytest.raises(InputError, match=f"{name}: is named like a DICOM file, but is not one"):
        load_image(tmp_path / "s")


def test_a_link_to_nothing_is_refused(tmp_path):
    path = files.write_series(tmp_path / "s", VOLUME)[4]
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"5.dcm: is a link to a file that is not there"):
        load_image(tmp_path / "s")


def test_what_is_left_out_is_named(tmp_path, caplog):
    files.write_series(tmp_path / "s", VOLUME)
    files.write_series(tmp_path / "s/later", VOLUME)
    (tmp_path / "s/readme.txt").write_text("x")
    (tmp_path / "s/DICOMDIR").write_bytes(b"x")
    report = files.slice_file(VOLUME[:, :, 0].T, storage=REPORT, rows=None, columns=None)
    (tmp_path / "s/report").write_bytes(report[: report.index(b"\xe0\x7f\x10\0")])
    with caplog.at_level(logging.WARNING):
        assert load_image(tmp_path / "s").shape == (1, 7, 6, 5)
    assert "skipped, not DICOM images: report, DICOMDIR, readme.txt" in caplog.text
    assert "the DICOM files in its folders later are not part of the series" in caplog.text


def test_numbers_with_holes_are_named(tmp_path, caplog):
    """Slices lost at an end, or every second one, leave a regular stack: all that tells is their numbers."""
    paths = files.write_series(tmp_path / "s", VOLUME)
    paths[0].unlink()
    load_image(tmp_path / "s")
    assert "its 4 slices are numbered 2 to 5: if others belong to the series" in caplog.text


def test_a_folder_of_series_and_a_single_file_say_what_to_give(tmp_path):
    files.write_series(tmp_path / "patient/head", VOLUME)
    with pytest.raises(InputError, match="patient: holds no DICOM image, but the folders head: give the folder that"):
        load_image(tmp_path / "patient")
    with pytest.raises(InputError, match=r"1.dcm: has no supported format .*; give the folder of its series"):
        load_image(tmp_path / "patient/head/1.dcm")


def test_several_series_of_one_grid_are_channels(tmp_path):
    files.write_series(tmp_path / "a", VOLUME)
    files.write_series(tmp_path / "b", -VOLUME, series="1.2.9")
    files.write_series(tmp_path / "c", VOLUME, origin=(9, 9, 9))
    image = load_image([str(tmp_path / "a"), str(tmp_path / "b")])
    np.testing.assert_array_equal(image, [VOLUME, -VOLUME])
    np.testing.assert_allclose(image.affine, load_image(tmp_path / "a").affine)
    with pytest.raises(InputError, match=r"c: its grid, .* is not that of .*a, .* or lies elsewhere"):
        load_image([str(tmp_path / "a"), str(tmp_path / "c")])


@pytest.mark.parametrize("told", [{"thickness": "2.0"}, {"thickness": "4.0", "distance": "2.0"}])
def test_every_second_slice_is_missed_where_the_files_tell_how_far_apart_they_are(tmp_path, told):
    paths = files.write_series(tmp_path / "s", VOLUME, spacing=(1, 1, 2), **told)
    assert load_image(tmp_path / "s").shape == (1, 7, 6, 5)
    for path in paths[1::2]:
        path.unlink()
    with pytest.raises(InputError, match=r"1.dcm: the next slice is 4 mm and 2 numbers away, where one of 2 mm"):
        load_image(tmp_path / "s")


@pytest.mark.parametrize("told", [{}, {"thickness": "4.0"}, {"thickness": "2.0", "distance": "4.0"}])
def test_every_second_number_is_no_gap_where_slices_are_as_far_apart_as_told(tmp_path, told, caplog):
    """Such as the slices of one echo of two."""
    paths = files.write_series(tmp_path / "s", VOLUME, spacing=(1, 1, 2), **told)
    for path in paths[1::2]:
        path.unlink()
    assert load_image(tmp_path / "s").pixdim[2] == 4
    assert "its 3 slices are numbered 1 to 5" in caplog.text


@pytest.mark.parametrize("field", ["echo", "time"])
def test_echoes_and_time_points_at_places_of_their_own_are_no_stack(tmp_path, field):
    files.write_series(tmp_path / "s", VOLUME, edit=lambda k: {field: "2" if k == 3 else "1"})
    with pytest.raises(InputError, match=rf"4.dcm: its {field}.* differs from that of most slices"):
        load_image(tmp_path / "s")

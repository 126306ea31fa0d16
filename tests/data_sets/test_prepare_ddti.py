"""DDTI: each quirk of the raw data."""

from __future__ import annotations

import numpy as np
import pytest
import raw_layouts as raw

from medsegdiff_monai.errors import InputError


def test_outlines_of_the_owners_folder(tmp_path, run, capsys):
    folder = raw.ddti(tmp_path / "raw")
    with pytest.raises(InputError, match=r"1 bad cases were left out, 7 are ready.*\n.*7.xml: cannot be read"):
        run("ddti")
    (folder / "7.xml").unlink()
    out = run("ddti")
    names = sorted(out.names("training") + out.names("validation") + out.names("test"))
    assert names == ["11_1", "12_2", "1_1", "2_1", "3_1", "3_2", "9_1"]
    square = np.zeros((56, 36))
    square[10:21, 8:19] = 1  # closed and filled, x first as MONAI reads it
    for name in ("1_1", "3_1", "11_1", "12_2"):
        np.testing.assert_array_equal(out.array(name), square)
    assert out.array("2_1").sum() == square.sum() + 11 * 8  # the union of two outlines
    assert out.array("3_2").sum() == 11 * 8  # the second image and svg of one mark, in order
    np.testing.assert_array_equal(np.argwhere(out.array("9_1")).max(0), (15, 15))  # out of frame: clipped
    assert out.array("9_1")[0, 0] == 1
    assert out.array("1_1", "image").shape == (56, 36)  # grey
    assert (out.array("9_1", "image")[:6] < 60).all()  # the black border stays
    notes = capsys.readouterr().out
    for text in (
        "4_1.jpg: has no usable outline",
        "5_1.jpg: has no usable outline",
        "6_1.jpg: has no usable outline",
        "8_1.jpg: has no usable outline",
        "12_1.jpg: has no usable outline",
        "10.xml: names 10_1, but there is no such picture",
        "13_1.jpg: no XML names it",
        "11.xml: calls itself 99",
    ):
        assert text in notes


def test_split_keeps_patients_whole(tmp_path, run):
    raw.ddti(tmp_path / "raw")
    (tmp_path / "raw/DDTI_V1/DDTI_V1/7.xml").unlink()
    out = run("ddti", seed=3)
    where = [
        split for split in ("training", "validation", "test") for name in out.names(split) if name.startswith("3_")
    ]
    assert len(where) == 2 and len(set(where)) == 1
    assert out.content["split"] == {"drawn_by_seed": 3, "images": 7}


def write_case(root, text):
    root.mkdir(parents=True, exist_ok=True)
    (root / "1.xml").write_text(text)
    raw.ultrasound(root / "1_1.jpg")


@pytest.mark.parametrize(
    "entity",
    [
        '<!DOCTYPE case [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
        '<!DOCTYPE case [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE case SYSTEM "http://example.org/x.dtd">',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entity_attack_is_refused(tmp_path, run, entity, encoding):
    text = raw.ddti_xml([(1, "[]")]).replace("\n<case>", f"\n{entity}<case>").replace("UTF-8", encoding)
    write_case(tmp_path / "raw", "")
    (tmp_path / "raw/1.xml").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match="document type"):
        run("ddti")


@pytest.mark.parametrize(
    ("name", "message"),
    [("/../../../etc/passwd", "leads out of the folder"), ("one", "is not a number"), ("", "is not a number")],
)
def test_picture_name_that_climbs_out(tmp_path, run, name, message):
    write_case(tmp_path / "raw", raw.ddti_xml([(name, "[]")]))
    with pytest.raises(InputError, match=message):
        run("ddti")


@pytest.mark.parametrize(
    "svg",
    [
        "[" * 100000,
        "{}",
        "3",
        '[{"points": 5}]',
        '[{"points": [1, 2, 3]}]',
        '[{"points": [{"x": NaN, "y": 1e999}]}]',
        "[5]",
    ],
)
def test_odd_json_is_no_outline(tmp_path, run, svg, capsys):
    write_case(tmp_path / "raw", raw.ddti_xml([(1, svg)]))
    with pytest.raises(InputError, match="no case can be used"):
        run("ddti")


def test_masks_of_2023_are_transposed(tmp_path, run, capsys):
    raw.ddti_nifti(tmp_path / "raw")
    out = run("ddti")
    expected = np.zeros((56, 36))
    expected[10:20, 5:9] = 1
    np.testing.assert_array_equal(out.array("2_2"), expected)
    assert "masks of 2023" in capsys.readouterr().out
    patients = {item["patient"] for s in ("training", "validation", "test") for item in out.content[s]}
    assert patients == {"1", "2"}


def test_raters_of_2023(tmp_path, run):
    raw.ddti_nifti(tmp_path / "raw", ("ResidentA", "ResidentB"))
    with pytest.raises(InputError, match=r"several raters outlined 1_1 .*set --rater"):
        run("ddti")
    assert run("ddti", rater="residentb").array("1_1").sum() == 40


def test_masks_of_2023_need_the_pictures(tmp_path, run):
    raw.volume(tmp_path / "raw/1_1.nii", np.zeros((56, 36, 1), np.int16))
    with pytest.raises(InputError, match="no picture: put the pictures"):
        run("ddti")


def test_masks_of_2023_of_another_size(tmp_path, run):
    raw.ddti_nifti(tmp_path / "raw")
    raw.volume(tmp_path / "raw/RadiologistSegmentations/Segmentations_1/1_1.nii", np.zeros((36, 56, 1), np.int16))
    with pytest.raises(InputError, match="must be equal"):
        run("ddti")


def test_repackaging(tmp_path, run, capsys):
    raw.ddti_pairs(tmp_path / "raw")
    out = run("ddti")
    for name in ("0000", "3", "0004"):  # 0/1, 0/255, JPEG
        label = out.array(name)
        assert label.shape == (28, 36) and set(np.unique(label)) == {0, 1}
        assert abs(label.sum() - 100) < 12
    assert "lost the patients" in capsys.readouterr().out


def test_folder_of_something_else(tmp_path, run):
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match="holds no DDTI"):
        run("ddti")

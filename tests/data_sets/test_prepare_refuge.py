"""REFUGE: each quirk of the raw data."""

from __future__ import annotations

import numpy as np
import pytest
import raw_layouts as raw
from PIL import Image

from medsegdiff_monai.errors import InputError


def test_refuge1_reads_every_archive_and_mask_mode(tmp_path, run, capsys):
    raw.refuge1(tmp_path / "raw")
    out = run("refuge")
    assert out.names("training") == ["R1-g0001", "R1-n0001", "R1-n0002"]  # L, palette, RGB; upper-case suffix
    assert out.names("validation") == ["R1-V0001", "R1-V0002"]  # doubled folder
    assert out.names("test") == ["R1-T0001", "R1-T0002", "R1-T0003"]  # masks below G/ and N/; T0003 without mask
    assert "label" not in out.content["test"][2]
    for name in ("R1-g0001", "R1-n0001", "R1-n0002"):
        label = out.array(name)
        assert label.shape == (64, 62)
        assert set(np.unique(label)) == {0, 1, 2}
        assert label[38, 24] == 2 and label[38, 30] == 1 and label[0, 0] == 0  # cup, rim, background
        np.testing.assert_array_equal(label, out.array("R1-g0001"))
    assert set(np.unique(out.array("R1-V0002"))) == {0, 1}  # no cup
    shown = capsys.readouterr().out
    assert "REFUGE-1" in shown and "n0003.jpg: has no mask" in shown and "A0012" not in shown
    assert out.content["split"] == "official"
    assert out.content["regions"] == {"disc": [1, 2], "cup": [2]}
    assert (out.folder / "images/R1-n0002.jpg").read_bytes() == (
        tmp_path / "raw/Training400/Non-Glaucoma/n0002.JPG"
    ).read_bytes()


def test_refuge2_keeps_colliding_stems_apart(tmp_path, run, capsys):
    raw.refuge2(tmp_path / "raw")
    out = run("refuge")
    assert out.names("training") == ["R1-g0001"]
    assert out.names("validation") == ["R1-V0001", "R2-V0001"]
    assert out.names("test") == ["R1-T0001", "R2-T0001"]
    assert out.array("R2-V0001").shape == (50, 50) and out.array("R2-T0001").shape == (44, 44)
    assert "REFUGE-1 (3 photographs) and REFUGE-2 (2 photographs)" in capsys.readouterr().out


def test_both_trees_in_one_folder_count_each_case_once(tmp_path, run):
    raw.refuge1(tmp_path / "raw")
    raw.refuge2(tmp_path / "raw")
    out = run("refuge")
    assert out.names("validation") == ["R1-V0001", "R1-V0002", "R2-V0001"]


def test_kaggle_repackaging(tmp_path, run):
    raw.refuge_kaggle(tmp_path / "raw")
    out = run("refuge")
    assert [out.names(s) for s in ("training", "validation", "test")] == [["K-g0001"], ["K-V0001"], ["K-T0001"]]


def test_crop_is_a_square_around_the_disc(tmp_path, run):
    raw.refuge1(tmp_path / "raw")
    out = run("refuge", crop_disc="true")
    assert out.names("test") == ["R1-T0001", "R1-T0002"]  # no crop without mask
    label = out.array("R1-g0001")
    assert label.shape[0] == label.shape[1] == 40
    assert out.array("R1-g0001", "image").shape == (40, 40, 3)
    whole = Image.open(tmp_path / "raw/Annotation-Training400/Disc_Cup_Masks/Glaucoma/g0001.bmp")
    assert (label > 0).sum() == (np.asarray(whole) < 255).sum()


def test_mask_without_disc_cannot_be_cropped(tmp_path, run):
    raw.refuge1(tmp_path / "raw")
    file = tmp_path / "raw/REFUGE-Validation400-GT/Disc_Cup_Masks/V0001.bmp"
    Image.new("L", (48, 48), 255).save(file)
    with pytest.raises(InputError, match=r"1 bad cases.*\n.*V0001.bmp: shows no disc"):
        run("refuge", crop_disc=True)


def test_mask_of_another_size(tmp_path, run):
    raw.refuge1(tmp_path / "raw")
    raw.fundus_mask(tmp_path / "raw/REFUGE-Validation400-GT/Disc_Cup_Masks/V0001.bmp", (40, 40))
    with pytest.raises(InputError, match=r"V0001.bmp: is \[40, 40\], the image V0001.jpg \[48, 48\]"):
        run("refuge")


def test_mask_of_other_codes(tmp_path, run):
    """0 as the background, as in copies that hold label values, would make a cup of the whole picture."""
    raw.refuge1(tmp_path / "raw")
    Image.new("L", (48, 48), 0).save(tmp_path / "raw/REFUGE-Validation400-GT/Disc_Cup_Masks/V0001.bmp")
    with pytest.raises(InputError, match=r"V0001.bmp: has no background in its corners"):
        run("refuge")


def test_packed_masks_are_named(tmp_path, run):
    raw.photograph(tmp_path / "raw/Training400/Glaucoma/g0001.jpg", (20, 20))
    (tmp_path / "raw/Disc_Cup_Masks.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"no mask: unpack .*Disc_Cup_Masks.zip"):
        run("refuge")


def test_multi_rater_repackaging_is_refused(tmp_path, run):
    raw.photograph(tmp_path / "raw/Training-400/0001/0001_seg_cup_1.png", (20, 20))
    with pytest.raises(InputError, match="multi-rater"):
        run("refuge")


def test_folder_of_something_else(tmp_path, run):
    raw.photograph(tmp_path / "raw/holiday.jpg", (20, 20))
    with pytest.raises(InputError, match="no REFUGE photograph"):
        run("refuge")

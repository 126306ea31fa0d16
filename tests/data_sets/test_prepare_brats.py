"""BraTS: each quirk of the raw data."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw

from medsegdiff_monai.errors import InputError


def test_2020_with_case_355_and_unlabelled_validation(tmp_path, run, capsys):
    raw.brats2020(tmp_path / "raw")
    out = run("brats")
    drawn = sorted(out.names("training") + out.names("validation") + out.names("test"))
    assert drawn == [f"BraTS20_Training_{n}" for n in ("001", "002", "003", "355")]
    assert out.names("unlabelled") == ["BraTS20_Validation_001"]
    assert set(np.unique(out.array("BraTS20_Training_001"))) == {0, 1, 2, 3}  # 4 becomes 3
    assert set(np.unique(out.array("BraTS20_Training_002"))) == {0, 1, 2}  # no enhancing tumour
    assert set(np.unique(out.array("BraTS20_Training_003"))) == {0}
    assert set(np.unique(out.array("BraTS20_Training_355"))) == {0, 1, 2, 3}
    shown = capsys.readouterr().out
    assert "BraTS 2020, 5 cases" in shown and "W39_1998.09.19_Segm.nii is taken as its mask" in shown
    image = nib.load(out.folder / "images/BraTS20_Training_001.nii.gz")
    assert image.shape == (24, 24, 16, 4) and image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(image.affine, raw.FLIPPED)
    centre = np.asarray(image.dataobj)[10, 10, 8]
    assert [int(v) // 100 for v in centre] == [1, 2, 3, 4]  # t1 is not t1ce


def test_2021_without_parent_folder_counts_a_case_once(tmp_path, run):
    raw.brats2021(tmp_path / "raw")
    out = run("brats")
    assert sum(len(out.names(s)) for s in ("training", "validation", "test")) == 3
    assert set(np.unique(out.array("BraTS2021_00495"))) == {0, 1, 2, 3}  # the first of the two


def test_2023_groups_time_points_by_patient(tmp_path, run):
    raw.brats2023(tmp_path / "raw")
    out = run("brats")
    splits = [{item["patient"] for item in out.content[s]} for s in ("training", "validation", "test")]
    assert sum(len(s) for s in splits) == len(set.union(*splits)) == 2
    assert set(np.unique(out.array("BraTS-GLI-00002-000"))) == {0, 1, 2, 3}
    assert out.content["regions"] == {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


def test_slices_hold_brain_and_keep_their_place(tmp_path, run):
    raw.brats2021(tmp_path / "raw")
    out = run("brats", slices="2D", regions="whole")
    items = [item for s in ("training", "validation", "test") for item in out.content[s]]
    assert len(items) == 3 * 10  # slices 3 to 12 hold brain
    assert out.array("BraTS2021_00000_006", "image").shape == (24, 24, 4)
    assert set(np.unique(out.array("BraTS2021_00000_006"))) == {0, 1}
    volume = nib.load(tmp_path / "raw/BraTS2021_00000/BraTS2021_00000_t1ce.nii.gz")
    values = np.asarray(volume.dataobj).astype(float)
    brain = values[values != 0]  # of the whole volume: its slices are on one scale
    expected = (values[..., 6] - brain.mean()) / max(brain.std(), 1e-6)
    np.testing.assert_allclose(out.array("BraTS2021_00000_006", "image")[..., 1], expected, rtol=1e-4, atol=1e-4)
    assert out.content["labels"] == {"0": "background", "1": "whole tumour"}
    assert len({item["patient"] for item in items}) == 3


def test_3_and_4_in_one_file_are_refused_with_the_reason(tmp_path, run):
    raw.brats2021(tmp_path / "raw")
    raw.brats_case(tmp_path / "raw/BraTS2021_00003", "BraTS2021_00003", (0, 1, 3, 4))
    with pytest.raises(InputError, match=r"00003_seg.nii.gz: holds both 3 and 4: .*resection cavity"):
        run("brats")
    assert (tmp_path / "out/dataset.json").is_file()  # the others are ready
    assert not list((tmp_path / "out").rglob("*00003*"))


@pytest.mark.parametrize("labels", [(0, 3), (0, 7)])
def test_label_of_another_edition(tmp_path, run, labels):
    raw.brats_case(tmp_path / "raw/BraTS2021_00003", "BraTS2021_00003", labels)
    with pytest.raises(InputError, match=r"holds \[\d\], BraTS 2021 has \[0, 1, 2, 4\]"):
        run("brats")


def test_float_labels_are_rounded(tmp_path, run):
    raw.brats_case(tmp_path / "raw/BraTS2021_00003", "BraTS2021_00003")
    file = tmp_path / "raw/BraTS2021_00003/BraTS2021_00003_seg.nii.gz"
    seg = nib.load(file).get_fdata()
    nib.save(nib.Nifti1Image((seg * (1 - 1e-6)).astype(np.float32), raw.FLIPPED), file)
    assert set(np.unique(run("brats").array("BraTS2021_00003"))) == {0, 1, 2, 3}


def test_missing_modality_and_other_affine_and_nan(tmp_path, run):
    root = tmp_path / "raw"
    for n in range(4):
        raw.brats_case(root / f"BraTS2021_0000{n}", f"BraTS2021_0000{n}")
    (root / "BraTS2021_00001/BraTS2021_00001_t1ce.nii.gz").unlink()
    file = root / "BraTS2021_00002/BraTS2021_00002_t2.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(nib.load(file).dataobj), np.eye(4)), file)
    file = root / "BraTS2021_00003/BraTS2021_00003_seg.nii.gz"
    nib.save(nib.Nifti1Image(np.full((24, 24, 16), np.nan, np.float32), raw.FLIPPED), file)
    with pytest.raises(InputError, match="3 bad cases were left out, 1 are ready") as error:
        run("brats")
    assert "BraTS2021_00001: lacks the modality t1ce" in str(error.value)
    assert "BraTS2021_00002_t2.nii.gz: its affine differs" in str(error.value)
    assert "BraTS2021_00003_seg.nii.gz: holds NaN" in str(error.value)


def test_other_size_and_axes(tmp_path, run):
    root = tmp_path / "raw"
    for n in range(2):
        raw.brats_case(root / f"BraTS2021_0000{n}", f"BraTS2021_0000{n}")
    raw.volume(root / "BraTS2021_00000/BraTS2021_00000_t2.nii.gz", np.ones((24, 24, 8), np.int16), raw.FLIPPED)
    raw.volume(root / "BraTS2021_00001/BraTS2021_00001_t2.nii.gz", np.ones((24, 24), np.int16), raw.FLIPPED)
    with pytest.raises(InputError) as error:
        run("brats")
    assert "must be equal" in str(error.value) and "has three axes" in str(error.value)


def test_two_editions_share_patients(tmp_path, run):
    raw.brats2020(tmp_path / "raw")
    raw.brats2021(tmp_path / "raw")
    with pytest.raises(InputError, match="BraTS 2020 and 2021, which share patients"):
        run("brats")


@pytest.mark.parametrize(
    ("options", "message"), [({"slices": "4D"}, "slices is 2D or 3D"), ({}, "holds no case of BraTS")]
)
def test_options_and_empty_folder(tmp_path, run, options, message):
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match=message):
        run("brats", **options)

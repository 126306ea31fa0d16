"""Raw data sets of nnU-Net."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw
from PIL import Image

from medsegdiff_monai.data.report import inspect_dataset
from medsegdiff_monai.errors import InputError

GEOMETRY = np.diag([2.0, 3.0, 4.0, 1.0])


def volume(channel, case):
    return (np.arange(6 * 7 * 5).reshape(6, 7, 5) + 100 * channel + case).astype(np.int16)


def mask(case):
    return (np.indices((6, 7, 5)).sum(0) // 5 + case) % 4


def nnunet(root, channels=("T1", "T2"), cases=5, labels=None, **content):
    """A data set of volumes, with an image for the test and what else is in ``content``."""
    for i in range(cases):
        for k in range(len(channels)):
            raw.volume(root / f"imagesTr/k_{i:03d}_{k:04d}.nii.gz", volume(k, i), GEOMETRY)
        raw.volume(root / f"labelsTr/k_{i:03d}.nii.gz", mask(i).astype(np.uint8), GEOMETRY)
    for k in range(len(channels)):
        raw.volume(root / f"imagesTs/t_{k:04d}.nii.gz", volume(k, 9), GEOMETRY)
    listed = {
        "channel_names": {str(k): name for k, name in enumerate(channels)},
        "labels": labels or {"background": 0, "oedema": 1, "core": 2, "rim": 3},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps({**listed, **content}))
    return root


def test_channels_become_one_file(tmp_path, run):
    nnunet(tmp_path / "raw/Dataset001_Toy")
    out = run("nnunet")
    assert out.content["modality"] == {"0": "T1", "1": "T2"} and out.names("test") == ["t"]
    assert out.content["labels"] == {"0": "background", "1": "oedema", "2": "core", "3": "rim"}
    trained = sorted(out.names("training") + out.names("validation"))
    assert trained == [f"k_{i:03d}" for i in range(5)]
    for i, name in enumerate(trained):
        np.testing.assert_array_equal(out.array(name, "image"), np.stack([volume(0, i), volume(1, i)], -1))
        np.testing.assert_array_equal(out.array(name), mask(i))
        np.testing.assert_array_equal(nib.load(out.folder / f"images/{name}.nii.gz").affine, GEOMETRY)
    report = inspect_dataset(out.folder)
    assert report.errors == [] and report.overlay["in_channels"] == 2 and report.overlay["num_classes"] == 3


def test_regions_and_the_label_that_is_ignored(tmp_path, run):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    nnunet(tmp_path / "raw", ("T1",), labels=labels, regions_class_order=[1, 2])
    out = run("nnunet")
    assert out.content["regions"] == {"whole": [1, 2], "core": [2]} and out.content["ignore_label"] == 3
    assert "3" not in out.content["labels"]
    overlay = inspect_dataset(out.folder).overlay
    assert overlay["regions"] == {"whole": [1, 2], "core": [2]} and overlay["ignore_label"] == 3


def test_single_channels_are_copied_and_labels_of_the_test_kept(tmp_path, run):
    root = nnunet(tmp_path / "raw", ("CT",), name="Toy")
    raw.volume(root / "labelsTs/t.nii.gz", mask(0).astype(np.uint8), GEOMETRY)
    out = run("nnunet")
    first = out.content["training"][0]["image"]
    source = root / "imagesTr" / first.split("/")[-1].replace(".nii.gz", "_0000.nii.gz")
    assert (out.folder / first).read_bytes() == source.read_bytes()
    assert out.content["test"][0]["label"] == "./labels/t.nii.gz" and "nnU-Net Toy" in out.content["name"]


def test_version_1(tmp_path, run):
    root = nnunet(tmp_path / "raw")
    content = json.loads((root / "dataset.json").read_text())
    content["modality"] = content.pop("channel_names")
    content["labels"] = {str(value): name for name, value in content["labels"].items()}
    del content["file_ending"]
    content["training"] = [{"image": "./imagesTr/k_000.nii.gz", "label": "./labelsTr/k_000.nii.gz"}]
    (root / "dataset.json").write_text(json.dumps(content))
    out = run("nnunet")
    assert out.content["labels"]["3"] == "rim" and out.content["numTraining"] + len(out.content["validation"]) == 5


def pictures(root, names, suffix=".png"):
    """Colours in one file where there are three names and one file for each case."""
    for i in range(4):
        (root / "imagesTr").mkdir(parents=True, exist_ok=True)
        (root / "labelsTr").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        files = {0: pixels} if len(names) == 3 else {k: pixels[..., k] for k in range(len(names))}
        for k, array in files.items():
            Image.fromarray(array).save(root / f"imagesTr/p{i}_{k:04d}{suffix}")
        Image.fromarray((pixels[..., 0] > 99).astype(np.uint8)).save(root / f"labelsTr/p{i}{suffix}")
    labels = {"background": 0, "spot": 1}
    content = {"channel_names": dict(zip("012", names)), "labels": labels, "file_ending": suffix}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("names", ["RGB", "XY", "X"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures(tmp_path, run, names, suffix):
    pictures(tmp_path / "raw", names, suffix)
    out = run("nnunet")
    report = inspect_dataset(out.folder)
    assert report.errors == [] and report.overlay["in_channels"] == len(names)
    pixels = np.random.default_rng(1).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(out.array("p1", "image"), pixels.swapaxes(0, 1)[..., : len(names)].squeeze())
    np.testing.assert_array_equal(out.array("p1"), pixels[..., 0].T > 99)


def lose(root, pattern):
    for path in root.glob(pattern):
        path.unlink()


def shift(root):
    moved = GEOMETRY.copy()
    moved[0, 3] = 5
    raw.volume(root / "imagesTr/k_001_0001.nii.gz", volume(1, 1), moved)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: lose(r, "imagesTr/k_001_0001*"), r"k_001: lacks the channel 0001 \(T2\)"),
        (lambda r: lose(r, "imagesTr/k_001_0000*"), r"k_001: lacks the channel 0000 \(T1\)"),
        (
            lambda r: shutil.copy(r / "imagesTr/k_001_0001.nii.gz", r / "imagesTr/k_001_0007.nii.gz"),
            "without a name: 0007",
        ),
        (shift, r"k_001_0001.nii.gz: its voxels lie up to 2.5 voxels off the image's \(k_001_0000.nii.gz\)"),
        (lambda r: raw.volume(r / "labelsTr/k_001.nii.gz", mask(0)[:-1].astype(np.uint8), GEOMETRY), "of size"),
    ],
)
def test_bad_cases_are_named(tmp_path, run, break_it, message):
    break_it(nnunet(tmp_path / "raw"))
    with pytest.raises(InputError, match=r"1 bad cases were left out, 5 are ready[^:]*:\n.*" + message):
        run("nnunet")


def test_what_is_left_out_is_named(tmp_path, run, capsys):
    root = nnunet(tmp_path / "raw")
    shutil.copy(root / "imagesTr/k_000_0000.nii.gz", root / "imagesTr/other.nii.gz")
    shutil.copy(root / "labelsTr/k_000.nii.gz", root / "labelsTr/orphan.nii.gz")
    (root / "imagesTr/k_000.json").write_text("{}")
    (root / "labelsTr/k_004.nii.gz").unlink()
    out = run("nnunet")
    shown = capsys.readouterr().out
    assert "other.nii.gz: has no channel in its name" in shown and "orphan.nii.gz: has no image" in shown
    assert "k_000.json: is no .nii.gz" in shown and "listed as 'unlabelled': k_004" in shown
    assert out.names("unlabelled") == ["k_004"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_names": {"1": "T1"}}, "needs 'channel_names'"),
        ({"channel_names": []}, "needs 'channel_names'"),
        ({"channel_names": {}}, "needs 'channel_names'"),
        ({"file_ending": ".npz"}, "'file_ending' is '.npz', which is not read"),
        ({"file_ending": 5}, "'file_ending' is '5'"),
        ({"file_ending": ".png"}, "holds no imagesTr/<case>_0000.png"),
        ({"labels": [1]}, "'labels' must be a table"),
        ({"dataset": {}}, "'dataset' lists files that lie elsewhere"),
    ],
)
def test_broken_list(tmp_path, run, change, message):
    nnunet(tmp_path / "raw", **change)
    with pytest.raises(InputError, match=message):
        run("nnunet")


def test_who_gives_the_raw_set_to_others_is_told_the_command(tmp_path, run):
    root = nnunet(tmp_path / "raw")
    with pytest.raises(InputError, match=f"prepare nnunet --source {root} --output DIR"):
        inspect_dataset(root)
    with pytest.raises(InputError, match="prepare nnunet"):
        run("decathlon")
    (root / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"holds no dataset\.json"):
        run("nnunet")

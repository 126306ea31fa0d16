"""The report on a data set: every fault at once, a fingerprint, a proposal."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import struct

import itk
import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw
import torch
from PIL import Image

from medsegdiff_monai.data.raw.prepare import prepare
from medsegdiff_monai.data.report import check, inspect_dataset
from medsegdiff_monai.errors import InputError


@pytest.fixture
def task(tmp_path):
    return raw.decathlon(tmp_path, 8)


def edit(task, change):
    file = task / "dataset.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite(path, array, affine=None):
    raw.volume(path, array, affine)


def test_a_good_set(task, tmp_path, capsys):
    check(str(task), write=str(tmp_path / "o/overlay.json"))
    overlay = json.loads((tmp_path / "o/overlay.json").read_text())
    assert overlay["regions"] == {"front": [1], "back": [2]}
    assert overlay["num_classes"] == 2 and overlay["spatial_dims"] == 3 and overlay["in_channels"] == 1
    assert overlay["roi_size"] == [16, 16, 16] and overlay["spacing"] == [1, 1, 1] and overlay["fit"] == "crop"
    found = json.loads((tmp_path / "o/overlay.fingerprint.json").read_text())
    assert found["cases"] == {"training": 8, "test": 1} and found["labelled"] == 8
    assert found["size"] == {"min": [8, 8, 8], "median": [11, 13, 9], "max": [11, 13, 9]}
    assert found["classes"]["1"]["volume"]["median"] == [48] and found["classes"]["2"]["cases"] == 8
    assert len(found["intensity"]["percentile_50"]) == 1
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_every_fault_at_once(task, capsys, tmp_path):
    good = np.asarray(nib.load(task / "labelsTr/toy_000.nii.gz").dataobj)
    image = np.asarray(nib.load(task / "imagesTr/toy_000.nii.gz").dataobj)
    (task / "imagesTr/toy_000.nii.gz").unlink()
    rewrite(task / "labelsTr/toy_001.nii.gz", good[:-1])
    rewrite(task / "labelsTr/toy_002.nii.gz", good, np.diag([2.0, 1, 1, 1]))
    rewrite(task / "labelsTr/toy_003.nii.gz", good * 4)
    bad = image.copy()
    bad[0, 0, :2] = np.nan, np.inf
    rewrite(task / "imagesTr/toy_004.nii.gz", bad)
    content = (task / "labelsTr/toy_005.nii.gz").read_bytes()
    (task / "labelsTr/toy_005.nii.gz").write_bytes(content[: len(content) // 2])
    rewrite(task / "imagesTr/toy_006.nii.gz", np.stack([image, image], -1))
    flat(task / "imagesTr/toy_007.nii.gz")
    edit(task, lambda c: c["training"].extend([{"image": "imagesTs/toy_100.nii.gz"}, 7, {"image": "../x.nii"}]))
    with pytest.raises(InputError, match="13 errors, listed above"):
        check(str(task), write=str(tmp_path / "overlay.json"))
    shown = capsys.readouterr().out
    for text in (
        "toy_000.nii.gz: no such file",
        "toy_001.nii.gz: label of size [10, 13, 9], image of size [11, 13, 9]",
        "toy_002.nii.gz: its voxels lie up to 10 voxels off the image's: resample the label onto the image's grid",
        "toy_003.nii.gz: holds the values [4, 8], declared are [0, 1, 2]",
        "toy_004.nii.gz: 2 voxels are NaN or infinite",
        "toy_005.nii.gz: cannot be read",
        "imagesTr/toy_006.nii.gz: has 2 channels, most have 1",
        "toy_007.nii.gz: its affine has no inverse (determinant 0)",
        "toy_100.nii.gz: has no label in the data list",
        "training[9]: '7' needs the key 'image'",
        "x.nii: has no label in the data list",
        "x.nii: no such file",
        "toy_100.nii.gz (training), toy_100.nii.gz (test): the same file is listed more than once",
    ):
        assert text in shown, text
    assert not (tmp_path / "overlay.json").exists()


def flat(path):
    """Give a NIfTI an affine of determinant 0."""
    image = nib.load(path)
    plain = nib.Nifti1Image(np.asarray(image.dataobj), np.eye(4)).to_bytes()
    header = bytearray(plain)
    header[252:256] = struct.pack("<hh", 0, 1)  # sform alone
    header[280:328] = struct.pack("<12f", *[0.0] * 12)
    import gzip

    path.write_bytes(gzip.compress(bytes(header)))


def test_channel_counts(task):
    image = np.asarray(nib.load(task / "imagesTr/toy_000.nii.gz").dataobj)
    rewrite(task / "imagesTr/toy_006.nii.gz", np.stack([image, image], -1))
    raw.volume(task / "imagesTr/toy_005.nii.gz", image[:, :, 0])
    raw.volume(task / "labelsTr/toy_005.nii.gz", np.zeros(image.shape[:2], np.uint8))
    errors = "\n".join(inspect_dataset(task).errors)
    assert "toy_006.nii.gz: has 2 channels, most have 1" in errors
    assert "toy_005.nii.gz: has 2 spatial axes, most have 3" in errors


@pytest.mark.parametrize(
    ("values", "text"), [(0.5, "holds 0.5, which is no label"), (-1, "holds -1"), (np.nan, "holds nan")]
)
def test_label_values(task, values, text):
    rewrite(task / "labelsTr/toy_001.nii.gz", np.full((11, 13, 9), values, np.float32))
    assert text in "\n".join(inspect_dataset(task).errors)


def test_noisy_and_coloured_masks(tmp_path):
    raw.picture_set(tmp_path)
    Image.effect_noise((37, 23), 60).save(tmp_path / "labels/c0.png")
    raw.photograph(tmp_path / "labels/c1.png", (37, 23))
    rewrite(tmp_path / "labels/c2.nii", np.arange(37 * 23).reshape(37, 23).astype(np.int16))
    edit(tmp_path, lambda c: c["training"][2].update(label="labels/c2.nii"))
    errors = "\n".join(inspect_dataset(tmp_path).errors)
    assert (
        re.search(r"c0\.png: holds \d{3} values, which is no label map", errors) and "c1.png: holds colours" in errors
    )
    assert "c2.nii: holds 851 values, which is no label map" in errors


def test_duplicates_across_splits(task):
    same = (task / "imagesTr/toy_001.nii.gz").read_bytes()
    (task / "imagesTr/toy_002.nii.gz").write_bytes(same)  # in validation: an error
    (task / "imagesTr/toy_003.nii.gz").write_bytes(same)  # in training
    image = nib.load(task / "imagesTr/toy_005.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.eye(4)), task / "imagesTr/toy_006.nii.gz")  # other bytes

    def split(content):
        cases = content["training"]
        content["validation"] = [cases[2], cases[4], cases[5]]
        content["test"] = [cases[4], cases[6]]
        content["training"] = [cases[0], cases[1], cases[3], cases[7]]

    edit(task, split)
    report = inspect_dataset(task)
    assert len(report.errors) == 1
    assert "toy_001.nii.gz (training)" in report.errors[0] and "toy_002.nii.gz (validation)" in report.errors[0]
    warnings = "\n".join(report.warnings)
    assert "toy_004.nii.gz (validation), toy_004.nii.gz (test): the same file" in warnings  # validation equals test
    assert "toy_005.nii.gz (validation), toy_006.nii.gz (test): their images have the same content" in warnings


def test_copies_within_training_and_shared_patients_are_warnings(task):
    (task / "imagesTr/toy_002.nii.gz").write_bytes((task / "imagesTr/toy_001.nii.gz").read_bytes())

    def group(content):
        content["training"][0]["patient"] = content["training"][1]["patient"] = 3
        content["validation"] = [content["training"].pop(0)]

    edit(task, group)
    report = inspect_dataset(task)
    assert report.errors == []
    warnings = "\n".join(report.warnings)
    assert (
        "keep one of them" in warnings and "1 patients or clusters are in training and in another split (3" in warnings
    )


def test_warnings_do_not_fail_unless_strict(task, capsys, tmp_path):
    rewrite(task / "labelsTr/toy_001.nii.gz", np.zeros((11, 13, 9), np.uint8))
    check(str(task), write=str(tmp_path / "a.json"))
    assert "warning: " in capsys.readouterr().out and (tmp_path / "a.json").is_file()
    with pytest.raises(InputError, match="1 errors"):
        check(str(task), write=str(tmp_path / "b.json"), strict="True")
    assert "1 masks are empty" in capsys.readouterr().out and not (tmp_path / "b.json").exists()


def test_undeclared_and_unused_labels(task):
    edit(task, lambda c: c.pop("labels"))
    report = inspect_dataset(task)
    assert "declares no labels; the masks hold [0, 1, 2]" in report.warnings[0]
    assert report.overlay["regions"] == {"class_1": [1], "class_2": [2]}
    edit(task, lambda c: c.update(labels={"0": "background", "1": "a", "2": "b", "3": "c"}))
    assert "no mask holds 'c'" in inspect_dataset(task).warnings[0]


@pytest.mark.parametrize(
    ("labels", "regions"),
    [
        ({"background": 0, "front": 1, "back": 2}, {"front": [1], "back": [2]}),
        ({"background": 0, "whole": [1, 2], "back": 2}, {"whole": [1, 2], "back": [2]}),
        ({"0": "b", "1": "_target_", "2": "$import os"}, {"target": [1], "import_os": [2]}),
        ({"0": "b", "1": "@x", "2": "x#"}, {"x": [1], "x_2": [2]}),
        ({"1": "é", "2": "!"}, {"class": [1], "class_2": [2]}),
        ({"1": "", "x": {}}, {"class_1": [1], "class_2": [2]}),
    ],
)
def test_names_of_labels(task, labels, regions):
    edit(task, lambda c: c.update(labels=labels))
    assert inspect_dataset(task).overlay["regions"] == regions


def test_regions_of_the_data_set_are_proposed(task):
    edit(task, lambda c: c.update(regions={"whole": [1, 2], "back": [2]}))
    assert inspect_dataset(task).overlay["regions"] == {"whole": [1, 2], "back": [2]}
    edit(task, lambda c: c.update(regions={"whole": [1, 9]}))
    assert inspect_dataset(task).overlay["regions"] == {"front": [1], "back": [2]}


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_binary_masks_of_255_are_mapped(tmp_path, suffix):
    raw.picture_set(tmp_path, suffix=suffix, foreground=255)
    report = inspect_dataset(tmp_path)
    assert report.errors == [] and "maps 255 to 'lesion'" in report.warnings[0]
    assert report.overlay["regions"] == {"lesion": [255]} and report.overlay["num_classes"] == 1
    assert report.overlay["fit"] == "resize" and report.overlay["spacing"] is None
    assert report.overlay["roi_size"] == [40, 24] and report.overlay["in_channels"] == 3
    edit(tmp_path, lambda c: c.pop("labels"))
    assert inspect_dataset(tmp_path).overlay["regions"] == {"class_255": [255]}
    edit(tmp_path, lambda c: c.update(labels={"0": "b", "1": "x", "2": "y"}))
    assert inspect_dataset(tmp_path).overlay["regions"] == {"foreground": [255]}


def test_anisotropic_volumes_of_three_channels(tmp_path):
    affine = np.array([[0, 0, 5.0, 0], [-0.5, 0, 0, 3], [0, 0.7, 0, 0], [0, 0, 0, 1]])
    for i in range(3):
        raw.volume(tmp_path / f"i{i}.nii.gz", np.random.default_rng(i).normal(size=(101, 90, 7, 3)), affine)
        raw.volume(tmp_path / f"l{i}.nii.gz", np.eye(101, 90)[..., None].repeat(7, 2).astype(np.uint8), affine)
    items = [{"image": f"i{i}.nii.gz", "label": f"l{i}.nii.gz"} for i in range(3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "x"}, "training": items}))
    overlay = inspect_dataset(tmp_path).overlay
    assert overlay["in_channels"] == 3 and overlay["spacing"] == [5.0, 0.5, 0.7]  # RAS order
    assert overlay["roi_size"][0] == 8 and all(n % 8 == 0 for n in overlay["roi_size"])


def test_several_files_are_channels_and_other_formats(tmp_path):
    array = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    for name in "ab":
        itk.imwrite(itk.image_from_array(array + ord(name)), str(tmp_path / f"{name}.nrrd"))
    itk.imwrite(itk.image_from_array((array > 0).astype(np.uint8)), str(tmp_path / "l.mha"))
    item = {"image": ["a.nrrd", "b.nrrd"], "label": "l.mha", "crop": [1, 2], "note": None}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "x"}, "training": [item]}))
    report = inspect_dataset(tmp_path)
    assert report.errors == [] and report.overlay["in_channels"] == 2


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, "no such file: `prepare` writes one"),
        ("[]", "the list 'training'"),
        ("{", "is not JSON"),
        ('{"training": [], "test": 3}', "'test' must be a list of cases, not int"),
        ("{}", "1 errors"),
        ('{"training": ["x.tif"]}', "3 errors"),
        ('{"training": [{"image": []}]}', "2 errors"),
        ('{"training": ["."]}', "3 errors"),
    ],
)
def test_broken_lists(tmp_path, write, message):
    (tmp_path / "x.tif").write_bytes(b"")
    if write is not None:
        (tmp_path / "dataset.json").write_text(write)
    with pytest.raises(InputError, match=message):
        check(str(tmp_path))


@pytest.mark.parametrize("name", ["there", "overlay.txt"])
def test_a_place_that_no_overlay_can_have_is_refused_before_anything_is_read(task, tmp_path, name, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("medsegdiff_monai.data.report.inspect_dataset", lambda dataset: pytest.fail("was read"))
    with pytest.raises(InputError, match=r"write=.*\.json"):
        check(str(task), write=str(tmp_path / name))


def test_an_overlay_that_cannot_be_written(task, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"overlay\.json: cannot be written"):
        check(str(task), write=str(tmp_path / "file" / "overlay.json"))


def test_the_next_commands_can_be_pasted(task, tmp_path, capsys):
    """Folders with spaces and quotes in their names."""
    folder = tmp_path / "it's a set"
    prepare("decathlon", str(task), str(folder), workers=1)
    check(str(folder), write=str(folder / "my overlay.json"))
    first, second = (shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("Next:"))
    assert first == ["medsegdiff", "train", str(folder), "--output_dir", "MODEL"]
    configs = second[second.index("--config_file") + 1]
    assert ast.literal_eval(configs) == ["bundle/configs/train.json", str(folder / "my overlay.json")]  # as fire does


def test_the_same_file_by_two_names_is_listed_twice(task):
    (task / "copy.nii.gz").symlink_to(task / "imagesTr/toy_001.nii.gz")
    edit(task, lambda c: c.update(validation=[{**c["training"][1], "image": "copy.nii.gz"}]))
    assert "the same file is listed more than once" in "\n".join(inspect_dataset(task).errors)


def test_what_is_ignored_is_proposed_and_no_part_of_the_fingerprint(task):
    before = inspect_dataset(task)
    for path in (task / "labelsTr").iterdir():
        label = np.asarray(nib.load(path).dataobj).copy()
        label[-2:][label[-2:] == 0] = 255
        rewrite(path, label)
    assert "holds the values [255], declared are [0, 1, 2]" in inspect_dataset(task).errors[0]
    edit(task, lambda c: c.update(ignore_label=255))
    report = inspect_dataset(task)
    assert report.errors == [] and report.fingerprint == before.fingerprint
    assert report.overlay == {**before.overlay, "ignore_label": 255}
    edit(
        task,
        lambda c: (c.pop("ignore_label"), c.update(labels={"background": 0, "front": 1, "back": 2, "ignore": 255})),
    )
    assert inspect_dataset(task).overlay == report.overlay


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        check(str(tmp_path / "none"))


def test_batch_fits_the_memory(task, monkeypatch):
    monkeypatch.setattr("medsegdiff_monai.data.fingerprint.default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("medsegdiff_monai.data.fingerprint.memory_bytes", lambda: 25 * 10**6)
    overlay = inspect_dataset(task).overlay
    assert overlay["batch_size"] == 2 and overlay["cache_rate"] == 1.0
    monkeypatch.setattr("medsegdiff_monai.data.fingerprint.memory_bytes", lambda: 10**5)
    overlay = inspect_dataset(task).overlay
    assert overlay["batch_size"] == 1 and 0 < overlay["cache_rate"] < 1


def test_patches_shrink_in_proportion():
    from medsegdiff_monai.data.fingerprint import _patch, _whole_image

    assert _patch([35, 50, 35], 32 * 48 * 32) == [32, 48, 32]
    for size in itertools.product((5, 20, 90, 512), repeat=3):
        patch = _patch(size, 32 * 48 * 32)
        assert np.prod(patch) <= 32 * 48 * 32 and all(n % 8 == 0 and n >= 8 for n in patch)
    assert _whole_image([2124, 2056], 256) == [256, 248] and _whole_image([31, 17], 256) == [32, 24]


def test_ct_is_scaled_by_what_its_foreground_holds(tmp_path):
    """Air around, an organ of 40 to 60 HU: half its width on either side is kept; MR has no unit."""
    for i in range(3):
        image = np.full((20, 20, 20), -1000, np.int16)
        image[5:15, 5:15, 5:15] = np.linspace(40, 60, 1000).round().reshape(10, 10, 10)
        raw.volume(tmp_path / f"i{i}.nii.gz", image)
        raw.volume(tmp_path / f"l{i}.nii.gz", (image > 0).astype(np.uint8))
    items = [{"image": f"i{i}.nii.gz", "label": f"l{i}.nii.gz"} for i in range(3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "organ"}, "training": items}))
    low, high = inspect_dataset(tmp_path).overlay["intensity_range"]
    assert low == pytest.approx(30, abs=1) and high == pytest.approx(70, abs=1)


def test_images_without_a_unit_are_normalised_by_themselves(task):
    assert inspect_dataset(task).overlay["intensity_range"] is None


@pytest.mark.parametrize(
    ("name", "meant"), [("train", "training"), ("Training", "training"), ("val", "validation"), ("testing", "test")]
)
def test_a_list_whose_name_is_misspelt(task, name, meant):
    edit(task, lambda c: c.update({"validation": c["training"][:2], "test": c["training"][2:3]}))
    edit(task, lambda c: c.update({name: c.pop(meant)}))
    with pytest.raises(InputError, match=rf"cases under '{name}': did you mean '{meant}'\?"):
        inspect_dataset(task)


def test_lists_that_nothing_reads_get_a_word_but_for_unlabelled(task):
    edit(task, lambda c: c.update(excluded=c["training"][:2], unlabelled=c["training"][:1], authors=["a"]))
    warnings = inspect_dataset(task).warnings
    assert sum("'excluded' lists 2 cases, which nothing reads" in text for text in warnings) == 1
    assert not any("'unlabelled'" in text or "'authors'" in text for text in warnings)


def test_a_label_of_two_images_gets_a_word(task):
    edit(task, lambda c: c["training"][1].update(label=c["training"][0]["label"]))
    warnings = inspect_dataset(task).warnings
    assert any("is the label of several images (toy_000.nii.gz, toy_001.nii.gz)" in text for text in warnings)


def test_labels_that_are_no_table_get_a_word(task):
    edit(task, lambda c: c.update(labels=["background", "a"]))
    warnings = inspect_dataset(task).warnings
    assert any("has 'labels' that are not a table of names and values" in text for text in warnings)

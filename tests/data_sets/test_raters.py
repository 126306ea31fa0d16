"""Several raters, from raw folders and data lists to what a training gets."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw
from monai.transforms import Compose
from PIL import Image

from medsegdiff_monai.__main__ import prepare as prepare_command
from medsegdiff_monai.data import DataSpec, evaluation_items, inference_items, training_splits
from medsegdiff_monai.data.caching import DiskCacheDataset
from medsegdiff_monai.data.report import check, inspect_dataset
from medsegdiff_monai.errors import InputError

RGB = DataSpec(spatial_dims=2, in_channels=3, num_classes=1)
SHARED = Path(__file__).parents[3] / "shared" / "data"


def edit(folder, change):
    file = folder / "dataset.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def mask(width, shape=(23, 37)):
    """A bar of so many columns."""
    array = np.zeros(shape, np.uint8)
    array[4:14, 3 : 3 + width] = 1
    return array


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def rate(folder, widths):
    """Give the cases of a picture set raters whose bars are so wide: ``{case: [width, ...]}``."""

    def change(content):
        for item in (*content["training"], *content["validation"]):
            case = Path(item["image"]).stem
            if case in widths:
                files = [save(folder / f"raters/{case}_{i}.png", mask(w)) for i, w in enumerate(widths[case])]
                item["labels"] = [str(file.relative_to(folder)) for file in files]

    edit(folder, change)


@pytest.fixture
def pictures(tmp_path):
    """Six pictures: two with a label and three raters, one with a single rater alone, three as ever."""
    folder = raw.picture_set(tmp_path / "data")
    rate(folder, {"c0": [4, 6, 0], "c1": [0], "c4": [2, 2, 5]})
    edit(folder, lambda c: c["training"][1].pop("label"))
    return folder


def by_case(items):
    return {item["case"]: item for item in items}


def test_data_lists_carry_the_raters_of_each_case(pictures):
    splits = training_splits(str(pictures), RGB)
    training = by_case(splits["training"])
    files = [str(pictures.resolve() / f"raters/c0_{i}.png") for i in range(3)]
    assert training["c0"]["raters"] == files and training["c0"]["label"].endswith("labels/c0.png")
    assert "label" not in training["c1"] and len(training["c1"]["raters"]) == 1
    assert by_case(splits["validation"])["c4"]["raters"][2].endswith("raters/c4_2.png")
    assert by_case(evaluation_items(str(pictures), RGB)) == by_case(splits["validation"])
    for case in ("c2", "c3"):  # as before there were raters
        assert training[case].keys() == {"image", "label", "foreground", "facts", "case"}
    assert all(item.keys() == {"image", "case"} for item in inference_items(str(pictures), RGB, "none", "none.pt"))


def test_foreground_of_any_rater_or_the_label_counts(pictures):
    for case in ("c0", "c2"):
        save(pictures / f"labels/{case}.png", mask(0))
    found = {
        case: item["foreground"] for case, item in by_case(training_splits(str(pictures), RGB)["training"]).items()
    }
    assert found == {"c0": True, "c1": False, "c2": False, "c3": True}


def test_cases_with_raters_alone_are_labelled(pictures):
    def change(content):
        content["validation"], content["test"] = [], [content["validation"][0]]
        content["test"][0].pop("label")

    edit(pictures, change)
    assert [item["case"] for item in evaluation_items(str(pictures), RGB)] == ["c4"]
    edit(pictures, lambda c: c["training"][1].pop("labels"))
    with pytest.raises(InputError, match=r"c1\.png: has no label in the data list"):
        training_splits(str(pictures), RGB)
    assert f"{pictures / 'images/c1.png'}: has no label in the data list" in "\n".join(inspect_dataset(pictures).errors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "no such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "cannot be read"),
        (lambda file: save(file, mask(3, (22, 37))), r"label of size \[37, 22\], image of size \[37, 23\]"),
        (lambda file: save(file, mask(3) * 7), "holds the values"),
        (lambda file: raw.photograph(file, (37, 23)), "holds colours"),
    ],
)
def test_faults_name_the_file_of_the_rater(pictures, damage, message):
    file = pictures / "raters/c0_1.png"
    damage(file)
    with pytest.raises(InputError, match=rf"c0_1\.png: {message}"):
        training_splits(str(pictures), RGB)
    errors = inspect_dataset(pictures).errors
    assert len(errors) == 1 and str(file) in errors[0]


def test_a_rater_of_another_geometry_is_a_fault(tmp_path):
    folder = raw.decathlon(tmp_path, 4)
    label = nib.load(folder / "labelsTr/toy_000.nii.gz")
    raw.volume(folder / "a.nii.gz", np.asarray(label.dataobj))
    raw.volume(folder / "b.nii.gz", np.asarray(label.dataobj), np.diag([2.0, 1, 1, 1]))
    edit(folder, lambda c: c["training"][0].update(labels=["a.nii.gz", "b.nii.gz"]))
    with pytest.raises(InputError, match=r"b\.nii\.gz: its voxels lie up to 10 voxels off"):
        training_splits(str(folder), DataSpec(3, 1, 2))
    assert "b.nii.gz: its voxels lie up to 10 voxels off" in "\n".join(inspect_dataset(folder).errors)


@pytest.mark.parametrize("value", [[], None, "a.png", [3], [""], [["a.png"]], {"a": "b.png"}, ["a.png", "./a.png"]])
def test_labels_that_are_no_list_of_files(pictures, tmp_path, value):
    edit(pictures, lambda c: c["training"][2].update(labels=value))
    message = r"'labels' .*: list "
    with pytest.raises(InputError, match=rf"dataset\.json: training\[2\]: {message}") as error:
        training_splits(str(pictures), RGB)
    assert len(value or []) > 1 or str(value) in str(error.value)
    errors = inspect_dataset(pictures).errors
    assert len(errors) == 1 and "dataset.json: training[2]: 'labels' " in errors[0]
    with pytest.raises(InputError, match=rf"dataset\.json: training\[2\]: {message}"):
        prepare_command("decathlon", str(pictures), str(tmp_path / "out"))


def test_a_changed_file_of_a_rater_is_noticed_by_the_cache(pictures, tmp_path):
    items = training_splits(str(pictures), RGB)["training"]
    dataset = DiskCacheDataset(items, Compose([]), tmp_path / "cache")
    before = [dataset.hash_func(item) for item in items]
    assert before == [dataset.hash_func(item) for item in items]
    os.utime(pictures / "raters/c0_2.png", ns=(0, 0))
    assert [a == b for a, b in zip(before, (dataset.hash_func(item) for item in items))] == [False, True, True, True]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0


def test_check_reports_the_raters(pictures, tmp_path, capsys):
    rate(pictures, {"c2": [0, 0], "c3": [0, 0, 5]})  # who saw nothing agrees with who saw nothing
    check(str(pictures), write=str(tmp_path / "overlay.json"))
    found = json.loads((tmp_path / "overlay.fingerprint.json").read_text())["raters"]
    cases = [[mask(w) for w in widths] for widths in ([4, 6, 0], [2, 2, 5], [0, 0], [0, 0, 5])]
    agreement = np.mean([np.mean([dice(a, b) for a, b in combinations(maps, 2)]) for maps in cases])
    assert found.pop("mean_pairwise_dice") == pytest.approx(agreement, abs=1e-4)
    assert found == {"cases": 5, "per_case": {"min": 1, "median": 3, "max": 3}, "masks": 12, "empty_masks": 6}
    assert '"mean_pairwise_dice"' in capsys.readouterr().out


def test_agreement_is_over_all_labels(tmp_path):
    """Of two labels, one is drawn alike and one apart."""
    folder = raw.decathlon(tmp_path, 1)
    label = np.asarray(nib.load(folder / "labelsTr/toy_000.nii.gz").dataobj)
    raw.volume(folder / "other.nii.gz", np.where(label == 2, 0, label))
    edit(folder, lambda c: c["training"][0].update(labels=["labelsTr/toy_000.nii.gz", "other.nii.gz"]))
    assert inspect_dataset(folder).fingerprint["raters"]["mean_pairwise_dice"] == 0.5


def test_data_without_raters_have_no_such_part(tmp_path):
    report = inspect_dataset(raw.picture_set(tmp_path))
    assert "raters" not in report.fingerprint and report.errors == []


def test_raters_alone_make_a_proposal(tmp_path):
    """Classes, volumes and values come from the raters where there is no consensus."""
    folder = raw.picture_set(tmp_path)
    rate(folder, {f"c{i}": [4, 8] for i in range(6)})
    edit(folder, lambda c: [item.pop("label") for item in (*c["training"], *c["validation"])])
    report = inspect_dataset(folder)
    assert report.errors == [] and report.warnings == []
    assert report.fingerprint["classes"]["1"]["volume"]["median"] == [60]  # the mean of 40 and 80 pixels
    assert report.overlay["regions"] == {"lesion": [1]} and report.overlay["num_classes"] == 1
    for case in range(6):
        for i in (0, 1):
            save(folder / f"raters/c{case}_{i}.png", mask(6) * 255)
    report = inspect_dataset(folder)
    assert report.overlay["regions"] == {"lesion": [255]}
    assert any("agree in every voxel: make sure that their files are not copies" in text for text in report.warnings)


def test_raters_take_memory_of_the_cache(tmp_path, monkeypatch):
    folder = raw.picture_set(tmp_path)
    monkeypatch.setattr("medsegdiff_monai.data.fingerprint.memory_bytes", lambda: 30_000)
    before = inspect_dataset(folder).overlay["cache_rate"]
    rate(folder, {"c0": [1, 2, 3, 4, 5]})
    after = inspect_dataset(folder).overlay["cache_rate"]
    assert after == pytest.approx(before * (3 + 1) / (3 + 5), abs=1e-3) and before < 1


def test_decathlon_layout_keeps_the_raters(pictures, tmp_path):
    prepare_command("decathlon", str(pictures), str(tmp_path / "out"))
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    first = content["training"][0]
    assert first["label"] == "./labels/c0.png"
    assert first["labels"] == [f"./labels_{i}/c0.png" for i in (1, 2, 3)]
    for i, file in enumerate(first["labels"]):
        assert (tmp_path / "out" / file).read_bytes() == (pictures / f"raters/c0_{i}.png").read_bytes()
    second = content["training"][1]
    assert "label" not in second and second["labels"] == ["./labels_1/c1.png"] and "unlabelled" not in content
    assert len(training_splits(str(tmp_path / "out"), RGB)["training"][0]["raters"]) == 3


def test_decathlon_names_a_rater_of_another_size(pictures, tmp_path):
    save(pictures / "raters/c0_1.png", mask(3, (22, 37)))
    with pytest.raises(InputError, match=r"1 bad cases(.|\n)*c0_1\.png: label of size \[37, 22\]"):
        prepare_command("decathlon", str(pictures), str(tmp_path / "out"))


@pytest.mark.skipif(not (SHARED / "LIDC4").is_dir(), reason="the real set is not here")
def test_four_radiologists(tmp_path):
    """A part of LIDC: the check finds four raters in each case, and a training gets them."""
    content = json.loads((SHARED / "LIDC4/dataset.json").read_text())
    few = {split: content[split][::80] for split in ("training", "validation", "test")}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": content["labels"], **few}))
    for name in ("images", "labels", "raters"):
        (tmp_path / name).symlink_to(SHARED / "LIDC4" / name)
    report = inspect_dataset(tmp_path)
    assert report.errors == []
    found = report.fingerprint["raters"]
    cases = sum(map(len, few.values()))
    assert found["cases"] == cases and found["masks"] == 4 * cases
    assert found["per_case"] == {"min": 4, "median": 4, "max": 4}
    assert 0.3 < found["mean_pairwise_dice"] < 0.8 and 0 < found["empty_masks"] < 2 * cases
    splits = training_splits(str(tmp_path), DataSpec(2, 1, 1))
    assert all(len(item["raters"]) == 4 and "label" in item for items in splits.values() for item in items)

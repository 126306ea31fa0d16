"""Decathlon tasks and one's own folders."""

from __future__ import annotations

import json

import itk
import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw
from PIL import Image

from medsegdiff_monai.errors import InputError


def listed(out):
    return sorted(name for s in ("training", "validation", "test") for name in out.names(s))


def test_decathlon_task_one_folder_down(tmp_path, run, capsys):
    raw.decathlon(tmp_path / "raw")
    out = run("decathlon")
    assert len(out.names("training")) == 4 and len(out.names("validation")) == 2
    assert out.names("test") == ["toy_100"] and "label" not in out.content["test"][0]
    assert out.content["labels"]["2"] == "back" and out.content["split"] == {"drawn_by_seed": 0, "images": 6}
    assert "Decathlon task Toy, 7 cases" in capsys.readouterr().out


def test_official_validation_and_patients_are_kept(tmp_path, run):
    folder = raw.decathlon(tmp_path / "raw")
    content = json.loads((folder / "dataset.json").read_text())
    content["validation"] = [content["training"].pop()]
    content["training"][0]["patient"] = "p7"
    (folder / "dataset.json").write_text(json.dumps(content))
    out = run("decathlon")
    assert out.names("validation") == ["toy_005"] and out.content["split"] == "official"
    assert out.content["training"][0]["patient"] == "p7"


@pytest.mark.parametrize(
    "path", ["../../secret.nii.gz", "/etc/passwd", "imagesTr/../../../x.nii", "a\0b", "", 5, None, {}]
)
def test_path_that_climbs_out(tmp_path, run, path):
    folder = raw.decathlon(tmp_path / "raw")
    (tmp_path / "secret.nii.gz").write_bytes((folder / "imagesTr/toy_000.nii.gz").read_bytes())
    content = json.loads((folder / "dataset.json").read_text())
    content["training"][0]["label"] = path
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"leads out of the folder|is no file name"):
        run("decathlon")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": 5}, "the list 'training'"),
        ({"test": {"a": 1}}, "'test' must be a list of cases, not dict"),
        ({"training": [3], "test": []}, "needs the key 'image'"),
        ({"training": [], "test": []}, "lists no case"),
        ({"test": ["./imagesTr/toy_000.nii.gz"]}, "more than once"),
    ],
)
def test_broken_list(tmp_path, run, change, message):
    folder = raw.decathlon(tmp_path / "raw")
    content = {**json.loads((folder / "dataset.json").read_text()), **change}
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        run("decathlon")


@pytest.mark.parametrize("text", ["{", "[" * 100000, "\xff"])
def test_no_json(tmp_path, run, text):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="is not JSON"):
        run("decathlon")


def test_folder_without_list_or_with_several(tmp_path, run):
    (tmp_path / "raw").mkdir()
    with pytest.raises(InputError, match=r"holds no dataset\.json"):
        run("decathlon")
    for name in "ab":
        (tmp_path / "raw" / name).mkdir()
        (tmp_path / "raw" / name / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match="holds 2 tasks"):
        run("decathlon")


def test_bad_cases_are_named_and_the_others_written(tmp_path, run):
    folder = raw.decathlon(tmp_path / "raw")
    raw.volume(folder / "labelsTr/toy_000.nii.gz", np.zeros((11, 13, 8), np.uint8))
    raw.volume(folder / "labelsTr/toy_001.nii.gz", np.full((11, 13, 9), 0.5, np.float32))
    (folder / "labelsTr/toy_002.nii.gz").unlink()
    with pytest.raises(InputError, match="3 bad cases were left out, 4 are ready") as error:
        run("decathlon")
    for text in ("toy_000.nii.gz: is [11, 13, 8]", "toy_001.nii.gz: holds 0.5", "toy_002.nii.gz: no such file"):
        assert text in str(error.value)


def test_folder_of_every_format(tmp_path, run, capsys):
    images, labels = tmp_path / "raw/images", tmp_path / "raw/labels"
    array = np.arange(6 * 7 * 5, dtype=np.int16).reshape(6, 7, 5)
    mask = (array > 100).astype(np.uint8)
    geometry = np.diag([2.0, 3.0, 4.0, 1.0])
    raw.volume(images / "nifti.nii", array, geometry)
    raw.volume(labels / "nifti.nii.gz", mask * 255, geometry)
    for name, suffix in (("nrrd", ".nrrd"), ("meta", ".mha")):
        for folder, values in ((images, array), (labels, mask)):
            image = itk.image_from_array(np.ascontiguousarray(values.T))
            image.SetSpacing([2.0, 3.0, 4.0])
            itk.imwrite(image, str(folder / f"{name}{suffix}"))
    raw.dicom(images / "series", array)
    raw.volume(labels / "series.nii.gz", mask, np.diag([-2.0, -3.0, 4.0, 1.0]))
    raw.volume(images / "bare.nii.gz", array)
    raw.volume(labels / "orphan.nii.gz", mask)
    out = run("folder")
    assert listed(out) == ["meta", "nifti", "nrrd", "series"] and out.names("unlabelled") == ["bare"]
    for name in listed(out):
        np.testing.assert_array_equal(out.array(name), mask)
        np.testing.assert_array_equal(out.array(name, "image"), array)
        affine = nib.load(next((out.folder / "images").glob(f"{name}*"))).affine
        np.testing.assert_allclose(np.abs(np.diag(affine)), [2, 3, 4, 1])
    assert out.content["labels"] == {"0": "background", "1": "label_1"}
    shown = capsys.readouterr().out
    assert "orphan.nii.gz: has no image" in shown and "1 images have no label" in shown


def test_folder_of_pictures(tmp_path, run):
    images, labels = tmp_path / "raw/images", tmp_path / "raw/labels"
    labels.mkdir(parents=True)
    mask = np.zeros((9, 12), np.uint8)
    mask[2:6, 3:9] = 1
    for name, suffix in (("p1_a", ".png"), ("p1_b", ".JPG"), ("p2_a", ".png"), ("p2_b", ".png"), ("p3_a", ".png")):
        raw.photograph(images / f"{name}{suffix}", (12, 9))
    palette = Image.fromarray(mask * 2)
    palette.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0] + [0] * 759)
    palette.save(labels / "p1_a.png")  # the index is the label
    Image.fromarray(mask * 255).save(labels / "p1_b.jpg", quality=50)
    Image.fromarray(mask * 255).convert("RGB").save(labels / "p2_a.bmp")
    Image.fromarray(mask > 0).save(labels / "p2_b.png")
    Image.fromarray(mask * 255).save(labels / "p3_a.png")
    out = run("folder", patient_pattern=r"^(p\d)_")
    assert listed(out) == ["p1_a", "p1_b", "p2_a", "p2_b", "p3_a"]
    for name, value in (("p1_a", 2), ("p1_b", 1), ("p2_a", 1), ("p2_b", 1), ("p3_a", 1)):
        np.testing.assert_array_equal(out.array(name), mask.T * value)
    groups = [{item["patient"] for item in out.content[s]} for s in ("training", "validation", "test")]
    assert sum(len(g) for g in groups) == 3


def toy_pictures(root):
    for name in ("a", "b"):
        raw.photograph(root / f"images/{name}.png", (12, 9))
        (root / "labels").mkdir(exist_ok=True)
        Image.new("L", (12, 9), 1).save(root / f"labels/{name}.png")


@pytest.mark.parametrize(
    ("break_it", "options", "message"),
    [
        (lambda r: (r / "labels").rename(r / "masks"), {}, "has no folder labels/"),
        (lambda r: [p.rename(p.with_stem(f"x{p.stem}")) for p in list((r / "labels").iterdir())], {}, "same name"),
        (lambda r: raw.photograph(r / "images/a.jpg", (12, 9)), {}, "rename one of them"),
        (lambda r: raw.photograph(r / "labels/a.png", (12, 9)), {}, "holds colours"),
        (lambda r: Image.new("L", (9, 12), 1).save(r / "labels/a.png"), {}, "must be equal"),
        (lambda r: None, {"patient_pattern": "("}, "give a regular expression"),
        (lambda r: None, {"patient_pattern": "a"}, "give a regular expression"),
        (lambda r: None, {"patient_pattern": "(z)"}, "does not fit the name"),
        (
            lambda r: raw.volume(r / "labels/a.nii", np.zeros((12, 9, 1, 3))) or (r / "labels/a.png").unlink(),
            {},
            "equal",
        ),
    ],
)
def test_messages_of_folder(tmp_path, run, break_it, options, message):
    toy_pictures(tmp_path / "raw")
    break_it(tmp_path / "raw")
    with pytest.raises(InputError, match=message):
        run("folder", **options)


def test_label_of_several_channels(tmp_path, run):
    raw.volume(tmp_path / "raw/images/a.nii", np.zeros((5, 6, 4)))
    raw.volume(tmp_path / "raw/labels/a.nii", np.zeros((5, 6, 4, 3)))
    with pytest.raises(InputError, match="one channel, this has 3"):
        run("folder")

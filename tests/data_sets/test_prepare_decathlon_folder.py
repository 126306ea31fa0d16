"""Decathlon tasks and one's own folders."""

from __future__ import annotations

import json
import os

import itk
import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw
from dicom_files import slice_file
from PIL import Image, ImageFilter

from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.data.report import inspect_dataset
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
    ("path", "message"),
    [("/etc/passwd", "has no supported format"), ("imagesTr/../../../x.nii", "no such file"), ("a\0b", "no file name")],
)
def test_what_is_no_label_map(tmp_path, run, path, message):
    folder = raw.decathlon(tmp_path / "raw")
    content = json.loads((folder / "dataset.json").read_text())
    content["training"][0]["label"] = path
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        run("decathlon")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": 5}, "'training' must be a list of cases, not int"),
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
    for text in (
        "toy_000.nii.gz: label of size [11, 13, 8]",
        "toy_001.nii.gz: holds 0.5",
        "toy_002.nii.gz: no such file",
    ):
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
    palette = Image.fromarray(mask)
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    palette.save(labels / "p1_a.png")  # the index is the label
    Image.fromarray(mask * 255).save(labels / "p1_b.jpg", quality=50)
    Image.fromarray(mask * 255).convert("RGB").save(labels / "p2_a.bmp")
    Image.fromarray(mask > 0).save(labels / "p2_b.png")
    Image.fromarray(mask * 255).save(labels / "p3_a.png")
    out = run("folder", patient_pattern=r"^(p\d)_")
    assert listed(out) == ["p1_a", "p1_b", "p2_a", "p2_b", "p3_a"]
    for name in listed(out):
        np.testing.assert_array_equal(out.array(name), mask.T)
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
        (lambda r: (r / "labels").rename(r / "outlines"), {}, "has no folder labels/"),
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
            "image of size",
        ),
    ],
)
def test_messages_of_folder(tmp_path, run, break_it, options, message):
    toy_pictures(tmp_path / "raw")
    break_it(tmp_path / "raw")
    with pytest.raises(InputError, match=message):
        run("folder", **options)


def square(value=1, dtype=np.uint8):
    pixels = np.zeros((24, 30), dtype)
    pixels[6:18, 8:22] = value
    return pixels


def folder_of(root, masks, suffix=".png", names=("{}", "{}"), **options):
    """Pictures with masks: ``{name: image}``."""
    (root / "labels").mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        raw.photograph(root / f"images/{names[0].format(name)}.png", (30, 24))
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        mask.save(root / f"labels/{names[1].format(name)}{suffix}", **options)


SOFT = Image.fromarray(square(255)).filter(ImageFilter.GaussianBlur(1))
DRAWN = Image.fromarray(np.dstack([square() * 0 + 255] * 3 + [square(255)]))


@pytest.mark.parametrize(
    ("mask", "suffix", "word"),
    [
        (square(255), ".tif", ""),
        (square(255), ".jpg", "soft edges"),
        (SOFT, ".png", "soft edges"),
        (DRAWN, ".png", "alpha channel"),
        (square(65535, np.uint16), ".png", ""),
        (square() > 0, ".tiff", ""),
    ],
)
def test_masks_of_two_values(tmp_path, run, capsys, mask, suffix, word):
    folder_of(tmp_path / "raw", {"a": mask, "b": mask, "c": mask}, suffix)
    out = run("folder")
    for name in "abc":
        assert (out.array(name) != square().T).sum() <= (4 if mask is SOFT else 0)  # corners are round
    assert out.content["labels"] == {"0": "background", "1": "label_1"} and word in capsys.readouterr().out


def test_values_above_255_stay(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square(256, np.uint16), "b": square(300, np.uint16), "c": square()})
    out = run("folder")
    for name, value in (("a", 256), ("b", 300), ("c", 1)):
        np.testing.assert_array_equal(out.array(name), square(value, np.uint16).T)
    assert set(out.content["labels"]) == {"0", "1", "256", "300"}


def test_masks_of_different_codings_stop_before_any_work(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square(255), "b": square(2)})
    with pytest.raises(InputError, match=r"a.png: its greatest value is 255, that of b.png is 2"):
        run("folder")
    assert not (tmp_path / "out").exists()


def test_cases_are_done_again_where_another_one_changes_what_values_mean(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square(255), "b": square(255)})
    assert run("folder").array("a").max() == 1
    both = square(128)
    both[:9] = square(255)[:9]
    folder_of(tmp_path / "raw", {"c": both})
    out = run("folder")
    assert out.array("a").max() == 255 and set(out.content["labels"]) == {"0", "128", "255"}


def test_exif_is_followed_and_told(tmp_path, run, capsys):
    pixels = np.random.default_rng(0).integers(0, 50, (24, 30, 3), dtype=np.uint8) + square(150)[..., None]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for name in "ab":
        folder_of(tmp_path / "raw", {name: np.rot90(square(), -1)})
        Image.fromarray(pixels).save(tmp_path / f"raw/images/{name}.png", exif=exif)
    out = run("folder")
    assert "2 images are turned as their EXIF tag says" in capsys.readouterr().out
    image, label = (load_image(out.folder / out.content["training"][0][key]).numpy() for key in ("image", "label"))
    assert (
        image.shape[1:] == label.shape[1:] == (24, 30) and image[0][label[0] > 0].min() > image[0][label[0] == 0].max()
    )


def test_a_mask_that_ignores_the_exif_tag(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (30, 24)).save(tmp_path / "raw/images/a.png", exif=exif)
    with pytest.raises(InputError, match=r"labels/a.png: lies on a.png as both are stored, but the EXIF tag of a.png"):
        run("folder")
    Image.new("RGB", (30, 24)).save(tmp_path / "raw/images/a.png")
    Image.fromarray(square()).save(tmp_path / "raw/labels/a.png", exif=exif)
    with pytest.raises(InputError, match=r"labels/a.png: lies on a.png as both are stored, but the EXIF tag of a.png"):
        run("folder")


def test_masks_that_their_exif_tag_turns_upside_down_are_told(tmp_path, run, capsys):
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})
    exif = Image.Exif()
    exif[0x0112] = 3
    mask = np.tril(square())
    Image.fromarray(mask).save(tmp_path / "raw/labels/a.png", exif=exif)
    np.testing.assert_array_equal(run("folder").array("a"), mask[::-1, ::-1].T)
    assert "1 masks are turned as their EXIF tag says, such as a.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names", [("{}", "{}_mask"), ("{}", "{} Segmentation"), ("{}_0000", "{}"), ("img_{}", "mask_{}"), ("{}", "{}-GT")]
)
def test_names_that_differ_by_an_affix(tmp_path, run, capsys, names):
    masks = {f"c{i}": np.roll(square(), i, 1) for i in range(3)}
    folder_of(tmp_path / "raw", masks, names=names)
    out = run("folder")
    for name, mask in masks.items():
        np.testing.assert_array_equal(out.array(names[0].format(name)), mask.T)
    assert "3 labels are matched by part of their name" in capsys.readouterr().out


def test_a_name_that_fits_whole_goes_first(tmp_path, run, capsys):
    folder_of(tmp_path / "raw", {"a": square(), "a_mask": square() * 0, "b": square()})
    (tmp_path / "raw/images/a_mask.png").unlink()
    out = run("folder")
    assert out.array("a").any() and "a_mask.png: has no image and is left out" in capsys.readouterr().out


def test_names_that_fit_several(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square()}, names=("{}", "{}_mask"))
    folder_of(tmp_path / "raw", {"a": square()}, names=("{}", "{}_seg"))
    with pytest.raises(InputError, match=r"which of a.png, a_mask.png, a_seg.png belong together"):
        run("folder")


def test_one_left_over_on_each_side_is_named(tmp_path, run, capsys):
    folder_of(tmp_path / "raw", {name: square() for name in "abcd"})
    (tmp_path / "raw/images/b.png").unlink()
    (tmp_path / "raw/labels/d.png").unlink()
    (tmp_path / "raw/images/notes.webp").write_bytes(b"")
    out = run("folder")
    assert listed(out) == ["a", "c"] and out.names("unlabelled") == ["d"]
    shown = capsys.readouterr().out
    assert "labels/b.png: has no image and is left out" in shown and "listed as 'unlabelled': d" in shown
    assert "notes.webp: has no supported format and is left out" in shown


def test_suffixes_in_any_case(tmp_path, run):
    for name, suffix in (("a", ".Nii.Gz"), ("b", ".NII.GZ"), ("c", ".nii.GZ"), ("d", ".NiI")):
        for kind, array in (("images", np.arange(60)), ("labels", np.arange(60) % 2)):
            raw.volume(tmp_path / f"{kind}.nii{suffix[4:].lower()}", array.reshape(3, 4, 5).astype(np.int16))
            (tmp_path / "raw" / kind).mkdir(parents=True, exist_ok=True)
            content = (tmp_path / f"{kind}.nii{suffix[4:].lower()}").read_bytes()
            (tmp_path / f"raw/{kind}/{name}{suffix}").write_bytes(content)
    out = run("folder")
    assert listed(out) == ["a", "b", "c", "d"]
    assert all((out.array(name, "image") % 2 == out.array(name)).all() for name in "abcd")


def test_names_that_are_one_in_the_output(tmp_path, run):
    folder_of(tmp_path / "raw", {"x__a": square()})
    raw.photograph(tmp_path / "raw/images/x/a.png", (30, 24))
    with pytest.raises(InputError, match="would have the same name as"):
        run("folder")


def test_label_of_several_channels(tmp_path, run):
    raw.volume(tmp_path / "raw/images/a.nii", np.zeros((5, 6, 4)))
    raw.volume(tmp_path / "raw/labels/a.nii", np.zeros((5, 6, 4, 3)))
    with pytest.raises(InputError, match="one channel, this has 3"):
        run("folder")


def test_labels_of_volumes_are_put_onto_the_grid_of_their_image(tmp_path, run):
    """Stored in another orientation, by a program that leaves 0.9999998; one that lies elsewhere is named."""
    affine = np.array([[-2.0, 0, 0, 7], [0, -1, 0, 9], [0, 0, 3, 3], [0, 0, 0, 1]])
    mask = np.zeros((6, 7, 5), np.float32)
    mask[1:3, 2:6, 1:2] = 0.9999998
    for name in "abcd":
        raw.volume(tmp_path / f"raw/images/{name}.nii.gz", np.random.default_rng(0).normal(size=mask.shape), affine)
        turned = nib.as_closest_canonical(nib.Nifti1Image(mask, affine))
        raw.volume(tmp_path / f"raw/labels/{name}.nii.gz", np.asarray(turned.dataobj), turned.affine)
    raw.volume(tmp_path / "raw/labels/d.nii.gz", mask, np.eye(4))
    with pytest.raises(InputError, match=r"1 bad cases(.|\n)*d\.nii\.gz: its voxels lie up to .*: resample the label"):
        run("folder")
    for name in "abc":
        written = nib.load(tmp_path / f"out/labels/{name}.nii.gz")
        np.testing.assert_array_equal(written.dataobj, mask.round())
        np.testing.assert_allclose(written.affine, affine)


def test_names_that_look_alike_belong_together(tmp_path, run):
    """A Mac writes an umlaut as two characters."""
    folder_of(tmp_path / "raw", {"Mu\u0308ller": square(), "b": square()})
    (tmp_path / "raw/images/Mu\u0308ller.png").rename(tmp_path / "raw/images/M\u00fcller.png")
    assert listed(run("folder")) == ["M\u00fcller", "b"]


def test_paths_that_are_too_long_for_a_name_are_shortened(tmp_path, run):
    deep = "/".join(["x" * 60] * 6)
    for kind in ("images", "labels"):
        (tmp_path / "raw" / kind / deep).mkdir(parents=True)
    folder_of(tmp_path / "raw", {f"{deep}/a": square(), "b": square()})
    assert [len(name) for name in listed(run("folder"))] == [1, 180]


def test_names_that_are_no_text_can_be_checked(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})
    for kind in ("images", "labels"):
        try:
            os.rename(bytes(tmp_path / f"raw/{kind}/a.png"), bytes(tmp_path / f"raw/{kind}") + b"/\xff.png")
        except OSError:
            pytest.skip("this file system takes text alone")
    assert inspect_dataset(run("folder").folder).errors == []


def test_masks_is_another_name_for_labels(tmp_path, run, capsys):
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})
    (tmp_path / "raw/labels").rename(tmp_path / "raw/masks")
    out = run("folder")
    assert listed(out) == ["a", "b"] and all("label" in item for item in out.content["training"])
    assert inspect_dataset(out.folder).errors == []
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})  # beside labels/ it is not looked at
    run("folder")
    assert "raw: masks beside images/ and labels/ are left out" in capsys.readouterr().out


def test_what_lies_beside_images_and_labels_is_named(tmp_path, run, capsys):
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})
    (tmp_path / "raw/labels_A").mkdir()
    (tmp_path / "raw/masks.zip").write_bytes(b"")
    (tmp_path / "raw/images/patient").symlink_to(tmp_path / "gone")
    (tmp_path / "raw/images/1.dcm").write_bytes(slice_file(np.zeros((4, 5), np.int16)))
    run("folder")
    shown = capsys.readouterr().out
    assert "raw: labels_A, masks.zip beside images/ and labels/ are left out" in shown
    assert "patient: is a link to what is not there" in shown
    assert "1.dcm: is a slice that lies in images/ itself (give each series a folder there)" in shown


def test_a_mask_that_is_a_lost_link_is_a_fault_of_its_case(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})
    (tmp_path / "raw/labels/a.png").unlink()
    (tmp_path / "raw/labels/a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"labels/a.png: is a link to a file that is not there"):
        run("folder")


def test_a_mask_that_is_a_link_to_its_image(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square(), "b": square()})
    (tmp_path / "raw/images/a.png").unlink()
    (tmp_path / "raw/images/a.png").symlink_to(tmp_path / "raw/labels/a.png")
    with pytest.raises(InputError, match=r"labels/a.png: is the image itself"):
        run("folder")


def test_masks_of_a_kind_that_is_not_read(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square()})
    (tmp_path / "raw/labels/a.png").rename(tmp_path / "raw/labels/a.gif")
    with pytest.raises(InputError, match=r"labels/ holds a.gif\): save them as .nii, "):
        run("folder")


def test_masks_of_shares_are_no_labels(tmp_path, run):
    folder_of(tmp_path / "raw", {"a": square()})
    (tmp_path / "raw/labels/a.png").unlink()
    Image.fromarray(square().astype(np.float32) / 2 / square().max()).save(tmp_path / "raw/labels/a.tif")
    with pytest.raises(InputError, match=r"a.tif: holds 0.5, which is no label"):
        run("folder")

"""Folders of one's own with several raters: a folder for each, or all of them in one file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw
from PIL import Image

from medsegdiff_monai.__main__ import prepare as prepare_command
from medsegdiff_monai.data.report import inspect_dataset
from medsegdiff_monai.errors import InputError


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def labels_of(out, case):
    """Item of a case in a prepared set."""
    items = [item for split in ("training", "validation", "test", "unlabelled") for item in out.content.get(split, [])]
    return next(item for item in items if Path(item["image"]).name.split(".")[0] == case)


def pixels(out, file):
    return np.asarray(Image.open(out.folder / file))


def raw_pictures(root, cases):
    """Pictures of 12 x 9, with masks ``{case: {folder: array}}``."""
    for case, masks in cases.items():
        raw.photograph(root / f"images/{case}.png", (12, 9))
        for folder, array in masks.items():
            save(root / folder / f"{case}.png", array)


def dots(*columns):
    array = np.zeros((9, 12), np.uint8)
    array[2:5, list(columns)] = 1
    return array


def test_a_folder_for_each_rater(tmp_path, run, capsys):
    """In the order of their numbers; absent raters are left out, ``labels`` is the consensus."""
    every = {f"labels_{i}": dots(i) for i in (1, 2, 10)}
    cases = {"a": {**every, "labels": dots(1, 2)}, "b": {"labels_10": dots(3), "labels_1": dots()}, "c": {}}
    cases["d"] = {"labels": dots(5)}
    raw_pictures(tmp_path / "raw", cases)
    save(tmp_path / "raw/labels_2/orphan.png", dots(1))
    out = run("folder")
    a, b, d = (labels_of(out, case) for case in "abd")
    assert a["label"] == "./labels/a.png" and a["labels"] == [f"./labels_{i}/a.png" for i in (1, 2, 10)]
    assert "label" not in b and b["labels"] == ["./labels_1/b.png", "./labels_10/b.png"]
    assert d["label"] == "./labels/d.png" and "labels" not in d
    assert out.names("unlabelled") == ["c"] and "labels" not in labels_of(out, "c")
    for file, array in zip([a["label"], *a["labels"], *b["labels"]], [dots(1, 2), *every.values(), dots(), dots(3)]):
        np.testing.assert_array_equal(pixels(out, file), array)
    shown = capsys.readouterr().out
    assert "raters      2-3 in each of 2 images" in shown and "orphan.png: has no image" in shown


def test_raters_of_volumes_without_a_consensus(tmp_path, run):
    geometry = np.diag([2.0, 3.0, 4.0, 1.0])
    array = np.zeros((6, 7, 5), np.uint8)
    array[2:4] = 1
    for i, case in enumerate("abcde"):
        raw.volume(tmp_path / f"raw/images/{case}.nii.gz", array * 40 + i, geometry)
        raw.volume(tmp_path / f"raw/labels_1/{case}.nii.gz", array * 255, geometry)
        raw.volume(tmp_path / f"raw/labels_2/{case}.nii", array * 0, geometry)
    out = run("folder")
    assert all("label" not in item and len(item["labels"]) == 2 for item in out.content["training"])
    written = nib.load(out.folder / labels_of(out, "a")["labels"][0])
    np.testing.assert_array_equal(np.asarray(written.dataobj), array)
    np.testing.assert_allclose(written.affine, geometry)
    assert out.content["labels"] == {"0": "background", "1": "label_1"}
    report = inspect_dataset(out.folder)
    assert report.errors == [] and report.fingerprint["raters"]["empty_masks"] == 5


def test_channels_are_raters(tmp_path, run):
    four = [dots(1), dots(1, 2), dots(), dots(3, 4)]
    values = np.stack([dots(1), dots(1, 2)], -1)
    raw_pictures(
        tmp_path / "raw", {"a": {"labels": np.stack(four, -1) * 255}, "b": {"labels": values}, "c": {"labels": dots(6)}}
    )
    out = run("folder", raters="channels")
    a = labels_of(out, "a")
    assert "label" not in a and a["labels"] == [f"./labels_{i}/a.png" for i in (1, 2, 3, 4)]
    for file, array in zip(a["labels"], four):
        np.testing.assert_array_equal(pixels(out, file), array)
    for i, file in enumerate(labels_of(out, "b")["labels"]):
        np.testing.assert_array_equal(pixels(out, file), values[..., i])
    assert labels_of(out, "c")["labels"] == ["./labels_1/c.png"]


def test_channels_that_hold_label_values(tmp_path, run):
    values = np.stack([dots(1) * 2, dots(1, 2), dots(1, 2)], -1)
    raw_pictures(tmp_path / "raw", {"a": {"labels": values}, "b": {"labels": values * 0}})
    out = run("folder", raters="channels")
    for i, file in enumerate(labels_of(out, "a")["labels"]):
        np.testing.assert_array_equal(pixels(out, file), values[..., i])
    raw_pictures(tmp_path / "raw", {"c": {"labels": dots(1) * 255}})
    with pytest.raises(InputError, match="a label must have the same value in all masks"):
        run("folder", raters="channels")


def test_channels_of_a_volume_are_raters(tmp_path, run):
    array = np.zeros((6, 7, 5, 3), np.uint8)
    array[2:4, ..., 0] = array[3, ..., 2] = 1
    raw.volume(tmp_path / "raw/images/a.nii.gz", array[..., 0] * 50)
    raw.volume(tmp_path / "raw/labels/a.nii.gz", array)
    out = run("folder", raters="channels")
    files = labels_of(out, "a")["labels"]
    assert files == [f"./labels_{i}/a.nii.gz" for i in (1, 2, 3)]
    for i, file in enumerate(files):
        np.testing.assert_array_equal(np.asarray(nib.load(out.folder / file).dataobj), array[..., i])


@pytest.mark.parametrize("suffix", [".png", ".nii.gz"])
def test_bits_are_raters_the_same_number_for_all_cases(tmp_path, run, suffix):
    """Rater 3, the last, marks something in one case alone."""
    marked = {"a": [dots(1), dots(1, 2), dots(7)], "b": [dots(), dots(2), dots()], "c": [dots(), dots(), dots()]}
    for case, masks in marked.items():
        values = sum(m << i for i, m in enumerate(masks)).astype(np.uint8)
        if suffix == ".png":
            raw_pictures(tmp_path / "raw", {case: {"labels": values}})
        else:
            raw.volume(tmp_path / f"raw/images/{case}.nii.gz", values[..., None])
            raw.volume(tmp_path / f"raw/labels/{case}.nii.gz", values[..., None])
    out = run("folder", raters="bits")
    for case, masks in marked.items():
        files = labels_of(out, case)["labels"]
        assert files == [f"./labels_{i}/{case}{suffix}" for i in (1, 2, 3)]
        for file, array in zip(files, masks):
            read = pixels(out, file) if suffix == ".png" else np.asarray(nib.load(out.folder / file).dataobj)[..., 0]
            np.testing.assert_array_equal(read, array)


def test_bits_of_a_set_that_grows(tmp_path, run):
    """Cases that are finished get the rater that a new case brings."""
    raw_pictures(tmp_path / "raw", {"a": {"labels": dots(1)}})
    assert len(labels_of(run("folder", raters="bits"), "a")["labels"]) == 1
    raw_pictures(tmp_path / "raw", {"b": {"labels": dots(1) * 4}})
    assert len(labels_of(run("folder", raters="bits"), "a")["labels"]) == 3


def test_preparing_goes_on_where_it_stopped_and_takes_new_raters(tmp_path, run):
    raw_pictures(tmp_path / "raw", {case: {"labels_1": dots(1), "labels_2": dots(2)} for case in "ab"})
    out = run("folder")
    times = {p: p.stat().st_mtime_ns for p in out.folder.rglob("*.png")}
    (out.folder / "labels_2/b.png").unlink()
    run("folder")  # a lost file is written again, with the rest of its case
    assert {p: p.stat().st_mtime_ns == t for p, t in times.items()} == {p: p.stem == "a" for p in times}
    new = save(tmp_path / "raw/labels_3/a.png", dots(3))
    os.utime(new, (0, 0))  # copied with its old time
    out = run("folder")
    assert len(labels_of(out, "a")["labels"]) == 3 and len(labels_of(out, "b")["labels"]) == 2


@pytest.mark.parametrize(
    ("raters", "spoil", "message"),
    [
        ("channel", None, "raters='channel' must be channels or bits"),
        (True, None, "raters=True must be channels or bits"),
        (3, None, "raters=3 must be channels or bits"),
        (["bits"], None, "must be channels or bits"),
        ("bits", lambda r: save(r / "labels_1/a.png", dots(1)), r"raters='bits' reads all raters .* labels_1/"),
        ("bits", lambda r: shutil.move(r / "labels", r / "labels_1"), r"raters='bits' reads all raters .* labels_1/"),
        ("bits", lambda r: raw.photograph(r / "labels/a.png", (12, 9)), "holds colours"),
        ("bits", lambda r: (r / "labels/a.png").write_bytes(b""), r"1 bad cases(.|\n)*a\.png: cannot be read"),
        ("channels", lambda r: save(r / "labels/a.jpg", dots(1)) and (r / "labels/a.png").unlink(), "save it as PNG"),
        (
            "bits",
            lambda r: raw.volume(r / "labels/a.nii", np.full((12, 9), 0.5)) or (r / "labels/a.png").unlink(),
            "0.5",
        ),
        ("channels", lambda r: save(r / "labels/a.png", dots(1)[:5]), "must be equal"),
    ],
)
def test_messages_of_raters(tmp_path, run, raters, spoil, message):
    raw_pictures(tmp_path / "raw", {"a": {"labels": dots(1)}, "b": {"labels": dots(1, 2)}})
    if spoil is not None:
        spoil(tmp_path / "raw")
    with pytest.raises(InputError, match=message):
        run("folder", raters=raters)


def test_command_passes_raters_on(tmp_path):
    raw_pictures(tmp_path / "raw", {"a": {"labels": dots(1) * 3}})
    prepare_command("folder", str(tmp_path / "raw"), str(tmp_path / "out"), raters="bits")
    assert len(json.loads((tmp_path / "out/dataset.json").read_text())["training"][0]["labels"]) == 2
    with pytest.raises(InputError, match="--raters: decathlon has no such option"):
        prepare_command("decathlon", str(tmp_path / "out"), str(tmp_path / "other"), raters="bits")

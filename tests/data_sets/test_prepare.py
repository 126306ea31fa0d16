"""What all kinds of raw data have in common."""

from __future__ import annotations

import json
import os

import pytest
import raw_layouts as raw
from raw_layouts import tree

from medsegdiff_monai.data.raw.prepare import prepare
from medsegdiff_monai.errors import InputError


def test_resumes_where_it_stopped(tmp_path, run):
    folder = raw.decathlon(tmp_path / "raw")
    (folder / "imagesTr/toy_003.nii.gz").rename(tmp_path / "aside")
    with pytest.raises(InputError, match="1 bad cases"):
        run("decathlon")
    first = tmp_path / "out/images/toy_000.nii.gz"
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/images").iterdir()}
    assert first in times and len(times) == 6
    (tmp_path / "aside").rename(folder / "imagesTr/toy_003.nii.gz")
    out = run("decathlon")
    assert {p: p.stat().st_mtime_ns for p in times} == times  # finished cases are not done again
    assert len(list((out.folder / "images").iterdir())) == 7
    newer = out.folder.stat().st_mtime + 60
    os.utime(folder / "imagesTr/toy_000.nii.gz", (newer, newer))
    run("decathlon")
    assert first.stat().st_mtime_ns > times[first]  # a source that changed is


def test_a_lost_output_is_written_again(tmp_path, run):
    raw.decathlon(tmp_path / "raw")
    out = run("decathlon")
    lost = out.folder / "labels/toy_001.nii.gz"
    lost.unlink()
    run("decathlon")
    assert lost.is_file()


def test_workers_and_seed(tmp_path):
    raw.brats2021(tmp_path / "raw")
    for name, workers in (("one", 1), ("three", 3)):
        prepare("brats", tmp_path / "raw", tmp_path / name, workers=workers)
    one, three = tree(tmp_path / "one"), tree(tmp_path / "three")
    assert one == three
    prepare("decathlon", raw.decathlon(tmp_path / "task", 12), tmp_path / "a", seed=1)
    prepare("decathlon", tmp_path / "task", tmp_path / "b", seed=2)
    contents = [json.loads((tmp_path / n / "dataset.json").read_text()) for n in "ab"]
    assert contents[0]["validation"] != contents[1]["validation"]
    assert contents[0]["split"] == {"drawn_by_seed": 1, "images": 12}


def test_output_of_other_options_is_refused(tmp_path, run):
    raw.refuge1(tmp_path / "raw")
    run("refuge")
    with pytest.raises(InputError, match="with other options: give another --output"):
        run("refuge", crop_disc=True)


def test_foreign_output_is_refused(tmp_path, run):
    raw.decathlon(tmp_path / "raw")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        run("decathlon")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("refuge2", {}, "is not a kind of data set: give one of refuge, brats, ddti, decathlon, nnunet, folder"),
        ("refuge", {"slices": "2D"}, "--slices: refuge has no such option; it has crop_disc"),
        ("decathlon", {"crop": 1}, "it has none"),
        ("refuge", {"crop_disc": "maybe"}, "is neither true nor false"),
    ],
)
def test_kind_and_options(tmp_path, run, kind, options, message):
    raw.refuge1(tmp_path / "raw")
    with pytest.raises(InputError, match=message):
        run(kind, **options)


def test_source_and_output_folders(tmp_path):
    with pytest.raises(InputError, match="is not a folder: give the unpacked download"):
        prepare("folder", str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="lies in the source, which is never altered"):
        prepare("folder", str(tmp_path), str(tmp_path / "out"))


def test_full_disk_is_one_message(tmp_path, monkeypatch):
    raw.decathlon(tmp_path / "raw")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medsegdiff_monai.data.raw.layout.write_atomically", full)
    with pytest.raises(InputError, match=r"cannot be written .*No space left"):
        prepare("decathlon", str(tmp_path / "raw"), str(tmp_path / "out"), workers=1)
    assert not (tmp_path / "out/dataset.json").exists()


def test_long_lists_of_faults_and_notes_are_cut(tmp_path, run, capsys):
    folder = raw.decathlon(tmp_path / "raw", 30)
    for i in range(25):
        (folder / f"labelsTr/toy_{i:03d}.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"25 bad cases were left out, 6 are ready") as error:
        run("decathlon")
    assert "... and 5 more" in str(error.value)
    root = tmp_path / "ddti/raw"
    raw.ddti(root)
    (root / "DDTI_V1/DDTI_V1/7.xml").unlink()
    for i in range(30):
        raw.ultrasound(root / f"{100 + i}_1.jpg")
    prepare("ddti", str(root), str(tmp_path / "ddti/out"))
    assert "more: no XML names it" in capsys.readouterr().out

"""Inference reads each image once, when its turn has come."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from medsegdiff_monai.cases import read_source
from medsegdiff_monai.data import CaseDataset, CaseList, CaseLoader, DataSpec, FileReader, inference_items
from medsegdiff_monai.data.inference import _one_ahead
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.journal import CaseJournal

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, VOLUME_SETTINGS
from .test_bad_input import message

RGB = DataSpec(2, 3, 1)


def wait_for(items, number, seconds=60):
    end = time.monotonic() + seconds
    while len(items) < number and time.monotonic() < end:
        time.sleep(0.001)
    assert len(items) == number


def fill(folder: Path, source: Path, number: int) -> Path:
    """Copies of a picture, the second of them damaged."""
    folder.mkdir()
    for i in range(number):
        shutil.copy(source, folder / f"case_{i:03d}.png")
    (folder / "case_001.png").write_bytes(source.read_bytes()[:200])
    return folder


def preprocessing(**settings):
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": str(ROOT / "bundle"), **TINY, **settings})
    return parser.get_parsed_content("preprocessing")


def loader(folder: Path, **kwargs) -> CaseLoader:
    items = [{"image": str(path), "case": path.stem} for path in sorted(folder.iterdir())]
    dataset = CaseDataset(CaseList(items), preprocessing(**PICTURE_SETTINGS), RGB)
    return CaseLoader(dataset, **kwargs)


@pytest.fixture
def weights(tmp_path) -> Path:
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": str(ROOT / "bundle"), **TINY, **PICTURE_SETTINGS})
    (tmp_path / "models").mkdir()
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "models" / "model.pt")
    return tmp_path / "models"


class Opened:
    """The files that this process opens, in turn, with a mark where the first mask is in its place."""

    def __init__(self) -> None:
        self.active, self.names = False, []
        sys.addaudithook(self)  # for good: there is no way to remove it

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.active and event == "open" and isinstance(arguments[0], str):
            self.names.append(Path(arguments[0]).name)
        if self.active and event == "os.rename" and str(arguments[1]).endswith("_seg.nii.gz"):
            self.names.append("mask")


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


def test_the_first_mask_does_not_wait_for_the_other_images(bundle, pictures, weights, opened, tmp_path):
    for number in (3, 40):
        folder = fill(tmp_path / f"of_{number}", pictures / "image_0.png", number)
        opened.names.clear()
        opened.active = True
        with pytest.raises(RuntimeError) as error:  # for the damaged one, in the end
            bundle("inference", tmp_path / f"out_{number}", dataset_dir=folder, outputs=["seg"], **PICTURE_SETTINGS)
        opened.active = False
        assert "1 case was skipped" in message(error.value)
        until = opened.names[: opened.names.index("mask")]
        before = {name for name in until if name.startswith("case_") and name.endswith(".png")}
        # one is segmented and one is read while a mask is written, and the damaged one is passed over
        assert "case_000.png" in before and before <= {f"case_{i:03d}.png" for i in range(4)}


def test_the_voxels_of_each_image_are_read_once(bundle, volumes, weights, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        shutil.copy(volumes / f"image_{i}.nii.gz", folder)
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": str(ROOT / "bundle"), **TINY, **VOLUME_SETTINGS})
    torch.save(parser.get_parsed_content("network_def").state_dict(), weights / "model.pt")
    read, original = [], FileReader.get_data
    monkeypatch.setattr(FileReader, "get_data", lambda self, img: read.append(str(img)) or original(self, img))
    out = bundle("inference", dataset_dir=folder, **VOLUME_SETTINGS)
    assert len(read) == len(set(read)) == 3 and len(list(out.rglob("*_overlay.png"))) == 3


def test_files_that_are_no_images_are_named(pictures, tmp_path, capsys):
    folder = fill(tmp_path / "data", pictures / "image_0.png", 3)
    (folder / "notes.txt").write_text("x")
    (folder / "scan.img").write_bytes(bytes(200))
    (folder / "case_000.raw").write_bytes(bytes(200))
    cases = inference_items(str(folder), RGB, str(tmp_path / "out"), "model.pt")
    assert [item["case"] for item in cases] == ["case_000", "case_001", "case_002"]
    assert "skipped, not images of a supported format: notes.txt, scan.img." in capsys.readouterr().out


def test_results_of_earlier_runs_are_no_images(pictures, tmp_path, capsys):
    folder = fill(tmp_path / "data", pictures / "image_0.png", 2)
    for out in (folder, folder / "first"):  # in the folder itself a picture beside the results remains one
        journal = CaseJournal(out)
        for case in ("case_000", "case_001"):
            (out / case).mkdir(parents=True)
            shutil.copy(pictures / "image_0.png", out / case / f"{case}_seg.png")
            journal.add(case, {"case": case}, ["_seg.png"])
    (folder / "patient").mkdir()
    shutil.copy(pictures / "image_0.png", folder / "patient" / "more.png")
    cases = inference_items(str(folder), RGB, str(folder / "second"), "model.pt")
    assert sorted(item["case"] for item in cases) == ["case_000", "case_001", "more"]
    assert "2 cases skipped, the results of an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize("out", [".", ".."])
def test_results_among_the_images_are_refused(pictures, tmp_path, out):
    folder = fill(tmp_path / "data", pictures / "image_0.png", 2)
    with pytest.raises(InputError, match=r"holds the images of .*: choose a folder beside them, or below"):
        inference_items(str(folder), RGB, str(folder / out), "model.pt")


@pytest.mark.parametrize("workers", [0, 2])
def test_cases_that_cannot_be_read_are_named_and_left_out(workers, pictures, tmp_path, caplog):
    cases = loader(fill(tmp_path / "data", pictures / "image_0.png", 5), num_workers=workers)
    for _ in range(2):
        cases.cases.faults.clear()
        found = [batch["case"][0] for batch in cases]
        assert found == ["case_000", "case_002", "case_003", "case_004"]
        assert len(cases.cases.faults) == 1
        with pytest.raises(InputError, match=r"1 case was skipped: .*case_001.png: cannot be read"):
            cases.cases.report()
    assert "skipped: " in caplog.text and "case_001.png" in caplog.text


def test_each_case_is_checked_against_the_variables(pictures, volumes, tmp_path):
    items = [
        {"image": str(path), "case": "c"} for path in (pictures / "label_0.png", volumes / "image_0.nii.gz", "x.png")
    ]
    cases = CaseList(items)
    dataset = CaseDataset(cases, preprocessing(**PICTURE_SETTINGS), DataSpec(2, 4, 1))
    assert list(CaseLoader(dataset)) == []
    with pytest.raises(InputError, match=r"3 cases were skipped") as error:
        cases.report()
    lines = str(error.value).splitlines()
    assert "in_channels=4" in lines[1] and "3 spatial axes" in str(error.value) and "no such file" in lines[-1]


def test_the_image_in_its_own_grid_comes_along_unchanged(volumes):
    items = CaseList([{"image": str(volumes / "image_0.nii.gz"), "case": "c"}])
    dataset = CaseDataset(items, preprocessing(spacing=[2.0, 2.0, 2.0]), DataSpec(3, 1, 2))
    import nibabel as nib

    image = nib.load(volumes / "image_0.nii.gz")
    torch.testing.assert_close(dataset[0]["source"][0].numpy(), image.get_fdata(dtype="float32"))
    assert abs(dataset[0]["source"].affine.numpy() - image.affine).max() < 1e-5
    assert dataset[0]["image"].shape != dataset[0]["source"].shape


def test_a_large_image_is_read_again_for_its_results(volumes, monkeypatch):
    items = CaseList([{"image": str(volumes / "image_0.nii.gz"), "case": "c"}])
    dataset = CaseDataset(items, preprocessing(spacing=[2.0, 2.0, 2.0]), DataSpec(3, 1, 2))
    kept = dataset[0]
    monkeypatch.setattr("medsegdiff_monai.data.inference.LARGE", kept["source"].numel() - 1)
    large = dataset[0]
    assert "source" not in large and torch.equal(large["image"], kept["image"])
    for one, other in zip(read_source(large), read_source(kept)):
        assert one == other if isinstance(one, str) else (np.asarray(one) == np.asarray(other)).all()


def test_a_link_names_its_case_and_not_what_it_leads_to(pictures, tmp_path):
    (tmp_path / "archive/visit").mkdir(parents=True)
    shutil.copy(pictures / "image_0.png", tmp_path / "archive/visit/scan.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/anna.png").symlink_to(tmp_path / "archive/visit/scan.png")
    (tmp_path / "data/patient_7").symlink_to(tmp_path / "archive/visit")
    arguments = (RGB, str(tmp_path / "out"), "model.pt")
    assert [item["case"] for item in inference_items(str(tmp_path / "data"), *arguments)] == ["anna", "scan"]
    assert [i["case"] for i in inference_items("", *arguments, images=[str(tmp_path / "data/anna.png")])] == ["anna"]


def test_the_next_case_is_read_while_one_is_used():
    """One, in a thread, and no further."""
    read = []

    def numbers():
        for i in range(4):
            read.append((i, threading.current_thread() is threading.main_thread()))
            yield i

    ahead = _one_ahead(numbers())
    for i in range(4):
        assert next(ahead) == i
        wait_for(read, min(i + 2, 4))
    assert next(ahead, None) is None and not any(main for _, main in read)


def test_what_goes_wrong_with_reading_is_raised_in_its_turn():
    def broken():
        yield 1
        raise OSError("no more")

    ahead = _one_ahead(broken())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="no more"):
        next(ahead)

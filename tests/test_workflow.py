"""A data set to masks in a few commands, from a wheel as from a clone."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medsegdiff_monai.__main__ as commands
from medsegdiff_monai.errors import InputError, find_input_error
from medsegdiff_monai.settings import find_bundle_root

from .conftest import ROOT


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["medsegdiff", *map(str, words)])
    commands.main()


def test_train_evaluate_and_segment(volumes, tmp_path, monkeypatch, capsys):
    shipped = (ROOT / "bundle" / "models" / "model.pt").read_bytes()
    monkeypatch.chdir(tmp_path)  # no bundle here
    small = ["--channels", "[8,8]", "--roi_size", "[8,12,8]", "--seed", 3]
    small += ["--max_epochs", 1, "--val_interval", 1, "--device", "cpu"]
    call(monkeypatch, "train", volumes, "-o", "mine", *small)
    said = capsys.readouterr().out
    assert "Runs: python -m monai.bundle run training --config_file" in said and "--max_epochs 1" in said
    report = said.split("Report: ")[1].splitlines()[0]
    assert "| max_epochs | 1 |" in Path(report).read_text()
    overlay = json.loads(Path("mine/overlay.json").read_text())
    assert overlay["channels"] == [8, 8] and overlay.get("max_epochs") != 1
    assert "Next:    python -m monai.bundle run training" not in said  # which runs already
    weights = Path("mine/models/model.pt").read_bytes()
    with pytest.raises(InputError, match=r"mine/models/model\.pt: of an earlier training: add --resume true"):
        call(monkeypatch, "train", volumes, "-o", "mine", *small)
    assert Path("mine/models/model.pt").read_bytes() == weights
    files = [Path("mine/overlay.json"), Path("mine/overlay.fingerprint.json")]
    kept = [file.read_bytes() for file in files]
    further = ["--resume", "true", "--max_epochs", 2, "--val_interval", 1, "--device", "cpu"]
    with pytest.raises(RuntimeError) as refused:
        call(monkeypatch, "train", volumes, "-o", "mine", *further, "--channels", "[8,16]")
    assert "another architecture" in str(find_input_error(refused.value))
    assert [file.read_bytes() for file in files] == kept  # a refused training is as it was
    call(monkeypatch, "train", volumes, "-o", "mine", *further)  # with the settings that it has
    assert [file.read_bytes() for file in files] == kept
    capsys.readouterr()
    call(monkeypatch, "evaluate", volumes, "--trained", "mine", "--output_dir", "scores", "--device", "cpu")
    with open("scores/cases.csv", newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["image_4"]
    call(monkeypatch, "segment", volumes / "image_4.nii.gz", "--trained", "mine", "-o", "masks", "--device", "cpu")
    assert Path("masks/image_4/image_4_seg.nii.gz").is_file()
    said = capsys.readouterr().out
    evaluating, inference = (line for line in said.splitlines() if line.startswith("Runs: "))
    assert "run evaluating --config_file" in evaluating and "--checkpoint mine/models/model.pt" in inference
    options = dict(word.split(" ", 1) for word in inference.split(" --")[1:])
    (configs,) = shlex.split(options["config_file"])
    assert json.loads(configs)[-1] == "mine/overlay.json" and options["output_dir"] == "masks"
    assert (ROOT / "bundle" / "models" / "model.pt").read_bytes() == shipped


def test_a_folder_without_a_training_is_named(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"overlay\.json: no such file: give the folder of a finished `medsegdiff train`"
    ):
        call(monkeypatch, "segment", "scan.nii.gz", "--trained", tmp_path, "-o", tmp_path / "out")


def test_init_copies_the_bundle_once(tmp_path, monkeypatch):
    call(monkeypatch, "init", tmp_path / "mine")
    assert (tmp_path / "mine" / "configs" / "train.json").is_file()
    with pytest.raises(InputError, match="already exists"):
        call(monkeypatch, "init", tmp_path / "mine")


def test_the_bundle_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_bundle_root()).samefile(ROOT / "bundle")
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    (tmp_path / "bundle" / "configs" / "metadata.json").touch()
    assert find_bundle_root() == "bundle"


@pytest.mark.slow
def test_a_wheel_is_complete(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).random((34, 48, 32), dtype=np.float32), np.eye(4)),
        tmp_path / "a.nii.gz",
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONUTF8": "1"}
    program = [sys.executable, "-m", "medsegdiff_monai"]
    for words in (["segment", "a.nii.gz", "-o", "out", "--device", "cpu"], ["init", "mine"]):
        done = subprocess.run([*program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a" / "a_seg.nii.gz").is_file()
    assert (tmp_path / "mine" / "models" / "model.pt").is_file()
    names = ("dataset.json", "ATTRIBUTION.md", "images/0409_n5_00.png", "raters/4/0409_n5_00.png")
    assert all((tmp_path / "site" / "medsegdiff_monai" / "lidc" / name).is_file() for name in names)
    code = "import medsegdiff_monai; print(medsegdiff_monai.__file__)"
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert where.stdout.startswith(str(tmp_path))

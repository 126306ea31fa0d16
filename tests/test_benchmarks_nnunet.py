"""The benchmark of nnU-Net writes cases as nnU-Net takes them, and scores what comes back; it is not installed here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import accuracy, nnunet
from medsegdiff_monai.data.reading import load_label

from .conftest import make_nifti_dataset, write_json
from .test_benchmarks import call, one_thread  # noqa: F401

SETS = {
    "ACDC_slices": ("generic_2d", {"in_channels": 1, "num_classes": 2, "fit": "crop", "roi_size": [16, 16]}),
    "Hippocampus3D": ("hippocampus", {"roi_size": [16, 16, 16], "channels": [8, 8]}),
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two slices of a volume to score, and volumes whose voxels are oblique."""
    (slices := tmp_path / "ACDC_slices").mkdir()
    random, items = np.random.default_rng(0), []
    for name in ("p1_slice0", "p2_slice0", "p3_slice0", "p3_slice1"):
        for kind, values in (("image", random.integers(0, 255, (20, 17))), ("label", random.integers(0, 3, (20, 17)))):
            Image.fromarray(values.astype(np.uint8)).save(slices / f"{kind}_{name}.png")
        items.append({"image": f"image_{name}.png", "label": f"label_{name}.png"})
    write_json(slices, training=items[:2], validation=items[2:])
    (volumes := tmp_path / "Hippocampus3D").mkdir()
    make_nifti_dataset(volumes, (19, 22, 9))
    lists = json.loads((volumes / "dataset.json").read_text())
    write_json(volumes, training=lists["training"], validation=lists["test"])
    for module in (accuracy, nnunet):
        monkeypatch.setattr(module, "SETS", SETS)
    return tmp_path


def test_cases_are_converted_and_none_that_is_scored_is_trained_on(data):
    options = argparse.Namespace(data_root=data, work_dir=data / "work")
    for name, ending, train, scored in (("ACDC_slices", ".png", 2, 2), ("Hippocampus3D", ".nii.gz", 4, 1)):
        raw = nnunet.convert(name, 0, options)
        listed = json.loads((raw / "dataset.json").read_text())
        assert listed["numTraining"] == train and listed["file_ending"] == ending
        assert list(listed["labels"].values()) == [0, 1, 2]
        images, labels, tests = (
            sorted(p.name for p in (raw / f).iterdir()) for f in ("imagesTr", "labelsTr", "imagesTs")
        )
        assert images == [label.replace(ending, f"_0000{ending}") for label in labels] and len(images) == train
        assert len(tests) == scored and not set(tests) & set(images)
        label, source = raw / "labelsTr" / labels[0], data / name / labels[0].replace("image", "label")
        np.testing.assert_array_equal(load_label(label), load_label(source))
        if ending == ".nii.gz":
            np.testing.assert_allclose(nib.load(label).affine, nib.load(source).affine, rtol=1e-6)


def test_regions_that_overlap_are_refused(data, monkeypatch):
    overlapping = {"DRISHTI_roi": ("generic_2d", {"in_channels": 1, "regions": {"disc": [1, 2], "cup": [2]}})}
    for module in (accuracy, nnunet):
        monkeypatch.setattr(module, "SETS", overlapping)
    (data / "ACDC_slices").rename(data / "DRISHTI_roi")
    with pytest.raises(SystemExit, match="Regions overlap"):
        nnunet.convert("DRISHTI_roi", 0, argparse.Namespace(data_root=data, work_dir=data / "work"))


def test_what_nnunet_makes_of_cases_is_scored_once(data, monkeypatch):
    """A stand-in segments all cases as their labels say, in nnU-Net's order of axes."""
    commands = []

    def stand_in(command, options, loaders=1):
        commands.append(command)
        if "plan_and_preprocess" in command[0]:
            (options.work_dir / "preprocessed" / nnunet.folder_name(names[command[2]])).mkdir(parents=True)
            return
        name, out = command[3].partition("_")[2], Path(command[5])
        scored = json.loads((data / name / "dataset.json").read_text())["validation"]
        for item in scored:
            label = load_label(data / name / item["label"])[0]
            softmax = torch.nn.functional.one_hot(label.as_tensor().long(), 3).movedim(-1, 0).float()
            softmax = softmax[..., None] if label.ndim == 2 else softmax
            case = Path(item["image"]).name.split(".")[0]
            np.savez(out / f"{case}.npz", probabilities=softmax.permute(0, 3, 2, 1).numpy())
        cases = [Path(item["image"]).name.split(".")[0] for item in scored]
        facts = {"losses": [1.0] * 5 + [0.0] * 5, "iterations": 10, "seconds_of_cases": dict.fromkeys(cases, 0.5)}
        facts |= {"parameters_m": 1.0, "passes": 4, "learning_rate": 0.01, "torch": "2", "field": [16], "channels": [8]}
        (out / "facts.json").write_text(json.dumps(facts))

    names = {nnunet.folder_name(name)[7:10]: name for name in SETS}
    monkeypatch.setattr(nnunet, "call", stand_in)
    file = data / "r.jsonl"
    arguments = ["--data_root", data, "--python", data / "python", "--seconds", 9, "--results", file]
    call(monkeypatch, nnunet, *arguments, "--work_dir", data / "work")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["data"], row["method"]) for row in rows} == {(d, m) for d in SETS for m in nnunet.METHODS}
    assert sum("plan_and_preprocess" in command[0] for command in commands) == 2  # once for each data set
    for row in rows:
        assert row["dice"] == [1, 1] and row["ece"] == [0, 0] and row["seconds_per_image"] == 0.5
        assert (row["first_losses"], row["last_losses"]) == (1, 0) and "losses" not in row
        slices = row["data"] == "ACDC_slices"
        assert ("dice_volume" in row) == slices and row["cases"] == (2 if slices else 1)
        assert len(row["dice_of_cases"]) == 1
    commands.clear()
    call(monkeypatch, nnunet, *arguments, "--work_dir", data / "work")
    assert not list((data / "work").rglob("*.npz"))
    assert not commands and len(file.read_text().splitlines()) == len(rows)

    out = nnunet.output_folder("Hippocampus3D", "nnU-Net", 0, argparse.Namespace(work_dir=data / "work", seconds=9.0))
    np.savez(out / "image_4.npz", probabilities=np.zeros((3, 9, 22, 18)))
    config = accuracy.configure("evaluate", "Hippocampus3D", data, 0)
    with pytest.raises(SystemExit, match="shapes of prediction and label differ"):
        next(nnunet.segmented(config, out, {"image_4": 1.0}))

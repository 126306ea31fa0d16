"""The real configs, from training to masks in the input's geometry."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from .conftest import CONFIGS, PICTURE_SETTINGS, VOLUME_SETTINGS, make_nifti_dataset, make_png_dataset

FILES = ("seg", "prob", "uncertainty_entropy", "uncertainty_mi")


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_volumes_train_evaluate_infer_and_keep_their_geometry(bundle, volumes):
    settings = {**VOLUME_SETTINGS, "dataset_dir": volumes}
    training = bundle("train", **settings)
    models = training.parent / "models"
    weights = torch.load(models / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) and not v.is_complex() for v in weights.values())
    assert (models / "checkpoint_epoch=1.pt").is_file()
    known = {name for name, value in weights.items() if name.startswith("record.") and value.any()}
    assert {"record.extent", "record.intensity", "record.size"} <= known
    assert weights["record.flipped"].tolist() == [1, 0, 0]  # flip_axes of the training
    assert (training / "curves.png").is_file() and "val_mean_dice" in (training / "history.csv").read_text()

    (row,) = read_table(bundle("evaluate", **settings))
    scores = {"dice_class_1", "dice_class_2", "iou_class_1", "ece_class_2", "expected_dice", "expected_dice_class_2"}
    others = {"flag", "volume_mm3_class_1", "volume_mm3_std_class_1", "mean_pairwise_dice", "seconds", "hd95_class_1"}
    assert scores | others <= set(row)
    assert all(0 <= float(row[name]) <= 1 for name in scores | {"mean_pairwise_dice"})

    out = bundle("inference", **settings)
    source = nib.load(volumes / "image_4.nii.gz")
    for name in FILES:
        result = nib.load(out / "image_4" / f"image_4_{name}.nii.gz")
        assert result.shape[:3] == source.shape
        np.testing.assert_allclose(result.affine, source.affine, atol=1e-5)
        np.testing.assert_allclose(result.header.get_zooms()[:3], source.header.get_zooms(), rtol=1e-5)
    assert nib.load(out / "image_4" / "image_4_prob.nii.gz").shape[3] == 2
    assert set(np.unique(nib.load(out / "image_4" / "image_4_seg.nii.gz").get_fdata())) <= {0, 1, 2}
    assert (out / "image_4" / "image_4_overlay.png").is_file()


def test_pictures_train_evaluate_infer_and_give_png_masks(bundle, pictures):
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures}
    bundle("train", **settings)
    evaluated = bundle("evaluate", **settings)
    (row,) = read_table(evaluated)
    assert 0 <= float(row["dice_class_1"]) <= 1 and "area_px_class_1" in row
    assert (evaluated / "structures.csv").read_text().startswith("case,class,structure,kind")
    assert "class_1" in (evaluated / "report.html").read_text()
    out = bundle("inference", **settings)
    source = Image.open(pictures / "image_4.png")
    mask = Image.open(out / "image_4" / "image_4_seg.png")
    volume = nib.load(out / "image_4" / "image_4_seg.nii.gz").get_fdata()
    assert mask.size == source.size == volume.shape
    np.testing.assert_array_equal(np.asarray(mask).T, volume)


def test_overlapping_regions_and_epsilon_objective(bundle, tmp_path):
    data = make_png_dataset(tmp_path, classes=2)
    settings = {
        **PICTURE_SETTINGS, "dataset_dir": data, "num_classes": 2, "regions": {"disc": [1, 2], "cup": [2]},
        "prediction_type": "epsilon", "noise_schedule": "linear_beta",
    }  # fmt: skip
    bundle("train", **settings)
    (row,) = read_table(bundle("evaluate", **settings))
    assert {"dice_disc", "dice_cup"} <= set(row)


def test_two_dimensional_nifti_slices_by_windows(bundle, tmp_path):
    data = make_nifti_dataset(tmp_path, (23, 30), affine=np.diag([-0.5, 0.7, 1.0, 1.0]))
    settings = {**PICTURE_SETTINGS, "dataset_dir": data, "num_classes": 2, "in_channels": 1, "fit": "crop"}
    bundle("train", **settings)
    out = bundle("inference", **settings)
    result = nib.load(out / "image_4" / "image_4_seg.nii.gz")
    assert result.shape == (23, 30)
    np.testing.assert_allclose(result.affine, np.diag([-0.5, 0.7, 1.0, 1.0]))


def test_respaced_volume_comes_back_in_its_own_grid(bundle, volumes):
    settings = {**VOLUME_SETTINGS, "dataset_dir": volumes, "spacing": [1.5, 1.5, 1.5]}
    bundle("train", **settings)
    out = bundle("inference", **settings)
    assert nib.load(out / "image_4" / "image_4_seg.nii.gz").shape == (19, 22, 9)


@pytest.fixture
def trained(bundle, pictures):
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures}
    bundle("train", **settings)
    return settings


def test_same_seed_same_masks_and_another_seed_others(bundle, trained, tmp_path):
    first, again, other = (
        bundle("evaluate", output=tmp_path / name, seed=seed, **trained)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    name = Path("image_4") / "image_4_prob.nii.gz"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    assert (first / name).read_bytes() != (other / name).read_bytes()


def test_finished_cases_are_skipped_until_told_or_other_settings_are_asked_for(bundle, trained):
    mask = bundle("inference", **trained) / "image_4" / "image_4_seg.nii.gz"
    times = [mask.stat().st_mtime_ns]

    def is_renewed(**settings) -> bool:
        bundle("inference", **trained, **settings)
        times.append(mask.stat().st_mtime_ns)
        return times[-1] > times[-2]

    assert not is_renewed()
    assert is_renewed(overwrite="true")
    for settings in ({"num_steps": 2}, {"inferer#overlap": 0.25}):
        assert is_renewed(**settings) and not is_renewed(**settings), settings
    assert is_renewed()
    mask.write_bytes(mask.read_bytes()[:40])
    assert is_renewed() and not is_renewed()
    weights = torch.load(mask.parents[2] / "models" / "model.pt", weights_only=True)
    torch.save({name: value * 1.01 for name, value in weights.items()}, mask.parents[2] / "models" / "model.pt")
    assert is_renewed()


def test_inference_over_a_plain_folder_skips_bad_files_and_fails_in_the_end(bundle, trained, tmp_path):
    folder = tmp_path / "plain"
    (folder / "a").mkdir(parents=True)
    good = (trained["dataset_dir"] / "image_0.png").read_bytes()
    (folder / "scan.png").write_bytes(good)
    (folder / "a" / "scan.png").write_bytes(good)
    (folder / "broken.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(RuntimeError) as error:
        bundle("inference", output=tmp_path / "out", **{**trained, "dataset_dir": folder})
    assert "broken.png" in str(error.value.__cause__)
    assert not list((tmp_path / "out").glob(".*"))
    assert {row["case"] for row in read_table(tmp_path / "out")} == {"a_scan", "plain_scan"}


def test_training_resumes_with_false_as_a_string_meaning_false(bundle, pictures):
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures}
    out = bundle("train", **settings)
    bundle("train", **{**settings, "max_epochs": 2}, resume="true")
    assert [line.split(",")[0] for line in (out / "history.csv").read_text().splitlines()[1:]] == ["1.0", "2.0"]
    bundle("train", **settings, resume="False")
    assert [line.split(",")[0] for line in (out / "history.csv").read_text().splitlines()[1:]] == ["1.0"]


def test_shared_variables_and_network_are_the_same_in_all_configs():
    train, evaluate, inference = (
        ConfigParser.load_config_file(CONFIGS / f"{n}.json") for n in ("train", "evaluate", "inference")
    )
    differ = {"output_dir", "imports", "run", "initialize", "num_members"}
    differ |= {"amp"}  # by default training alone has it, on some CPUs
    differ |= {"network"}  # of several weights there are several, made of the same network_def
    for other in (evaluate, inference):
        for key in set(train) & set(other) - differ:
            expected, found = train[key], other[key]
            if key == "data_spec":  # inference reads no labels
                expected, found = ({k: v for k, v in spec.items() if k != "ignore_label"} for spec in (expected, found))
            assert expected == found, key
    for key in ("preprocessing", "postprocessing"):  # but for the label
        assert len(evaluate[key]["transforms"]) >= len(inference[key]["transforms"])
    assert train["validate"]["preprocessing"] == evaluate["preprocessing"]

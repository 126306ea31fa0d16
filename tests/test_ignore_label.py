"""Voxels that nobody has labelled count for nothing, and labels come out as they went in."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from monai.metrics import DiceMetric
from PIL import Image

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.metrics import expected_calibration_error, known_part, masks_and_labels
from medsegdiff_monai.objective import (
    BCE_WEIGHT,
    DICE_WEIGHT,
    OBJECTIVES,
    SegmentationDiffusionPrepareBatch,
    ensemble_score,
    loss_function,
    soft_jaccard_distance,
)
from medsegdiff_monai.pictures import palette_png_bytes
from medsegdiff_monai.raters import Consensusd, RatersToRegionsd
from medsegdiff_monai.schedulers import DDIMScheduler
from medsegdiff_monai.transforms import LabelsToRegionsd, RandCropByClassd, Regions

from .conftest import PICTURE_SETTINGS, VOLUME_SETTINGS, make_nifti_dataset, make_png_dataset

VOID = 255
SIZE = (2, 2, 6, 5)  # images, classes, plane


def example(objective, seed=0):
    """Prediction and target of a batch, for two members and three raters where there are sets."""
    torch.manual_seed(seed)
    if OBJECTIVES[objective].of_sets:
        return torch.randn(4, *SIZE[1:]), (torch.rand(2, 3, *SIZE[1:]) > 0.6).float()
    target = (
        (torch.rand(SIZE) > 0.6).float() if OBJECTIVES[objective].prediction_type == "sample" else torch.randn(SIZE)
    )
    return torch.randn(SIZE), target


def partly(target, rows=3):
    """Nobody has labelled the last rows."""
    target = target.clone()
    target[..., rows:, :] = torch.nan
    return target


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_that_of_the_part_that_is_labelled(objective):
    """As if the rest were cut off; its prediction has no gradient."""
    prediction, target = example(objective)
    prediction.requires_grad_()
    loss = loss_function(objective, VOID)(prediction, partly(target))
    plain = loss_function(objective)(prediction[..., :3, :], target[..., :3, :])
    torch.testing.assert_close(loss, plain)
    (gradient,) = torch.autograd.grad(loss, prediction)
    (wanted,) = torch.autograd.grad(plain, prediction)
    torch.testing.assert_close(gradient, wanted)
    assert (gradient[..., 3:, :] == 0).all() and (gradient[..., :3, :] != 0).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_patch_that_nobody_has_labelled_has_a_finite_loss_and_no_gradient(objective):
    prediction, target = example(objective)
    prediction.requires_grad_()
    loss = loss_function(objective, VOID)(prediction, partly(target, 0))
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.isfinite() and (gradient == 0).all()


def test_what_one_rater_ignores_counts_for_none():
    logits, raters = example("ensemble")
    one = raters.clone()
    one[:, 1, :, 3:] = torch.nan
    score = loss_function("ensemble", VOID)
    assert torch.equal(score(logits, one), score(logits, partly(raters)))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("ignore_label", [None, VOID])
def test_where_all_is_labelled_nothing_changes_to_the_last_bit(objective, ignore_label):
    prediction, target = example(objective)
    loss = loss_function(objective, ignore_label)(prediction, target)
    assert torch.equal(loss, loss_function(objective)(prediction, target))
    if objective == "ensemble":  # written out, without a share
        logits = prediction.unflatten(0, (2, 2))
        s, y = logits.sigmoid(), target
        score = soft_jaccard_distance(s, y).mean() - soft_jaccard_distance(s, s).sum((-2, -1)).mean() / 4
        dice = DiceLoss()(s.mean(1, keepdim=True).expand_as(y).flatten(0, 1), y.flatten(0, 1))
        mean, agreement = s.mean(1), y.mean(1)
        bce = -(agreement * mean.log() + (1 - agreement) * (1 - mean).log()).mean()
        torch.testing.assert_close(ensemble_score(prediction, target), score + DICE_WEIGHT * dice + BCE_WEIGHT * bce)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_carry_what_is_unknown_to_the_loss_alone(objective):
    """The mask that is noised has background there, the target NaN."""
    scheduler = DDIMScheduler(num_train_timesteps=10, prediction_type=OBJECTIVES[objective].prediction_type)
    prepare = SegmentationDiffusionPrepareBatch(scheduler, objective)
    label = partly((torch.rand(2, 3, *SIZE[1:]) > 0.5).float())
    mask, target, _, kwargs = prepare({"image": torch.rand(2, 1, 6, 5), "label": label})
    assert (mask[..., 3:, :] == -1).all() and mask.isfinite().all() and kwargs["noise"].isfinite().all()
    assert target[..., 3:, :].isnan().all() and target[..., :3, :].isfinite().all()


def test_masks_are_unknown_where_the_label_says_so():
    label = torch.tensor([[[0, 1, VOID], [4, 4, VOID]]])
    regions = {"all": [1, 4], "core": [4]}
    (masks,) = (LabelsToRegionsd("label", 2, regions, ignore_label=VOID)({"label": label})["label"],)
    nan = torch.nan
    wanted = torch.tensor([[[0, 1, nan], [1, 1, nan]], [[0, 0, nan], [1, 1, nan]]])
    torch.testing.assert_close(masks, wanted, equal_nan=True)
    raters = RatersToRegionsd("raters", 2, regions, ignore_label=VOID)({"raters": label.repeat(2, 1, 1)})["raters"]
    torch.testing.assert_close(raters, wanted.repeat(2, 1, 1, 1), equal_nan=True)


@pytest.mark.parametrize("value", [0, 1, 4, "4", 2.5, True])
def test_what_cannot_be_ignored(value):
    with pytest.raises(InputError, match="ignore_label="):
        Regions(2, {"a": [1], "b": [4]}, value)


def test_consensus_is_unknown_where_any_rater_is():
    raters = torch.tensor([[[1.0, 1, 0, torch.nan]], [[1, 0, 0, 1]]])
    out = Consensusd()({"raters": raters})
    torch.testing.assert_close(out["label"], torch.tensor([[1, 1, 0, torch.nan]]), equal_nan=True)
    out = Consensusd()({"raters": raters, "label": torch.ones(1, 4)})
    torch.testing.assert_close(out["label"], torch.tensor([[1, 1, 1, torch.nan]]), equal_nan=True)


def test_scores_are_those_of_the_part_that_is_labelled():
    torch.manual_seed(0)
    mask, label, prob = (torch.rand(2, 6, 5) for _ in range(3))
    mask, label = (mask > 0.5).float(), (label > 0.5).float()
    outputs = [{"mask": mask, "label": partly(label), "pred": None}, {"mask": mask, "label": label}]
    metric = DiceMetric(ignore_empty=False)
    metric(*masks_and_labels(outputs))
    found = metric.get_buffer()
    metric.reset()
    metric([mask[:, :3], mask], [label[:, :3], label])
    torch.testing.assert_close(found, metric.get_buffer())
    known, inside = known_part(partly(label), prob)
    torch.testing.assert_close(
        expected_calibration_error(inside, known), expected_calibration_error(prob[:, :3], label[:, :3])
    )
    assert known_part(label, prob) == (label, prob)


def test_no_patch_is_centred_on_what_is_ignored():
    """Where its value lies between those of classes, too."""
    label = torch.zeros(1, 40, 40)
    label[0, 5, 5], label[0, 30:, 30:] = 4, 2
    crop = RandCropByClassd("label", "label", [5, 5], 2, {"a": [1], "b": [4]})
    for seed in range(60):
        patch = crop.set_random_state(seed)({"label": label})[0]["label"]
        assert patch[0, 2, 2] != 2


@pytest.mark.parametrize(
    ("regions", "written"),
    [
        (None, [1, 2]),
        ({"a": [1], "b": [4]}, [1, 4]),
        ({"b": [4], "a": [1]}, [4, 1]),
        ({"lesion": [255], "organ": [300]}, [255, 300]),
        ({"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}, [2, 1, 4]),
        ({"disc": [1, 2], "cup": [2]}, [1, 2]),
        ({"cup": [2], "disc": [1, 2]}, [2, 1]),
        ({"kidneys": [3, 2], "tumour": [7]}, [2, 7]),
        ({"one": [1], "other": [1]}, [2, 1]),
        ({"x": [2], "one": [1], "other": [1]}, [2, 3, 1]),
    ],
)
def test_labels_come_out_as_they_went_in(regions, written):
    number = 2 if regions is None else len(regions)
    found = Regions(number, regions)
    assert found.written == written
    masks = torch.zeros(number, 3, 4)
    for i in range(number):
        masks[i, 0, i] = 1
    assert found.label_map(masks)[0, 0, :number].tolist() == written
    if found.exclusive and all(len(values) == 1 for values in found.values):
        label = torch.tensor([[[0, *written]]])
        assert torch.equal(found.label_map(found.masks(label)).long(), label)


def recode(folder, codes):
    """Give the labels of a set other values."""
    for path in folder.glob("label_*"):
        if path.suffix == ".png":
            Image.fromarray(codes[np.asarray(Image.open(path))].astype(np.uint8)).save(path)
        else:
            image = nib.load(path)
            nib.save(nib.Nifti1Image(codes[np.asarray(image.dataobj)], image.affine), path)


def rows_of(out):
    with (Path(out) / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("codes", [[0, 1, 4], [0, 7, 1000]])
def test_masks_of_volumes_have_the_codes_of_the_data(bundle, tmp_path, codes):
    data = tmp_path / "data"
    data.mkdir()
    make_nifti_dataset(data, (16, 12, 8))
    recode(data, np.array(codes, np.int16))
    regions = {"outer": codes[1:2], "inner": codes[2:]}
    settings = {**VOLUME_SETTINGS, "dataset_dir": data, "regions": regions}
    bundle("train", **settings)
    out = bundle("evaluate", **settings, outputs=["seg", "members", "overlay"])
    seg = np.asarray(nib.load(out / "image_4/image_4_seg.nii.gz").dataobj)
    members = np.asarray(nib.load(out / "image_4/image_4_members.nii.gz").dataobj)
    assert set(np.unique(seg)) <= set(codes) and set(np.unique(members)) <= set(codes) and members.any()
    (row,) = rows_of(out)
    volume = np.prod(nib.load(data / "image_4.nii.gz").header.get_zooms())
    for name, (code,) in regions.items():
        assert float(row[f"volume_mm3_{name}"]) == pytest.approx((seg == code).sum() * volume, rel=1e-5)


@pytest.mark.parametrize("code", [3, 255, 300])
def test_masks_of_pictures_have_the_codes_of_the_data(tmp_path, code):
    """As pixels too: in grey where a palette has no place for them."""
    (tmp_path / "label.png").write_bytes(palette_png_bytes(np.array([[0, code], [0, 0]])))
    assert np.asarray(Image.open(tmp_path / "label.png")).tolist() == [[0, 0], [code, 0]]


def test_colours_go_by_the_order_of_the_classes(tmp_path):
    """Values that are far apart, or equal modulo the number of colours, differ as 1 and 2 do."""
    for name, values in (("a", [1, 2]), ("b", [1, 7])):
        label = np.array([[0, values[0]], [values[1], 0]])
        (tmp_path / f"{name}.png").write_bytes(palette_png_bytes(label, values))
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in "ab")
    assert np.array_equal(first, second) and len(np.unique(first.reshape(-1, 3), axis=0)) == 3


@pytest.mark.parametrize("objective", ["ensemble", "epsilon"])
def test_training_and_evaluation_do_not_see_what_is_ignored(bundle, tmp_path, objective):
    """Half of each picture is not labelled: whatever its labels would be, training and scores are the same."""
    data = make_png_dataset(tmp_path)
    settings = {**PICTURE_SETTINGS, "dataset_dir": data, "ignore_label": 9, "flip_axes": [], "objective": objective}
    settings |= {"prediction_type": "sample" if objective == "ensemble" else objective}
    for path in data.glob("label_*.png"):
        label = np.asarray(Image.open(path)).copy()
        label[15:] = 9
        Image.fromarray(label).save(path)
    bundle("train", **settings)
    weights = torch.load(tmp_path / "models/model.pt", weights_only=True)
    assert all(value.isfinite().all() for name, value in weights.items() if not name.startswith("record."))
    out = bundle("evaluate", **settings)
    (row,) = rows_of(out)
    seg = np.asarray(Image.open(out / "image_4/image_4_seg.png"))
    label = np.asarray(Image.open(data / "label_4.png"))
    common, sizes = (seg[:15] & label[:15]).sum(), seg[:15].sum() + label[:15].sum()
    assert float(row["dice_class_1"]) == pytest.approx(2 * common / sizes if sizes else 1, abs=1e-5)
    history = json.dumps([*csv.DictReader((tmp_path / "train/history.csv").open())])
    assert "nan" not in history.lower()


def test_very_small_and_very_large_voxels_have_a_volume(bundle, tmp_path):
    """Of four micrometres: three decimals of a cubic millimetre are nothing."""
    data = tmp_path / "data"
    data.mkdir()
    affine = np.diag([-0.004, -0.004, 0.004, 1])
    make_nifti_dataset(data, (16, 12, 8), affine=affine)
    bundle("train", **VOLUME_SETTINGS, dataset_dir=data)
    out = bundle("inference", **VOLUME_SETTINGS, dataset_dir=data)
    image = nib.load(out / "image_4/image_4_seg.nii.gz")
    np.testing.assert_allclose(image.affine, affine, rtol=1e-5)
    for i, name in enumerate(("class_1", "class_2"), 1):
        wanted = (np.asarray(image.dataobj) == i).sum() * 0.004**3
        assert float(rows_of(out)[0][f"volume_mm3_{name}"]) == pytest.approx(wanted, rel=1e-6)

"""What becomes of several raters on their way to a training or a validation, through the real configs."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from medsegdiff_monai.data import DataSpec, training_splits
from medsegdiff_monai.handlers import EpochSeeding
from medsegdiff_monai.raters import Consensusd, DrawRatersd, LoadRatersd, RatersAsLabeld, RatersToRegionsd
from medsegdiff_monai.transforms import LabelsToRegionsd, RandCropByClassd

from .conftest import (
    CONFIGS,
    OBLIQUE,
    PICTURE_SETTINGS,
    ROOT,
    TINY,
    VOLUME_SETTINGS,
    make_nifti_dataset,
    make_png_dataset,
)

KINDS = {
    "pictures": (PICTURE_SETTINGS, DataSpec(2, 3, 1)),
    "volumes": ({**VOLUME_SETTINGS, "spacing": [1.0, 1.0, 1.5]}, DataSpec(3, 1, 2)),
}


def shifted(label, by):
    """What another rater would draw: the same, elsewhere."""
    return np.roll(label, by, axis=0)


def write_raters(folder, kind, case, shifts):
    suffix = "png" if kind == "pictures" else "nii.gz"
    names = [f"rater_{case}_{i}.{suffix}" for i in range(len(shifts))]
    for name, by in zip(names, shifts):
        if kind == "pictures":
            label = np.asarray(Image.open(folder / f"label_{case}.png"))
            Image.fromarray(shifted(label, by)).save(folder / name)
        else:
            image = nib.load(folder / f"label_{case}.nii.gz")
            label = np.asarray(image.dataobj)
            nib.save(nib.Nifti1Image(shifted(label, by), image.affine), folder / name)
    return names


def again(folder, item):
    """The same case in another folder, as no image may be in two lists."""
    (folder / "again").mkdir(exist_ok=True)
    image = shutil.copy(folder / item["image"], folder / "again")
    return {**item, "image": str(Path(image).relative_to(folder))}


@pytest.fixture(scope="module", params=list(KINDS))
def rated(request, tmp_path_factory):
    """Six cases: four raters and a label, four raters, two, one, a label, and one to validate on with three."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "pictures":
        make_png_dataset(folder, cases=6)
    else:
        make_nifti_dataset(folder, (19, 22, 9), cases=6)
    content = json.loads((folder / "dataset.json").read_text())
    items = [{k: v for k, v in item.items() if k != "patient"} for s in ("training", "test") for item in content[s]]
    for case, shifts in enumerate(([0, 1, 2, 3], [0, 1, 2, 3], [0, 2], [1], [], [0, 1, 3])):
        if shifts:
            items[case]["labels"] = write_raters(folder, request.param, case, shifts)
        if case in (1, 2, 3, 5):
            del items[case]["label"]
    lists = {"training": items[:5], "validation": [items[5], *(again(folder, items[i]) for i in (0, 3, 4))]}
    (folder / "dataset.json").write_text(json.dumps(lists))
    return SimpleNamespace(kind=request.param, folder=folder, settings=KINDS[request.param][0])


def config(data, name="train", **variables):
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / f"{name}.json"))
    settings = {**TINY, **data.settings, "bundle_root": str(ROOT / "bundle"), "dataset_dir": str(data.folder)}
    parser.update({**settings, "eval_split": "validation", **variables})
    return parser


def first(result):
    """MONAI's crops return a list of samples."""
    return result[0] if isinstance(result, list) else result


def drawing(parser, number):
    """Let a training draw so many raters."""
    for transform in parser["train#preprocessing#transforms"]:
        if transform["_target_"].endswith("DrawRatersd"):
            transform["num_raters"] = number
    return parser


def test_training_sees_all_raters_of_every_case(rated):
    parser = config(rated, batch_size=5)
    (batch,) = parser.get_parsed_content("train#dataloader")
    most = max(len(item.get("raters", [1])) for item in parser.get_parsed_content("train#dataset#data"))
    assert most > 1 and batch["label"].shape[:2] == (5, most)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_training_batches_always_have_the_same_number_of_raters(rated, number):
    parser = drawing(config(rated, batch_size=5), number)
    (batch,) = parser.get_parsed_content("train#dataloader")
    classes, field = parser["num_classes"], parser["roi_size"]
    assert batch["label"].shape == (5, number, classes, *parser.get_parsed_content("field_size"))
    assert batch["label"].dtype == torch.float32 and set(batch["label"].unique().tolist()) == {0, 1}
    assert batch["image"].shape[1] == parser["in_channels"] and "raters" not in batch
    assert batch["label"].flatten(3).sum(-1)[:, :, 0].min() > 0 or len(field) == 3  # a whole picture shows the mask


def test_raters_keep_their_differences_and_move_alike(rated):
    """All four raters of a case are its label, shifted along the first axis; flips and rotations keep it so."""
    items = training_splits(str(rated.folder), KINDS[rated.kind][1])["training"]
    item = next(item for item in items if item["case"] == "image_0")
    twin = {**item, "raters": [item["raters"][2]] * 4}
    preprocessing = drawing(config(rated), 4).get_parsed_content("train#preprocessing")
    differ = []
    for seed in range(6):
        label = first(preprocessing.set_random_state(seed)(dict(twin)))["label"]
        assert all(torch.equal(label[0], other) for other in label)
        label = first(preprocessing.set_random_state(seed)(dict(item)))["label"]
        differ.append(all(not torch.equal(a, b) for a, b in combinations(label, 2)))
    assert sum(differ) >= 4


def test_training_learns_from_the_raters_where_there_is_a_label_too(rated):
    items = {i["case"]: i for i in training_splits(str(rated.folder), KINDS[rated.kind][1])["training"]}
    preprocessing = drawing(config(rated), 1).get_parsed_content("train#preprocessing")
    item = {**items["image_0"], "raters": items["image_0"]["raters"][3:]}
    alone = {k: v for k, v in item.items() if k != "label"}
    consensus = {k: v for k, v in item.items() if k != "raters"}
    both, rater, label = (first(preprocessing.set_random_state(1)(dict(i)))["label"] for i in (item, alone, consensus))
    assert torch.equal(both, rater) and not torch.equal(both, label)


def test_a_single_label_is_preprocessed_as_it_always_was(rated):
    """The same numbers are drawn, and the mask has an axis for its rater."""
    transforms = drawing(config(rated), 1).get_parsed_content("train#preprocessing").transforms
    keys = ["image", "label"]
    rest = [t for t in transforms if not isinstance(t, (RatersAsLabeld, LoadImaged, EnsureChannelFirstd, LoadRatersd))]
    position = next(i for i, t in enumerate(rest) if isinstance(t, DrawRatersd))
    regions = LabelsToRegionsd("label", KINDS[rated.kind][1].num_classes)
    before = Compose([LoadImaged(keys, image_only=True), EnsureChannelFirstd(keys), *rest[:position], regions])
    assert isinstance(rest[position + 1], RatersToRegionsd) and len(rest) == position + 2
    suffix = "png" if rated.kind == "pictures" else "nii.gz"
    item = {k: str(rated.folder / f"{k}_4.{suffix}") for k in keys}
    after = Compose(transforms)
    for seed in range(4):
        old = first(before.set_random_state(seed)(dict(item)))
        new = first(after.set_random_state(seed)(dict(item)))
        assert torch.equal(old["image"], new["image"]) and torch.equal(old["label"][None], new["label"])
        np.testing.assert_array_equal(old["label"].affine, new["label"].affine)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_scored_cases_have_a_consensus_and_several_raters_where_there_are(rated, name):
    parser = config(rated, name)
    loader = parser.get_parsed_content("validate#dataloader" if name == "train" else "dataloader")
    spec = KINDS[rated.kind][1]
    found = {batch["case"][0]: batch for batch in loader}
    shape = (30, 22) if rated.kind == "pictures" else (19, 22, 9)
    shape = shape[::-1] if rated.kind == "pictures" else shape  # pictures are read with their columns first
    for case, raters in {"image_5": 3, "image_0": 4, "image_3": None, "image_4": None}.items():
        assert found[case]["label"].shape == (1, spec.num_classes, *shape)
        assert ("raters" in found[case]) == (raters is not None)
        if raters:
            assert found[case]["raters"].shape == (1, raters, spec.num_classes, *shape)
    raters = found["image_5"]["raters"][0]
    assert torch.equal(found["image_5"]["label"][0], (raters.mean(0) >= 0.5).float())
    regions = LabelsToRegionsd("label", spec.num_classes)
    load = Compose([LoadImaged("label", image_only=True), EnsureChannelFirstd("label"), regions])
    suffix = "png" if rated.kind == "pictures" else "nii.gz"
    for case, file in (("image_0", "label_0"), ("image_3", "rater_3_0"), ("image_4", "label_4")):
        mask = load({"label": str(rated.folder / f"{file}.{suffix}")})["label"]
        assert torch.equal(found[case]["label"][0], mask), case


def test_seeded_epochs_draw_the_same_raters_and_others_in_the_next(tmp_path):
    """From a cache, which must not keep what was drawn."""
    maps = [nib.Nifti1Image(np.full((4, 5, 3), i, np.uint8), np.eye(4)) for i in range(4)]
    for i, image in enumerate(maps):
        nib.save(image, tmp_path / f"{i}.nii.gz")
    items = [{"label": [str(tmp_path / f"{i}.nii.gz") for i in range(4)]}] * 12

    def epochs():
        dataset = CacheDataset(items, Compose([LoadRatersd("label"), DrawRatersd("label", 2)]), progress=False)
        seeding = EpochSeeding(dataset, seed=5)
        seen = []
        for epoch in (1, 2, 3):
            seeding(SimpleNamespace(state=SimpleNamespace(epoch=epoch)))
            batch = next(iter(DataLoader(dataset, batch_size=12)))
            seen.append(batch["label"][:, :, 0, 0, 0].tolist())
        return seen

    one, two, three = epochs()
    assert [one, two, three] == epochs()
    assert one != two and two != three
    assert all(a != b for a, b in one) and len({tuple(drawn) for drawn in one}) > 3


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("raters", [1, 2, 3, 5])
def test_every_rater_is_drawn_equally_often(raters, number):
    draw = DrawRatersd("label", number).set_random_state(0)
    maps = torch.arange(raters).reshape(-1, 1, 1).expand(-1, 2, 2)
    total: Counter = Counter()
    for _ in range(300):
        out = draw({"label": maps, "case": "a"})
        assert out["label"].shape == (number, 2, 2) and out["case"] == "a"
        counts = Counter(out["label"][:, 0, 0].tolist())
        assert max(counts.values()) - min(counts[i] for i in range(raters)) <= 1  # without replacement, balanced
        total += counts
    assert all(total[i] / (300 * number) == pytest.approx(1 / raters, abs=0.08) for i in range(raters))


def test_all_keys_get_the_raters_that_were_drawn():
    maps = torch.arange(5.0)[:, None]
    out = DrawRatersd(["a", "b", "c"], 3, allow_missing_keys=True).set_random_state(1)({"a": maps, "b": 10 * maps})
    assert torch.equal(10 * out["a"], out["b"]) and len(out) == 2


def centres(label, seeds=200, **kwargs):
    crop = RandCropByClassd("label", "label", [5, 5], **kwargs)
    return [first(crop.set_random_state(seed)({"label": label}))["label"] for seed in range(seeds)]


def test_patches_are_centred_on_what_any_rater_marked():
    label = torch.zeros(3, 40, 40)
    label[1, 20:22, 20:22] = 7  # beside nothing
    label[2, 5:9, 5:9] = 300
    found = centres(label, num_classes=2, regions={"small": [7], "large": [300]})
    assert all(patch.shape == (3, 5, 5) for patch in found)
    for rater, value in ((1, 7), (2, 300)):
        assert np.mean([bool((p[rater] == value).any()) for p in found]) == pytest.approx(1 / 3, abs=0.12)


def test_a_class_is_found_where_another_rater_says_otherwise():
    label = torch.zeros(2, 40, 40)
    label[0, 20, 20] = 1
    label[1, 18:30, 18:30] = 2
    assert np.mean([bool((p[0] == 1).any()) for p in centres(label, num_classes=2)]) > 0.3


def test_raters_who_agree_are_cropped_as_one():
    label = (torch.rand(1, 30, 30) > 0.95).float()
    for one, three in zip(centres(label, 20, num_classes=1), centres(label.repeat(3, 1, 1), 20, num_classes=1)):
        assert torch.equal(one.repeat(3, 1, 1), three)


@pytest.mark.parametrize("raters", [1, 4])
def test_masks_of_raters_are_those_of_each_label_map(raters):
    maps = torch.randint(0, 4, (raters, 5, 6, 7))
    regions = {"whole": [1, 2, 3], "core": [3]}
    masks = RatersToRegionsd("raters", 2, regions)({"raters": maps})["raters"]
    assert masks.shape == (raters, 2, 5, 6, 7) and masks.dtype == torch.float32
    single = LabelsToRegionsd("label", 2, regions)
    for mask, one in zip(masks, maps):
        assert torch.equal(mask, single({"label": one[None]})["label"])


@pytest.mark.parametrize("raters", [1, 2, 3, 4, 5])
def test_consensus_of_at_least_half_of_the_raters(raters):
    masks = (torch.rand(raters, 2, 8, 9) > 0.5).float()
    out = Consensusd()({"raters": MetaTensor(masks, affine=np.diag([2.0, 3, 4, 1]))})
    assert torch.equal(out["label"].as_tensor(), torch.as_tensor(masks.numpy().mean(0) >= 0.5).float())
    assert ("raters" in out) == (raters > 1) and out["label"].affine[0, 0] == 2
    kept = torch.zeros(2, 8, 9)
    out = Consensusd()({"raters": masks, "label": kept})
    assert out["label"] is kept
    assert Consensusd()({"label": kept}).keys() == {"label"}


def test_raters_of_other_programs_are_stacked(tmp_path):
    """Affines that differ by rounding, and files of another format."""
    import itk

    rng = np.random.default_rng(0)
    maps = [(rng.random((6, 7, 5)) > 0.5).astype(np.uint8) for _ in range(3)]
    affine = OBLIQUE.copy()
    affine[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * 1.5  # at right angles, as NRRD has it
    nib.save(nib.Nifti1Image(maps[0], affine), tmp_path / "0.nii.gz")
    nib.save(nib.Nifti1Image(maps[1], affine + 1e-4), tmp_path / "1.nii.gz")
    image = itk.image_from_array(np.ascontiguousarray(maps[2].T))
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    size = np.sqrt((lps[:3, :3] ** 2).sum(0))
    image.SetSpacing(size)
    image.SetOrigin(lps[:3, 3])
    image.SetDirection(lps[:3, :3] / size)
    itk.imwrite(image, str(tmp_path / "2.nrrd"))
    files = [str(tmp_path / name) for name in ("0.nii.gz", "1.nii.gz", "2.nrrd")]
    loaded = LoadRatersd("raters")({"raters": files})["raters"]
    np.testing.assert_array_equal(loaded, np.stack(maps))
    np.testing.assert_allclose(loaded.affine, affine, atol=1e-6)
    assert LoadRatersd("raters", allow_missing_keys=True)({}) == {}
    np.testing.assert_array_equal(LoadRatersd("label")({"label": files[1]})["label"], maps[1][None])


def test_training_and_evaluation_run_on_them(rated, bundle):
    """Cases with one rater, several and none besides a label, in the same data set; the table tells them apart."""
    settings = {**rated.settings, "dataset_dir": rated.folder}
    bundle("train", **settings, cache="disk")
    out = bundle("evaluate", **settings, eval_split="validation")
    with (out / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    distance = [name for name in rows["image_0"] if name.startswith("ged")]
    assert len(distance) == KINDS[rated.kind][1].num_classes
    assert {case: bool(row[distance[0]]) for case, row in rows.items()} == {
        "image_0": True, "image_3": False, "image_4": False, "image_5": True
    }  # fmt: skip
    assert all(row[name] for row in rows.values() for name in row if name.startswith("dice"))


@pytest.mark.parametrize("shape", [(5, 6), (4, 6, 5)])
def test_crop_as_large_as_the_image_is_the_image_and_looks_at_no_voxel(shape, monkeypatch):
    crop = RandCropByClassd(["image", "label"], "label", list(shape), 1)
    monkeypatch.setattr(torch, "bucketize", None)  # which numbers the voxels' classes
    data = {"image": torch.rand(1, *shape), "label": (torch.rand(1, *shape) > 0.5).float()}
    (found,) = crop(data)
    for key, value in data.items():
        torch.testing.assert_close(torch.as_tensor(found[key]), value, rtol=0, atol=0)

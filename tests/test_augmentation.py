"""The random part of training's preprocessing."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, MetaTensor, get_track_meta
from monai.transforms import Compose, RandAffined, RandFlipd, RandLambdad, ScaleIntensityd

from medsegdiff_monai.transforms import AugmentingCompose

from .conftest import CONFIGS

OVERLAYS = ["refuge2", "brats2021", "brats2021_3d", "ddti"]


def training(overlay: str | None, **variables: object) -> ConfigParser:
    parser = ConfigParser()
    files = [CONFIGS / "train.json"] + ([CONFIGS / "datasets" / f"{overlay}.json"] if overlay else [])
    parser.read_config([str(file) for file in files])
    parser.update({"bundle_root": "", **variables})
    return parser


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_augmentation_of_every_overlay_changes_the_image_alone(overlay):
    parser = training(overlay)
    augmentation = parser.get_parsed_content("augmentation")
    assert len(augmentation) >= 2
    size = [24] * parser["spatial_dims"]
    torch.manual_seed(0)
    image = MetaTensor(torch.randn(parser["in_channels"] or 1, *size))
    label = MetaTensor((torch.rand(1, *size) > 0.5).float())
    for transform in augmentation:
        transform.prob = 1.0
        out = Compose([transform])({"image": image.clone(), "label": label})
        assert out["image"].shape == image.shape and out["image"].isfinite().all()
        assert not torch.equal(out["image"], image), transform
        assert torch.equal(out["label"], label)


def test_patches_are_centred_on_every_class_alike():
    """A class of 8 voxels beside one of 6000 is the centre of a third of all patches."""
    parser = training(None, roi_size=[8, 8, 8], spacing=None, regions={"small": [2035], "large": [255]})
    crop = next(
        t
        for t in parser["train#preprocessing#transforms"]
        if t["_target_"] == "medsegdiff_monai.transforms.RandCropByClassd"
    )
    index = parser["train#preprocessing#transforms"].index(crop)
    crop = parser.get_parsed_content(f"train#preprocessing#transforms#{index}").set_random_state(0)
    label = torch.zeros(1, 40, 40, 40)
    label[:, 20:] = 255
    label[:, 4:6, 4:6, 4:6] = 2035
    image = torch.zeros_like(label)
    found = [crop({"image": image, "label": label})[0]["label"] for _ in range(300)]
    assert all(patch.shape == (1, 8, 8, 8) for patch in found)
    assert sum(bool((patch == 2035).any()) for patch in found) / 300 == pytest.approx(1 / 3, abs=0.08)


def random_transforms() -> list:
    keys = ["image", "label"]
    return [
        ScaleIntensityd("image"),
        RandFlipd(keys, prob=0.5, spatial_axis=0),
        RandAffined(keys, prob=0.8, rotate_range=0.3, mode=["bilinear", "nearest"], padding_mode="border"),
    ]


def test_training_augments_as_compose_does_and_keeps_no_metadata():
    item = {key: MetaTensor(torch.rand(1, 9, 8)) for key in ("image", "label")}
    compose, ours = Compose(random_transforms()), AugmentingCompose(random_transforms())
    for seed in range(5):
        expected, found = (t.set_random_state(seed)(dict(item)) for t in (compose, ours))
        for key in item:
            assert type(found[key]) is torch.Tensor
            assert torch.equal(found[key], expected[key].as_tensor())
    cached = CacheDataset([item], ours, progress=False)
    assert type(cached._cache[0]["image"]) is torch.Tensor and type(cached[0]["image"]) is torch.Tensor
    assert get_track_meta()


def test_metadata_are_tracked_again_after_a_transform_fails():
    with pytest.raises(RuntimeError):
        AugmentingCompose([RandFlipd("missing")])({"image": MetaTensor(torch.rand(1, 4, 4))})
    assert get_track_meta()


def test_a_function_of_the_users_augments_too():
    double = RandLambdad("image", lambda image: image * 2, prob=1)
    image = MetaTensor(torch.rand(1, 4, 4))
    assert torch.equal(AugmentingCompose([double])({"image": image})["image"], image * 2)


def test_several_items_are_augmented_one_by_one():
    items = [{"image": MetaTensor(torch.rand(1, 4, 4))} for _ in range(2)]
    found = AugmentingCompose([RandFlipd("image", prob=1, spatial_axis=0)])(items)
    assert all(torch.equal(one["image"], item["image"].as_tensor().flip(1)) for one, item in zip(found, items))


def test_items_without_random_transforms_stay_as_they_are():
    item = {"image": MetaTensor(torch.rand(1, 4, 4))}
    assert isinstance(AugmentingCompose([ScaleIntensityd("image")])(item)["image"], MetaTensor)

"""Interrupted trainings end as uninterrupted ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .conftest import VOLUME_SETTINGS


def assert_equal(first: Path, second: Path) -> None:
    """Two files of weights, or two checkpoints, hold the same numbers."""
    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text: f"{first} and {second}: {text}")


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_has_the_randomness_of_its_number_alone(workers, bundle, volumes, tmp_path):
    """Patches, flips and augmentation included; neither resuming nor validation in between changes it."""
    settings = {**VOLUME_SETTINGS, "dataset_dir": volumes, "max_epochs": 3, "own_guess": 0.5, "augmentation": NOISE}
    settings["train#dataloader#num_workers"] = workers
    bundle("train", **settings, val_interval=1, ckpt_dir=tmp_path / "whole")
    halves = {**settings, "val_interval": 3, "ckpt_dir": tmp_path / "halves"}
    bundle("train", **halves, **{"train#trainer#max_epochs": 2})
    bundle("train", **halves, resume="true")
    one, other = (
        torch.load(tmp_path / name / "checkpoint_epoch=3.pt", weights_only=True) for name in ("whole", "halves")
    )
    for part in ("network", "ema", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


NOISE = [{"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.5}]

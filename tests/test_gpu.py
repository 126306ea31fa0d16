"""On a GPU, CUDA's or Apple's: what the CPU computes, and trainings in all precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import run

from medsegdiff_monai import MedSegDiff
from medsegdiff_monai.handlers.history import read_history
from medsegdiff_monai.settings import default_device

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, VOLUME_SETTINGS

DEVICE = default_device()
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
EXAMPLES = ROOT / "examples" / "lidc"
OVERLAY = CONFIGS / "datasets" / "lidc.json"


def bundle(device: torch.device | str, *overlays: Path, **variables: object) -> MedSegDiff:
    return MedSegDiff.from_bundle(ROOT / "bundle", *overlays, device=str(device), **variables)


def volume() -> np.ndarray:
    """A bright ellipsoid in noise, larger than a window of the hippocampus network."""
    grid = np.indices((48, 64, 40)) - np.array([24, 32, 20]).reshape(3, 1, 1, 1)
    inside = ((grid / np.array([10, 20, 8]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 1
    return (100 * inside + np.random.default_rng(0).normal(50, 10, inside.shape)).astype(np.float32)


@pytest.mark.parametrize("dims", [2, 3])
def test_members_are_those_of_the_cpu(dims):
    """Noise is drawn on the CPU, so a case has the same members wherever it is segmented; 3D goes by windows."""
    overlays = [OVERLAY] if dims == 2 else []
    image = sorted((EXAMPLES / "images").iterdir())[0] if dims == 2 else volume()
    own, reference = (bundle(device, *overlays, num_members=6).segment(image) for device in (DEVICE, "cpu"))
    assert 0 < reference.mask.sum() < reference.mask.size
    for name in ("probability", "uncertainty"):
        np.testing.assert_allclose(getattr(own, name), getattr(reference, name), atol=0.02)
    assert (own.members != reference.members).mean() < 1e-3
    assert own.expected_dice == pytest.approx(reference.expected_dice, abs=0.01)


def test_half_precision_segments_as_single_precision_does():
    image = sorted((EXAMPLES / "images").iterdir())[0]
    half, single = (bundle(DEVICE, OVERLAY, amp=amp).segment(image) for amp in ("bfloat16", False))
    np.testing.assert_allclose(half.probability, single.probability, atol=0.15)


def train(folder: Path, data: Path, **settings: object) -> list[dict]:
    """Train on the GPU by the bundle's config, and return the history."""
    variables = {k: v for k, v in TINY.items() if k != "num_members"} | {
        "dataset_dir": str(data), "output_dir": str(folder), "ckpt_dir": str(folder / "models"),
        "bundle_root": str(ROOT / "bundle"), "device": DEVICE.type, **settings,
    }  # fmt: skip
    run(config_file=str(CONFIGS / "train.json"), **variables)
    return read_history(folder)


@pytest.mark.parametrize("amp", [False, "bfloat16", "float16"])
@pytest.mark.parametrize("data", ["pictures", "volumes"])
def test_trainings_in_all_precisions_can_be_used_without_a_gpu(amp, data, tmp_path, request):
    if amp == "float16" and DEVICE.type != "cuda":
        pytest.skip("loss scaling is CUDA's")
    settings = PICTURE_SETTINGS if data == "pictures" else VOLUME_SETTINGS
    history = train(tmp_path, request.getfixturevalue(data), **settings, amp=amp, max_epochs=2)
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point() and value.ndim)


def test_a_training_learns_to_mark_what_is_bright(pictures, tmp_path):
    history = train(tmp_path, pictures, **PICTURE_SETTINGS, max_epochs=60, val_interval=20, learning_rate=0.005)
    assert max(row["val_mean_dice"] for row in history if row.get("val_mean_dice") is not None) > 0.8

"""Small data sets, tiny networks, and a way to run the bundle's real configs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this and of the commands started; tests run side by side

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import run
from PIL import Image

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "bundle" / "configs"
TINY = {"channels": [8, 8], "num_res_blocks": 1, "max_epochs": 1, "val_interval": 1, "batch_size": 2, "num_members": 2}

# a rotation about two axes, anisotropic voxels and an offset
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = np.array([[0.9, -0.3, 0.1], [0.3, 0.94, 0.0], [-0.1, 0.0, 0.99]]) @ np.diag([-1.0, 0.8, 2.5])
OBLIQUE[:3, 3] = (12.5, -40.0, 7.25)


def blob(shape: tuple[int, ...], rng: np.random.Generator, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball in noise (with a brighter core where there are two classes), and its label map."""
    grid = np.indices(shape)
    centre = [s / 2 + rng.uniform(-1, 1) for s in shape]
    radius = np.sqrt(sum(((g - c) / (s / 4)) ** 2 for g, c, s in zip(grid, centre, shape)))
    label = (radius < 1).astype(np.uint8)
    if classes == 2:
        label[radius < 0.6] = 2
    return (100 * label + rng.normal(0, 10, shape)).astype(np.float32), label


def write_json(folder: Path, **lists: list) -> Path:
    (folder / "dataset.json").write_text(json.dumps(lists))
    return folder


def make_nifti_dataset(
    folder: Path, shape: tuple[int, ...], cases: int = 5, classes: int = 2, affine: np.ndarray | None = None
) -> Path:
    rng = np.random.default_rng(0)
    items = []
    for i in range(cases):
        image, label = blob(shape, rng, classes)
        for kind, array in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(array, OBLIQUE if affine is None else affine), folder / f"{kind}_{i}.nii.gz")
        items.append({"image": f"./image_{i}.nii.gz", "label": f"./label_{i}.nii.gz"})
    return write_json(folder, training=items[:-1], test=items[-1:])


def make_png_dataset(folder: Path, shape: tuple[int, int] = (30, 22), cases: int = 5, classes: int = 1) -> Path:
    rng = np.random.default_rng(0)
    items = []
    for i in range(cases):
        image, label = blob(shape, rng, classes)
        rgb = np.stack([image, image / 2, 255 - image], axis=-1).clip(0, 255).astype(np.uint8)
        Image.fromarray(rgb).save(folder / f"image_{i}.png")
        Image.fromarray(label).save(folder / f"label_{i}.png")
        items.append({"image": f"image_{i}.png", "label": f"label_{i}.png", "patient": f"p{i // 2}"})
    return write_json(folder, training=items[:-1], test=items[-1:])


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3D, two classes, oblique and anisotropic, odd sizes."""
    return make_nifti_dataset(tmp_path_factory.mktemp("volumes"), (19, 22, 9))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2D, RGB, one class, not square."""
    return make_png_dataset(tmp_path_factory.mktemp("pictures"))


# preprocessing of the validation, where nothing is random, for training, whose masks have an axis for the raters
UNCHANGED = {
    "_target_": "Compose",
    "transforms": [
        "@validate#preprocessing", {"_target_": "Lambdad", "keys": "label", "func": "$lambda masks: masks[None]"}
    ],
}  # fmt: skip

VOLUME_SETTINGS = {"spacing": None, "roi_size": [8, 12, 8]}
PICTURE_SETTINGS = {
    "spatial_dims": 2, "in_channels": 3, "num_classes": 1, "spacing": None, "fit": "resize", "roi_size": [16, 16]
}  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    """Run a config with a tiny network: ``bundle("train", dataset_dir=..., ...)`` returns its ``output_dir``."""

    def call(config: str, output: Path | None = None, **variables: Any) -> Path:
        out = output or tmp_path / config
        # max_epochs and the like are no variables of every config; what a config does not use, it ignores
        settings = {**TINY, "bundle_root": str(ROOT / "bundle"), "ckpt_dir": str(tmp_path / "models"), **variables}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
        run(config_file=str(CONFIGS / f"{config}.json"), output_dir=str(out), device="cpu", **settings)
        return out

    return call


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches this process and those it starts, even where a shell in the background has it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)

"""Interrupted trainings end as uninterrupted ones do, to the last bit on one thread of a CPU."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from medsegdiff_monai.handlers.history import read_history

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, VOLUME_SETTINGS, make_png_dataset

NOISE = [{"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.5}]


def assert_equal(first: Path, second: Path) -> None:
    """Two files of weights, or two checkpoints, hold the same numbers."""
    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # unfilled parts of a record are NaN


@pytest.mark.parametrize("workers", [0, 1])
def test_each_epoch_has_the_randomness_of_its_number_alone(workers, bundle, volumes, tmp_path):
    """Patches, flips and augmentation included; neither resuming nor validation in between changes it."""
    settings = {**VOLUME_SETTINGS, "dataset_dir": volumes, "max_epochs": 3, "augmentation": NOISE}
    settings["train#dataloader#num_workers"] = workers
    bundle("train", **settings, val_interval=1, ckpt_dir=tmp_path / "whole")
    halves = {**settings, "val_interval": 3, "ckpt_dir": tmp_path / "halves"}
    bundle("train", **halves, **{"train#trainer#max_epochs": 2, "lr_scheduler#max_epochs": 3})
    bundle("train", **halves, resume="true")
    one, other = (
        torch.load(tmp_path / name / "checkpoint_epoch=3.pt", weights_only=True) for name in ("whole", "halves")
    )
    for part in ("network", "ema", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0, equal_nan=True)


def start(folder: Path, data: Path, epochs: int, *more: str, through: Sequence[str] = ()) -> subprocess.Popen:
    """Start a training as one would type it, with its results in a folder; or through code that gets the command."""
    variables = {k: v for k, v in {**TINY, **PICTURE_SETTINGS}.items() if k != "num_members" and v is not None}
    variables |= {
        "bundle_root": ROOT / "bundle", "dataset_dir": data, "output_dir": folder / "train",
        "ckpt_dir": folder / "models", "max_epochs": epochs, "val_interval": 2, "patience": 50, "spacing": "$None",
        "device": "cpu",
    }  # fmt: skip
    python = ["-c", *through] if through else ["-m"]
    command = [sys.executable, *python, "monai.bundle", "run", "training", "--config_file", str(CONFIGS / "train.json")]
    for name, value in variables.items():
        command += [f"--{name}", str(value)]
    folder.mkdir(exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen([*command, *more], cwd=ROOT, stdout=log, stderr=log)


def changes(folder: Path) -> set[tuple[str, int, int]]:
    """What stands in a folder: names, times and sizes."""
    found = set()
    for path in folder.rglob("*"):
        try:
            found.add((str(path), path.stat().st_mtime_ns, path.stat().st_size))
        except FileNotFoundError:  # replaced meanwhile
            pass
    return found


def kill_at_random(process: subprocess.Popen, folder: Path, rng: random.Random) -> None:
    """Kill after some files were written, mostly between two or in the middle of one, and at times a little later."""
    writes, delay = rng.randint(1, 20), rng.choice([0.0, 0.0, 0.2 * rng.random()])
    before = {entry for entry in changes(folder) if not entry[0].endswith("log.txt")}
    while process.poll() is None and writes:
        now = {entry for entry in changes(folder) if not entry[0].endswith("log.txt")}
        writes -= now != before
        before = now
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("kills, epochs", [(2, 6), pytest.param(10, 16, marks=pytest.mark.slow)])
def test_killed_training_ends_as_the_uninterrupted_one(kills, epochs, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    make_png_dataset(data, cases=10)
    whole = start(tmp_path / "whole", data, epochs)
    rng = random.Random(kills)
    killed = 0
    for _ in range(kills):
        process = start(tmp_path / "killed", data, epochs, "--resume", "true")
        kill_at_random(process, tmp_path / "killed", rng)
        killed += process.returncode == -signal.SIGKILL
    last = start(tmp_path / "killed", data, epochs, "--resume", "true")
    log = tmp_path / "killed" / "log.txt"
    assert last.wait() == 0 or f"max_epochs={epochs} are done" in log.read_text()
    assert whole.wait() == 0
    assert killed >= 2 and "Traceback" not in log.read_text()
    for name in ("model.pt", f"checkpoint_epoch={epochs}.pt", f"checkpoint_epoch={epochs - 1}.pt"):
        assert_equal(tmp_path / "whole" / "models" / name, tmp_path / "killed" / "models" / name)
    histories = [read_history(tmp_path / name / "train") for name in ("whole", "killed")]
    for one, other in zip(*histories, strict=True):
        assert all(one[key] == other[key] for key in one if not key.startswith("seconds"))
    assert not [path for path in (tmp_path / "killed" / "models").iterdir() if path.suffix == ".tmp"]

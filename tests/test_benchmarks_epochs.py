"""Where an epoch of training goes."""

from __future__ import annotations

import re
import sys
import time

import pytest
import torch
from ignite.engine import Engine

from benchmarks import epochs

from .conftest import make_nifti_dataset, make_png_dataset


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(sys, "argv", ["epochs", "--data_root", str(tmp_path), "--output", str(tmp_path / "page.md")])
    epochs.main()
    return (tmp_path / "page.md").read_text()


def test_page_has_the_data_that_are_there_and_the_share_that_training_waits(tmp_path, monkeypatch):
    small = {"channels": [8, 8], "num_res_blocks": 1}
    overlays = {
        "lgg_mri": ("LGG_MRI", {"roi_size": [16, 16], **small}),
        "lidc": ("LIDC4", {}),
        "hippocampus": ("Hippocampus3D", {"roi_size": [16, 16, 16], **small}),
    }
    monkeypatch.setattr(epochs, "OVERLAYS", overlays)
    for folder in ("LGG_MRI", "Hippocampus3D"):
        (tmp_path / folder).mkdir()
    make_png_dataset(tmp_path / "LGG_MRI")
    make_nifti_dataset(tmp_path / "Hippocampus3D", (19, 22, 9))
    page = run(monkeypatch, tmp_path)
    shares = re.findall(r"^\| `(\w+)` \| \w+ \| ([\d.]+)% \|$", page, re.MULTILINE)
    assert [name for name, _ in shares] == ["lgg_mri", "hippocampus"]
    assert all(0 < float(share) < 100 for _, share in shares)
    assert page.count("aten::convolution_backward") == 2


class Slow(Engine):
    """A training whose data and whose steps take so many seconds."""

    def __init__(self, data: float, step: float) -> None:
        super().__init__(lambda *_: time.sleep(step))
        self.pause = data

    def run(self) -> None:
        super().run((time.sleep(self.pause) for _ in range(5)), max_epochs=1, epoch_length=5)


@pytest.mark.parametrize(("data", "step", "low", "high"), [(0.0, 0.03, 0, 0.3), (0.03, 0.01, 0.5, 0.95)])
def test_slow_data_are_noticed(data, step, low, high):
    assert low <= epochs.waiting(Slow(data, step)) <= high

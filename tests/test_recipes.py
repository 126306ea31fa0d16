"""The recipes of the pages work as they are printed."""

from __future__ import annotations

import json
import re
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run

from medsegdiff_monai import DiffusionEnsembleInferer, DPMSolverPlusPlusScheduler
from medsegdiff_monai.fusion import MemberSummary

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def train(tmp_path, pictures, monkeypatch):
    """Train and segment under an overlay, with modules that lie in a folder on Python's path."""
    monkeypatch.syspath_prepend(tmp_path)
    common = {"bundle_root": str(ROOT / "bundle"), "ckpt_dir": str(tmp_path / "models"), "device": "cpu"}
    common |= {"dataset_dir": str(pictures), **PICTURE_SETTINGS, **{k: v for k, v in TINY.items() if k != "channels"}}

    def call(overlay: str) -> np.ndarray:
        (tmp_path / "overlay.json").write_text(overlay)
        for what, name in (("training", "train"), ("inference", "inference")):
            files = [str(CONFIGS / f"{name}.json"), str(tmp_path / "overlay.json")]
            run(what, config_file=files, output_dir=str(tmp_path / name), **common)
        return np.asarray(nib.load(tmp_path / "inference" / "image_4" / "image_4_prob.nii.gz").dataobj)

    return call


def test_own_network(tmp_path, train, monkeypatch):
    module, alone = blocks("own_network", "python")
    (tmp_path / "my_network.py").write_text(module)
    (overlay,) = blocks("own_network", "json")
    probability = train(overlay.replace("[32, 64, 128]", "[32, 32, 32]"))
    assert probability.max() <= 1 and probability.std() > 0

    import my_network

    network = my_network.Concatenated(2, 1, 2, channels=[32], num_res_blocks=1, attention_levels=[False])
    names = {
        "DiffusionEnsembleInferer": DiffusionEnsembleInferer,
        "DPMSolverPlusPlusScheduler": DPMSolverPlusPlusScheduler,
        "image": torch.rand(1, 1, 64, 64),
        "network": network,
    }
    exec(alone, names)
    assert names["members"].shape == (1, 10, 64, 64)
    sys.modules.pop("my_network")


def test_own_loss_of_single_masks(train):
    overlay, _ = blocks("own_loss", "json")
    assert train(overlay).std() > 0


def test_own_loss_of_sets(tmp_path, train):
    (code,) = blocks("own_loss", "python")
    penalty = "def my_penalty(logits):\n    return logits.sigmoid().mean()\n"
    (tmp_path / "my_loss.py").write_text(f"{code}\n\n{penalty}")
    _, overlay = blocks("own_loss", "json")
    assert train(overlay).std() > 0
    sys.modules.pop("my_loss")


def test_masks_in_memory():
    code = blocks("other_tools", "python")[0]
    exec(code, {"MemberSummary": MemberSummary, "members": [torch.rand(2, 8, 8) for _ in range(3)]})


@pytest.mark.parametrize("page", sorted(page.stem for page in (ROOT / "docs").glob("*.md")))
def test_json_of_pages_is_json(page):
    for text in blocks(page, "json"):
        json.loads(text)

"""The bundle from Python: an array in, mask and maps out."""

from __future__ import annotations

import json
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow, load
from monai.data import MetaTensor
from monai.transforms import Compose

from .conftest import CONFIGS, OBLIQUE, ROOT, VOLUME_SETTINGS, blob

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
FIVE_LINES = """\
bundle = ConfigWorkflow("bundle/configs/inference.json", workflow_type="infer")
bundle.initialize()
network = load("bundle", bundle_dir=".", device=str(bundle.device)).eval()
item = Compose(bundle.preprocessing.transforms[2:])({"image": MetaTensor(array[None], affine=affine)})
result = bundle.postprocessing({**item, "pred": bundle.inferer(item["image"][None].to(bundle.device), network)[0]})
"""


def test_result_is_on_the_grid_of_the_array(tmp_path):
    """Whatever its affine and size; with random weights, since only geometry matters here."""
    array = blob((13, 20, 9), np.random.default_rng(0))[0]
    settings = {**VOLUME_SETTINGS, "channels": [8, 8], "num_members": 2, "device": "cpu", "spacing": [1.0, 1.5, 1.0]}
    bundle = ConfigWorkflow(
        str(CONFIGS / "inference.json"), workflow_type="infer", bundle_root=str(ROOT / "bundle"), **settings
    )
    bundle.initialize()
    item = Compose(bundle.preprocessing.transforms[2:])({"image": MetaTensor(array[None], affine=OBLIQUE)})
    assert item["image"].shape[1:] != array.shape
    result = bundle.postprocessing({**item, "pred": bundle.inferer(item["image"][None], bundle.network_def.eval())[0]})
    for name in ("pred", "prob", "uncertainty_entropy", "uncertainty_mi"):
        assert result[name].shape[1:] == array.shape
        np.testing.assert_allclose(result[name].affine, OBLIQUE, atol=1e-5)


def test_five_lines_segment_an_array(monkeypatch):
    """As README has them."""
    monkeypatch.chdir(ROOT)
    names = {
        "array": blob((13, 20, 9), np.random.default_rng(0))[0],
        "affine": OBLIQUE,
        "ConfigWorkflow": ConfigWorkflow,
    }
    names |= {"load": load, "Compose": Compose, "MetaTensor": MetaTensor}
    exec(FIVE_LINES, names)
    mask, uncertainty = names["result"]["pred"], names["result"]["uncertainty_entropy"]
    assert mask.shape == uncertainty.shape == (1, 13, 20, 9)
    assert set(mask.unique().tolist()) <= {0, 1, 2} and 0 <= uncertainty.min() <= uncertainty.max() <= 2
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "ConfigWorkflow(" not in readme or FIVE_LINES in readme


@pytest.fixture
def executed(monkeypatch) -> dict[str, Any]:
    """The notebook's names after its cells ran in order, in its folder, as a kernel does."""
    pytest.importorskip("nilearn")
    monkeypatch.chdir(NOTEBOOK.parent)
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    return names


def test_quickstart_segments_the_hippocampus_right_after_a_clone(executed):
    """About as large as a hippocampus is, where the template's is; the anterior part in front of the posterior."""
    mask, affine = executed["mask"], executed["affine"]
    voxels = [np.argwhere(mask == value) for value in (1, 2)]
    assert all(800 < len(part) < 3000 for part in voxels)
    centre = nib.affines.apply_affine(affine, np.argwhere(mask > 0).mean(0))
    np.testing.assert_allclose(centre, (-27, -22, -15), atol=4)
    front, back = (nib.affines.apply_affine(affine, part.mean(0))[1] for part in voxels)
    assert front > back + 8
    assert executed["each"].shape[0] == len(executed["volumes"]) > 1
    shown = [
        axes.get_title() for figure in executed["plt"].get_fignums() for axes in executed["plt"].figure(figure).axes
    ]
    assert shown[:4] == ["image", "mask", "entropy", "mutual information"] and "member 2" in shown
    executed["plt"].close("all")


def test_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)

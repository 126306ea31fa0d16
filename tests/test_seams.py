"""Windows of a network that was trained, against the whole field at once."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from medsegdiff_monai.inferers import DiffusionEnsembleInferer
from medsegdiff_monai.networks import MedSegDiffUNet
from medsegdiff_monai.objective import DiffusionTrainingInferer, SegmentationDiffusionPrepareBatch, ensemble_score
from medsegdiff_monai.schedulers import DPMSolverPlusPlusScheduler

SCHEDULER = DPMSolverPlusPlusScheduler(schedule="cosine")


def discs(number: int, size: int, per_image: int) -> dict[str, torch.Tensor]:
    """Discs under so much noise that their outlines cannot be told for sure."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(size))] * 2, indexing="ij"))
    centres, radii = torch.rand(number, per_image, 2, 1, 1) * size, 2 + 4 * torch.rand(number, per_image, 1, 1)
    mask = (((grid - centres) ** 2).sum(2) < radii**2).any(1, keepdim=True).float()
    return {"image": mask + 2.5 * torch.randn_like(mask), "label": mask[:, None]}


@pytest.fixture(scope="module")
def trained() -> MedSegDiffUNet:
    torch.manual_seed(0)
    net = MedSegDiffUNet(2, 1, 1, channels=[8, 16, 16], num_res_blocks=1, ff_size=32)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    infer = DiffusionTrainingInferer(SCHEDULER)
    prepare = SegmentationDiffusionPrepareBatch(SCHEDULER)
    for _ in range(200):
        inputs, targets, _, kwargs = prepare(discs(8, 32, 3), "cpu")
        optimizer.zero_grad()
        ensemble_score(infer(inputs, net, **kwargs), targets).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_windows_differ_from_the_whole_field_less_than_members_do(trained, overlap, monkeypatch):
    image = discs(4, 64, 7)["image"]
    settings = {"num_classes": 1, "num_members": 4}
    by_windows = DiffusionEnsembleInferer(SCHEDULER, roi_size=(32, 32), overlap=overlap, **settings)
    at_once = DiffusionEnsembleInferer(SCHEDULER, roi_size=(64, 64), **settings)
    monkeypatch.setattr(at_once, "noise", lambda members: by_windows.noise(members).repeat(1, 1, 2, 2))  # the same
    whole, windows = at_once(image, trained), by_windows(image, trained)
    among = torch.stack([(whole[:, a] - whole[:, b]).abs().mean() for a, b in combinations(range(4), 2)]).mean()
    seams = (whole - windows).abs().mean()
    assert seams < among
    # another noise field, as if each window drew its own, differs more
    other = DiffusionEnsembleInferer(SCHEDULER, roi_size=(32, 32), overlap=overlap, seed=1, **settings)(image, trained)
    assert seams < 0.75 * (whole - other).abs().mean()

"""Members of a large image: one opinion each, whatever the windows."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.inferers import SlidingWindowInferer

from medsegdiff_monai import transforms, windows
from medsegdiff_monai.handlers import CaseProgress
from medsegdiff_monai.inferers import DiffusionEnsembleInferer
from medsegdiff_monai.schedulers import DDIMScheduler
from medsegdiff_monai.windows import best_match


def inferer(**kwargs):
    return DiffusionEnsembleInferer(DDIMScheduler(schedule="cosine"), roi_size=(8, 8), **kwargs)


def test_the_best_match_undoes_a_shuffle():
    torch.manual_seed(0)
    members = torch.rand(6, 2, 9, 9)
    order = torch.randperm(6)
    found = best_match(members[order], members + 0.1 * torch.rand_like(members))
    assert torch.equal(order[found], torch.arange(6))


@pytest.mark.parametrize("size", [(14, 21), (8, 11)])
def test_the_mean_of_the_members_is_that_of_plain_sliding_windows(size):
    """MONAI's inferer, with the noise of all members as further channels, knows nothing of a match."""
    drawn = inferer(num_classes=2, num_members=4)
    image = torch.rand(2, 1, *size)
    noise = drawn.noise().repeat(1, 1, 2, 3)[..., : size[0], : size[1]]

    def network(x, timesteps, context):
        return (x + 2 * context.mean((2, 3), keepdim=True) - 1).tanh()

    def window(crop):
        x = crop[:, 1:].unflatten(1, (4, 2)).flatten(0, 1)
        return (network(x, None, crop[:, :1].repeat_interleave(4, 0)).unflatten(0, (-1, 4)).mean(1) + 1) / 2

    riding = torch.cat([image, noise.flatten(0, 1).expand(2, -1, *size)], 1)
    plain = SlidingWindowInferer((8, 8), overlap=0.5, mode="gaussian")(riding, window)
    mean = drawn(image, network).unflatten(1, (4, 2)).mean(1)
    torch.testing.assert_close(mean, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_a_member_is_one_opinion_in_all_windows(overlap):
    """A network that marks all or nothing, as the noise in the corner of its window happens to be: two opinions."""

    def opinionated(x, timesteps, context):
        return x[..., :1, :1].sign().expand_as(x)

    drawn = inferer(num_classes=1, num_members=2, overlap=overlap)
    members = drawn(torch.rand(3, 1, 40, 40), opinionated)
    assert ((members - members[..., :1, :1]).abs() < 1e-5).all()
    assert torch.equal(members[:, :, 0, 0].sort().values, torch.tensor([[0.0, 1.0]] * 3))


def test_members_of_a_large_image_take_half_the_memory(monkeypatch):
    """They come in half precision, and fusing them gives their memory back; of a batch, each case keeps its own."""
    image = torch.rand(2, 1, 14, 21)
    drawn = inferer(num_classes=2, num_members=4)
    exact = drawn(image, lambda x, *_: x)
    monkeypatch.setattr(windows, "LARGE", exact.numel() - 1)
    monkeypatch.setattr(transforms, "LARGE", exact[0].numel() - 1)
    half = drawn(image, lambda x, *_: x)
    assert exact.dtype == torch.float32 and half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, atol=2**-11, rtol=0)
    fuse = transforms.FuseMembersd("pred", num_classes=2)
    alone = half[0].clone()
    fused, again = fuse({"pred": half[0]}), fuse({"pred": alone})
    assert alone.untyped_storage().nbytes() == 0 and torch.equal(fused["mean"], again["mean"])
    torch.testing.assert_close(
        fuse({"pred": half[1]})["mean"], exact[1].unflatten(0, (4, 2)).mean(0), atol=1e-3, rtol=0
    )


def test_members_of_a_large_image_are_inverted_class_by_class(monkeypatch):
    members, seen = torch.rand(6, 9, 8), []

    def invert(data):
        seen.append(tuple(data["pred"].shape))
        return {**data, "pred": data["pred"].float().flip(-1)}

    fuse = transforms.FuseMembersd("pred", num_classes=2, invert=invert)
    whole = fuse({"pred": members.clone()})
    assert seen == [(2, 9, 8)] * 3
    monkeypatch.setattr(transforms, "LARGE", members.numel() - 1)
    half = fuse({"pred": members.half()})
    assert seen[3:] == [(1, 9, 8)] * 6
    torch.testing.assert_close(half["mean"], whole["mean"], atol=1e-3, rtol=0)


def test_classes_are_matched_together():
    """A label map of several classes is one opinion: a member keeps its classes."""

    def opinionated(x, timesteps, context):
        side = x[:, :1, :1, :1].sign()
        return torch.cat([side, -side], 1).expand_as(x)

    members = inferer(num_classes=2, num_members=2)(torch.rand(1, 1, 20, 20), opinionated).unflatten(1, (2, 2))
    assert torch.allclose(members[:, :, 0] + members[:, :, 1], torch.ones(()))


def test_a_volume_that_takes_long_has_a_bar_over_its_windows(capsys, monkeypatch):
    """In inference, whose handler asks for it, and nowhere else."""
    monkeypatch.setattr(windows, "PATIENCE", 0)
    drawn = inferer(num_classes=1, num_members=2)
    image = torch.rand(1, 1, 12, 8)
    drawn(image, lambda x, *_: x)
    assert capsys.readouterr().err == ""
    engine = Engine(lambda engine, batch: drawn(image, lambda x, *_: x))
    engine.inferer = drawn
    cases = type("Cases", (list,), {"faults": []})([0])
    CaseProgress(cases).attach(engine)
    engine.run([0])
    shown = capsys.readouterr().err
    assert "Windows" in shown and "0/2" in shown and "Segment" in shown

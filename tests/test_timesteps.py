"""Timesteps of training: how often each is met, and that the expected loss does not depend on it."""

from __future__ import annotations

import math

import pytest
import torch

from medsegdiff_monai.engines import SegmentationDiffusionPrepareBatch
from medsegdiff_monai.losses import DiffusionSegmentationLoss
from medsegdiff_monai.schedulers import DDIMScheduler
from medsegdiff_monai.timesteps import TimestepSampler


def loss_at(timesteps: torch.Tensor) -> torch.Tensor:
    """A loss that is large where t is."""
    return 0.1 + (timesteps / 100.0) ** 4


def trained(mode: str, batches: int = 2000, **more: float) -> tuple[TimestepSampler, torch.Tensor]:
    """A sampler of T = 100 that has learnt, and the losses of further batches of 4 that it weighed."""
    torch.manual_seed(0)
    sampler = TimestepSampler(100, mode, **more)
    for _ in range(300):
        sampler.weigh(loss_at(sampler.draw(16)))
    return sampler, torch.stack([sampler.weigh(loss_at(sampler.draw(4))) for _ in range(batches)])


def test_uniform_timesteps_are_all_met_alike():
    torch.manual_seed(0)
    counts = torch.bincount(TimestepSampler(50).draw(100_000), minlength=50)
    assert len(counts) == 50 and (counts - 2000).abs().max() < 5 * math.sqrt(2000)


@pytest.mark.parametrize("mode", ["uniform", "importance"])
def test_the_last_timestep_has_its_share(mode):
    sampler, _ = trained(mode, last_share=0.4)
    share = (sampler.draw(20_000) == 99).double().mean()
    assert share >= 0.4 and share < 0.4 + 0.6 * 0.2
    assert (TimestepSampler(10, last_share=1.0).draw(100) == 9).all()


def test_importance_keeps_the_expected_loss_and_lowers_its_variance():
    expected = float(loss_at(torch.arange(100)).mean())
    (_, uniform), (sampler, important) = trained("uniform"), trained("importance")
    for losses in (uniform, important):
        assert float(losses.mean()) == pytest.approx(expected, abs=5 * float(losses.std()) / math.sqrt(len(losses)))
    assert important.std() < 0.5 * uniform.std()
    probabilities = sampler.probabilities()
    # in proportion to the root mean square of the loss in each bin of five timesteps
    rms = loss_at(torch.arange(100, dtype=torch.float64)).square().reshape(20, 5).mean(1).sqrt()
    assert torch.allclose(probabilities, rms / rms.sum(), atol=0.02)


def test_importance_is_uniform_until_every_bin_has_a_loss():
    sampler = TimestepSampler(100, "importance")
    sampler.weigh(loss_at(sampler.draw(2)))
    assert torch.allclose(sampler.probabilities(), torch.full((20,), 0.05, dtype=torch.float64))


def test_what_was_learnt_survives_a_checkpoint():
    sampler, _ = trained("importance", batches=1)
    other = TimestepSampler(100, "importance")
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities(), sampler.probabilities())


def test_prepared_batches_and_the_loss_use_it():
    sampler = TimestepSampler(1000, "importance", last_share=1.0)
    prepare = SegmentationDiffusionPrepareBatch(DDIMScheduler(), sampler)
    batch = {"image": torch.rand(3, 1, 4, 4), "label": torch.ones(3, 1, 4, 4)}
    assert prepare(batch)[3]["timesteps"].tolist() == [999, 999, 999]

    class Ten(TimestepSampler):
        def weigh(self, losses):
            assert losses.shape == (3,)
            return 10 * losses.mean()

    logits = torch.randn(3, 1, 4, 4)
    for kind in ("sample", "epsilon"):
        plain, weighed = (DiffusionSegmentationLoss(kind, t)(logits, batch["label"]) for t in (None, Ten()))
        torch.testing.assert_close(weighed, 10 * plain)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="must be one of uniform, importance"):
        TimestepSampler(mode="gaussian")
    with pytest.raises(ValueError, match=r"last_timestep_share=1\.5 must be from 0 to 1"):
        TimestepSampler(last_share=1.5)

"""DDPM and DDIM against MONAI's, each other, and the learned range of variances."""

from __future__ import annotations

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler as MonaiDDIMScheduler
from monai.networks.schedulers import DDPMScheduler as MonaiDDPMScheduler

from medsegdiff_monai.schedulers import DDIMScheduler, DDPMScheduler

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), dim=0)


def sample(scheduler, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Sample with a non-linear denoiser; noise depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps.tolist():
        a, s = ALPHA_BAR[t].sqrt().item(), (1 - ALPHA_BAR[t]).sqrt().item()
        x0 = 0.8 * (x + 0.1 * torch.sin(3 * x)).tanh()
        epsilon = (x - a * x0) / s
        output = {"sample": x0, "epsilon": epsilon, "v_prediction": a * epsilon - s * x0}[scheduler.prediction_type]
        x, _ = scheduler.step(output, t, x, generator=generator)
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_ddpm_at_full_length_equals_monai(prediction_type, variance_type, clip_sample):
    kwargs = {"prediction_type": prediction_type, "variance_type": variance_type, "clip_sample": clip_sample}
    ours, theirs = DDPMScheduler(**kwargs), MonaiDDPMScheduler(**kwargs)
    theirs.set_timesteps(1000)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_at_full_length_equals_monai_in_double_precision(variance_type):
    """What little differs above is the float32 cumulative product of MONAI's tables."""
    ours, theirs = (
        cls(variance_type=variance_type, clip_sample=False, prediction_type="v_prediction")
        for cls in (DDPMScheduler, MonaiDDPMScheduler)
    )
    theirs.set_timesteps(1000)
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = ours.betas, ours.alphas, ours.alphas_cumprod
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddim_equals_monai_on_the_grid_where_that_is_right(prediction_type, steps):
    """MONAI's stride of T // N fits the spacing "leading"; its own timesteps are linspace."""
    kwargs = {"prediction_type": prediction_type, "clip_sample": False}
    ours, theirs = DDIMScheduler(timestep_spacing="leading", **kwargs), MonaiDDIMScheduler(**kwargs)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    theirs.timesteps = ours.timesteps
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_with_full_eta_is_ddpm_with_the_small_variance(steps):
    ddim, ddpm = DDIMScheduler(eta=1.0), DDPMScheduler(variance_type="fixed_small")
    ddim.set_timesteps(steps)
    ddpm.set_timesteps(steps)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(sample(ddim, x), sample(ddpm, x))


@pytest.mark.parametrize(("v", "variance_type"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_spans_the_two_fixed_variances(v, variance_type):
    learned, fixed = DDPMScheduler(variance_type="learned_range"), DDPMScheduler(variance_type=variance_type)
    x, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    for scheduler in (learned, fixed):
        scheduler.set_timesteps(5)
    for t in fixed.timesteps:
        output = torch.cat([x.tanh(), torch.full_like(x, v)], dim=1)
        mine, x0 = learned.step(output, t, x, noise=noise)
        x, fixed_x0 = fixed.step(x.tanh(), t, x, noise=noise)
        torch.testing.assert_close(mine, x)
        assert torch.equal(x0, fixed_x0)


def test_learned_range_interpolates_in_log_space_per_voxel():
    """arXiv 2102.09672, equation 15, on the step from 999 to 500."""
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type="sample")
    scheduler.set_timesteps(3)
    x, v = torch.zeros(1, 1, 3, dtype=torch.float64), torch.tensor([[[-0.6, 0.0, 0.8]]], dtype=torch.float64)
    result, _ = scheduler.step(torch.cat([x, v], dim=1), 999, x, noise=torch.ones_like(x))
    bar, bar_prev = scheduler.alphas_cumprod[[999, 500]]
    beta = 1 - bar / bar_prev
    beta_tilde = beta * (1 - bar_prev) / (1 - bar)
    f = (v + 1) / 2
    torch.testing.assert_close(result.square().log(), f * beta.log() + (1 - f) * beta_tilde.log())

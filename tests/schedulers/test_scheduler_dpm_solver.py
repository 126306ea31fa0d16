"""DPM-Solver++(2M) against its update formula, and its memory of the last prediction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medsegdiff_monai.schedulers import DDIMScheduler, DPMSolverPlusPlusScheduler

WEIGHTS = np.random.default_rng(0).normal(size=(6, 6))


def model(x: np.ndarray, t: int) -> np.ndarray:
    """A non-linear prediction of x0 for samples of shape (B, 6)."""
    return np.tanh(x @ WEIGHTS + math.cos(t / 100))


def reference(x: np.ndarray, timesteps: list[int]) -> np.ndarray:
    """arXiv 2211.01095, Algorithm 2, with the final step of first order to sigma = 0."""
    bars = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[timesteps]
    alpha, sigma = np.sqrt(bars), np.sqrt(1 - bars)
    lam = np.log(alpha / sigma)
    buffer = [model(x, timesteps[0])]
    for i in range(1, len(timesteps)):
        h = lam[i] - lam[i - 1]
        if i == 1:
            d = buffer[0]
        else:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * d
        buffer.append(model(x, timesteps[i]))
    return buffer[-1]


def sample(scheduler, x: torch.Tensor, steps: int | None = None) -> torch.Tensor:
    for t in scheduler.timesteps[:steps]:
        output = torch.from_numpy(model(x.double().numpy(), int(t))).to(x.dtype)
        x, _ = scheduler.step(output, t, x)
    return x


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading", "quadratic"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 1000])
def test_equals_the_formula(spacing, steps):
    scheduler = DPMSolverPlusPlusScheduler(prediction_type="sample", timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 6)))
    expected = reference(x.numpy(), scheduler.timesteps.tolist())
    # MONAI gives the betas in float32, which is all that differs.
    np.testing.assert_allclose(sample(scheduler, x).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_first_step_is_ddim():
    x, output = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    results = []
    for cls in (DPMSolverPlusPlusScheduler, DDIMScheduler):
        scheduler = cls(timestep_spacing="trailing")
        scheduler.set_timesteps(5)
        results.append(scheduler.step(output, 999, x)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("restart", ["first timestep", "set_timesteps"])
def test_starts_afresh_after_an_interrupted_run(restart):
    scheduler = DPMSolverPlusPlusScheduler()
    scheduler.set_timesteps(6)
    x = torch.randn(4, 6)
    expected = sample(scheduler, x)
    sample(scheduler, torch.randn(3, 6), steps=4)
    if restart == "set_timesteps":
        scheduler.set_timesteps(6)
        assert scheduler._last is None
    assert torch.equal(sample(scheduler, x), expected)


def test_keeps_no_tensor_after_sampling():
    scheduler = DPMSolverPlusPlusScheduler()
    scheduler.set_timesteps(6)
    sample(scheduler, torch.randn(4, 6))
    assert scheduler._last is None


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading", "quadratic"])
@pytest.mark.parametrize("schedule", ["linear_beta", "cosine"])
@pytest.mark.parametrize("steps", range(5, 21, 5))
def test_few_steps_stay_near_a_confident_prediction(schedule, spacing, steps):
    """A mask in +-1 that the network knows at every step comes out as it is."""
    scheduler = DPMSolverPlusPlusScheduler(schedule=schedule, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    mask = torch.rand(2, 1, 8, 8).round() * 2 - 1
    x = torch.randn(2, 1, 8, 8)
    for t in scheduler.timesteps:
        x, _ = scheduler.step(mask, t, x)
        assert x.abs().max() < 6
    assert torch.equal(x, mask)

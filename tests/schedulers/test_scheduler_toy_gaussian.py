"""Samplers on data N(0, 0.5^2), where the best denoiser and the spread of the samples are known in closed form."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from medsegdiff_monai.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverPlusPlusScheduler

DATA_STD = 0.5
POINTS = 200_000
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))

SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "ddim eta 0.5": (DDIMScheduler, {"eta": 0.5}),
    "ddpm small": (DDPMScheduler, {"variance_type": "fixed_small"}),
    "ddpm large": (DDPMScheduler, {"variance_type": "fixed_large"}),
    "ddpm learned": (DDPMScheduler, {"variance_type": "learned_range"}),  # the network here returns v = 0
    "solver": (DPMSolverPlusPlusScheduler, {}),
    "solver linspace": (DPMSolverPlusPlusScheduler, {"timestep_spacing": "linspace"}),
}

# Standard deviation of the samples as this project publishes it: sampler, tolerance, {steps: std}.
PUBLISHED = [
    ("ddim", 0.002, {5: 0.225, 10: 0.362, 50: 0.472, 250: 0.494, 1000: 0.498}),
    ("ddpm small", 0.005, {10: 0.323, 50: 0.443, 250: 0.486, 1000: 0.496}),
    ("ddpm large", 0.005, {10: 0.599, 50: 0.518, 250: 0.503, 1000: 0.501}),
    ("solver", 0.002, {10: 0.405, 50: 0.501, 250: 0.500}),
    ("solver linspace", 0.002, {10: 0.693}),
]


def denoise(alpha_bar: float) -> float:
    """E[x0 | x_t] = this times x_t."""
    return math.sqrt(alpha_bar) * DATA_STD**2 / (alpha_bar * DATA_STD**2 + 1 - alpha_bar)


def output(prediction_type: str, x: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    x0 = denoise(alpha_bar) * x
    epsilon = (x - a * x0) / s
    return {"sample": x0, "epsilon": epsilon, "v_prediction": a * epsilon - s * x0}[prediction_type]


@functools.cache
def sampled_std(sampler: str, steps: int, prediction_type: str) -> float:
    cls, kwargs = SAMPLERS[sampler]
    scheduler = cls(prediction_type=prediction_type, **kwargs)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS if scheduler.is_stochastic else 1000, 1, generator=generator)
    x = (x - x.mean()) / x.std(correction=0)
    for t in scheduler.timesteps:
        prediction = output(prediction_type, x, ALPHA_BAR[t])
        if sampler == "ddpm learned":
            prediction = torch.cat([prediction, torch.zeros_like(x)], dim=1)
        x, _ = scheduler.step(prediction, t, x, generator=generator)
    return x.std(correction=0).item()


def alpha_bars(spacing: str, steps: int) -> list[float]:
    timesteps = {
        "linspace": np.round(np.linspace(999, 0, steps)),
        "trailing": np.round(1000 - np.arange(steps) * 1000 / steps) - 1,
    }[spacing]
    return [*ALPHA_BAR[timesteps.astype(int)].tolist(), 1.0]


def ddim_std(steps: int, spacing: str = "linspace") -> float:
    """Euler steps of the ODE in x / a over s / a (arXiv 2010.02502, equations 13 and 14)."""
    bars = alpha_bars(spacing, steps)
    x = 1.0
    for bar, bar_p in itertools.pairwise(bars):
        a, s, a_p, s_p = math.sqrt(bar), math.sqrt(1 - bar), math.sqrt(bar_p), math.sqrt(1 - bar_p)
        epsilon = (1 - a * denoise(bar)) / s
        x *= a_p * (1 / a + (s_p / a_p - s / a) * epsilon)
    return x


def ddim_eta_std(steps: int, eta: float = 0.5) -> float:
    bars = alpha_bars("linspace", steps)
    variance = 1.0
    for bar, bar_p in itertools.pairwise(bars):
        added = eta**2 * (1 - bar_p) / (1 - bar) * (1 - bar / bar_p)
        x0 = denoise(bar)
        epsilon = (1 - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        variance = variance * (math.sqrt(bar_p) * x0 + math.sqrt(1 - bar_p - added) * epsilon) ** 2 + added
    return math.sqrt(variance)


def ddpm_std(steps: int, power: float) -> float:
    """The posterior from Bayes' rule by precisions; noise of variance beta^power beta_tilde^(1 - power)."""
    bars = alpha_bars("linspace", steps)
    variance = 1.0
    for bar, bar_p in itertools.pairwise(bars):
        if bar_p == 1:
            return math.sqrt(variance) * denoise(bar)
        decay = bar / bar_p  # x_t = sqrt(decay) x_p + sqrt(1 - decay) z
        precision = 1 / (1 - bar_p) + decay / (1 - decay)
        mean = (math.sqrt(bar_p) * denoise(bar) / (1 - bar_p) + math.sqrt(decay) / (1 - decay)) / precision
        variance = variance * mean**2 + (1 - decay) ** power * precision ** (power - 1)
    raise AssertionError


def solver_std(steps: int, spacing: str = "trailing") -> float:
    """DPM-Solver++(2M) through the difference of the last two x0, first order at both ends."""
    bars = alpha_bars(spacing, steps)
    x, history = 1.0, []
    for i in range(steps):
        bar, bar_p = bars[i], bars[i + 1]
        history.append(denoise(bar) * x)
        if i == steps - 1:
            return history[-1]
        lam = [0.5 * math.log(b / (1 - b)) for b in bars[max(i - 1, 0) : i + 2]]
        h = lam[-1] - lam[-2]
        slope = h * (history[-1] - history[-2]) / (lam[-2] - lam[-3]) if i else 0.0
        x = math.sqrt((1 - bar_p) / (1 - bar)) * x + math.sqrt(bar_p) * (1 - math.exp(-h)) * (history[-1] + slope / 2)
    raise AssertionError


CLOSED_FORM = {
    "ddim": ddim_std,
    "ddim eta 0.5": ddim_eta_std,
    "ddpm small": lambda steps: ddpm_std(steps, 0.0),
    "ddpm large": lambda steps: ddpm_std(steps, 1.0),
    "ddpm learned": lambda steps: ddpm_std(steps, 0.5),
    "solver": solver_std,
    "solver linspace": lambda steps: solver_std(steps, "linspace"),
}


@pytest.mark.parametrize(
    ("sampler", "steps", "expected", "tolerance"),
    [(sampler, steps, std, tolerance) for sampler, tolerance, stds in PUBLISHED for steps, std in stds.items()],
)
def test_std_is_the_published_one(sampler, steps, expected, tolerance):
    assert sampled_std(sampler, steps, "sample") == pytest.approx(expected, abs=tolerance)
    assert CLOSED_FORM[sampler](steps) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 100, 250])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_std_agrees_with_closed_form(sampler, steps, prediction_type):
    expected = CLOSED_FORM[sampler](steps)
    assert sampled_std(sampler, steps, prediction_type) == pytest.approx(expected, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_std_agrees_with_closed_form_at_full_length(sampler, prediction_type):
    assert sampled_std(sampler, 1000, prediction_type) == pytest.approx(CLOSED_FORM[sampler](1000), abs=0.005)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_full_length_recovers_the_data(sampler):
    assert CLOSED_FORM[sampler](1000) == pytest.approx(DATA_STD, abs=0.005)

"""DDIM sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import DiffusionScheduler, at_least_float32

__all__ = ["DDIMScheduler"]


class DDIMScheduler(DiffusionScheduler):
    """Denoising diffusion implicit models (Song et al., arXiv 2010.02502): the deterministic sampler, or a mixture.

    One step from t to the next lower timestep p (equations 12 and 16; the paper's alpha is our alpha_bar)::

        sigma = eta sqrt((1 - alpha_bar_p) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_p)
        x_p   = sqrt(alpha_bar_p) x0 + sqrt(1 - alpha_bar_p - sigma^2) epsilon + sigma z,    z ~ N(0, 1)

    Args:
        num_train_timesteps: number T of diffusion steps the network is trained on.
        schedule: name of a noise schedule in ``monai.networks.schedulers.NoiseSchedules``.
        eta: share of DDPM's noise, 0 (none: the same start gives the same sample) to 1 (DDPM with ``fixed_small``).
        kwargs: further arguments of :class:`DiffusionScheduler`, such as ``prediction_type``.
    """

    def __init__(
        self, num_train_timesteps: int = 1000, schedule: str = "linear_beta", eta: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(num_train_timesteps, schedule, **kwargs)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must be between 0 (deterministic) and 1 (as much noise as DDPM).")
        self.eta = eta

    @property
    def is_stochastic(self) -> bool:
        """Whether :meth:`step` draws noise: with ``eta > 0``."""
        return self.eta > 0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Go from one timestep to the next lower one; see :meth:`.DiffusionScheduler.step`."""
        _, t, t_prev = self._neighbours(timestep)
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        x_t = at_least_float32(sample)
        x0, epsilon = self.predict(model_output, t, x_t)

        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        sigma = self.eta * variance**0.5  # equation 16; 0 at the last step, where alpha_bar_prev = 1
        remainder = max(1 - alpha_bar_prev - sigma**2, 0.0)  # with no signal at t and eta = 1, 0 up to rounding
        x_prev = alpha_bar_prev**0.5 * x0 + remainder**0.5 * epsilon  # equation 12
        if sigma > 0:
            x_prev = x_prev + sigma * self._noise(x_t, generator, noise)
        return x_prev.to(sample.dtype), x0.to(sample.dtype)

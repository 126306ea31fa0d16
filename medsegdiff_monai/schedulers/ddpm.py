"""Ancestral sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import DiffusionScheduler, at_least_float32, require_member

__all__ = ["DDPMScheduler"]

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


class DDPMScheduler(DiffusionScheduler):
    """Denoising diffusion probabilistic models (Ho et al., arXiv 2006.11239), right at any number of steps.

    One step from t to the next lower timestep p uses the beta of that whole step (arXiv 2102.09672, section 4)::

        beta       = 1 - alpha_bar_t / alpha_bar_p
        beta_tilde = beta (1 - alpha_bar_p) / (1 - alpha_bar_t)                                        (equation 7)
        mean       = (sqrt(alpha_bar_p) beta x0 + sqrt(1 - beta) (1 - alpha_bar_p) x_t) / (1 - alpha_bar_t)
        x_p        = mean + sigma z,    z ~ N(0, 1), none at the last step

    Args:
        num_train_timesteps: number T of diffusion steps the network is trained on.
        schedule: name of a noise schedule in ``monai.networks.schedulers.NoiseSchedules``.
        variance_type: sigma^2 is ``"fixed_small"``: beta_tilde; ``"fixed_large"``: beta; ``"learned_range"``: between
            the two, ``log sigma^2 = f log beta + (1 - f) log beta_tilde`` with ``f = (v + 1) / 2`` (arXiv 2102.09672,
            equation 15), where the network returns 2C channels, the prediction and then v.
        kwargs: further arguments of :class:`DiffusionScheduler`, such as ``prediction_type``.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        variance_type: str = "fixed_small",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_train_timesteps, schedule, **kwargs)
        require_member("variance_type", variance_type, VARIANCE_TYPES)
        self.variance_type = variance_type

    @property
    def is_stochastic(self) -> bool:
        """Whether :meth:`step` draws noise: always."""
        return True

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Go from one timestep to the next lower one; see :meth:`.DiffusionScheduler.step`.

        With ``learned_range``, ``model_output`` has shape (B, 2C, *spatial).
        """
        _, t, t_prev = self._neighbours(timestep)
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        x_t = at_least_float32(sample)
        v = None
        if self.variance_type == "learned_range":
            model_output, v = self._split(model_output, sample.shape[1])
        x0, _ = self.predict(model_output, t, x_t)

        beta = 1 - alpha_bar / alpha_bar_prev
        x0_weight = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
        x_t_weight = (1 - beta) ** 0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
        x_prev = x0_weight * x0 + x_t_weight * x_t
        if t_prev is not None:
            beta_tilde = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
            x_prev = x_prev + self._sigma(beta, beta_tilde, v) * self._noise(x_t, generator, noise)
        return x_prev.to(sample.dtype), x0.to(sample.dtype)

    def _sigma(self, beta: float, beta_tilde: float, v: Tensor | None) -> float | Tensor:
        """Standard deviation of the step's noise."""
        if v is None:
            return (beta if self.variance_type == "fixed_large" else beta_tilde) ** 0.5
        fraction = (v + 1) / 2
        return (0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(beta_tilde))).exp()

    @staticmethod
    def _split(model_output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        if model_output.shape[1] != 2 * channels:
            raise ValueError(
                f"variance_type 'learned_range' needs a model output of {2 * channels} channels (prediction and v for "
                f"each of the sample's {channels}), not {model_output.shape[1]}. Take a network that returns them, or "
                "choose 'fixed_small' or 'fixed_large'."
            )
        prediction, v = model_output.chunk(2, dim=1)
        return prediction, at_least_float32(v)

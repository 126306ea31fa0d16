"""DPM-Solver++ sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import DiffusionScheduler, at_least_float32

__all__ = ["DPMSolverPlusPlusScheduler"]


def _half_log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma), infinite where there is no noise and minus infinite where there is no signal."""
    if alpha_bar in (0.0, 1.0):
        return math.inf if alpha_bar else -math.inf
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


class DPMSolverPlusPlusScheduler(DiffusionScheduler):
    """DPM-Solver++(2M), the second-order multistep solver (Lu et al., arXiv 2211.01095, Algorithm 2): few steps.

    One step from t to the next lower timestep p, where q came before t (alpha and sigma are the square roots of
    alpha_bar and 1 - alpha_bar, lambda = log(alpha / sigma))::

        h   = lambda_p - lambda_t,    r = (lambda_t - lambda_q) / h
        D   = (1 + 1 / (2r)) x0_t - 1 / (2r) x0_q
        x_p = sigma_p / sigma_t x_t - alpha_p (exp(-h) - 1) D

    The first step has no x0_q, and the last ends at sigma = 0 where r is 0: both are of first order (D = x0_t), as the
    paper's Algorithm 2 starts and as few steps need to stay stable at the end.

    It remembers the last x0, so one object samples one batch at a time; the first timestep starts afresh.

    Args:
        num_train_timesteps: number T of diffusion steps the network is trained on.
        schedule: name of a noise schedule in ``monai.networks.schedulers.NoiseSchedules``.
        timestep_spacing: see :class:`DiffusionScheduler`; by default ``"trailing"``, the steadier one for few steps.
        kwargs: further arguments of :class:`DiffusionScheduler`, such as ``prediction_type``.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        timestep_spacing: str = "trailing",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_train_timesteps, schedule, timestep_spacing=timestep_spacing, **kwargs)
        self._last: tuple[int, Tensor] | None = None  # the timestep before this one, and its x0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of sampling and forget the last x0; see :meth:`.DiffusionScheduler.set_timesteps`."""
        super().set_timesteps(num_inference_steps, device)
        self._last = None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Go from one timestep to the next lower one; see :meth:`.DiffusionScheduler.step`.

        ``generator`` and ``noise`` are there for all samplers to be called alike; no noise is drawn.
        """
        t_last, t, t_prev = self._neighbours(timestep)
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        x_t = at_least_float32(sample)
        x0, _ = self.predict(model_output, t, x_t)

        h = _half_log_snr(alpha_bar_prev) - _half_log_snr(alpha_bar)
        direction = x0
        if t_prev is not None and self._last is not None and self._last[0] == t_last:
            h_last = _half_log_snr(alpha_bar) - _half_log_snr(self._alpha_bar(t_last))
            weight = h / (2 * h_last)  # 1 / (2r); 0 after a start from no signal at all
            direction = (1 + weight) * x0 - weight * self._last[1]
        # Kept only for a step that follows, so that no tensor outlives the sampling.
        self._last = None if t_prev is None else (t, x0)

        sigma_ratio = ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
        x_prev = sigma_ratio * x_t - alpha_bar_prev**0.5 * math.expm1(-h) * direction
        return x_prev.to(sample.dtype), x0.to(sample.dtype)

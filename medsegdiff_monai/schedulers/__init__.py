"""Samplers for diffusion models: MONAI schedulers that are right at any number of steps."""

from __future__ import annotations

from .base import DiffusionScheduler
from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .dpm_solver import DPMSolverPlusPlusScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "DPMSolverPlusPlusScheduler", "DiffusionScheduler"]

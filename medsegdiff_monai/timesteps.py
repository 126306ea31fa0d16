"""Which timesteps a training meets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["TimestepSampler"]

MODES = ("uniform", "importance")
BINS = 20  # intervals of t that share their losses: few enough to be met often
MEMORY = 0.9  # of the running mean of a bin's squared loss


class TimestepSampler:
    """Draws the timestep of each item of a batch, and weighs its loss.

    A share of the items gets the last timestep, t = T - 1, where all is noise: what the network learns there is to
    segment the image, which is what sampling starts with and all that follows builds on. The others are ``uniform``, or
    of ``importance``: in proportion to the root of the mean squared loss at that t, divided out of the loss again, so
    that the expected loss stays the same and its gradients vary less (Nichol and Dhariwal, arXiv 2102.09672, section
    3.3; there for single timesteps, here for intervals).

    Args:
        num_train_timesteps: number T of timesteps.
        mode: ``uniform`` or ``importance``.
        last_share: share of items at the last timestep, 0 to 1.

    Raises:
        InputError: for another mode, or a share out of range.
    """

    def __init__(self, num_train_timesteps: int = 1000, mode: str = "uniform", last_share: float = 0.0) -> None:
        if mode not in MODES:
            raise InputError(f"timestep_sampling={mode!r} must be one of {', '.join(MODES)}.")
        if not 0 <= last_share <= 1:
            raise InputError(f"last_timestep_share={last_share} must be from 0 to 1.")
        self.num_train_timesteps = num_train_timesteps
        self.mode = mode
        self.last_share = last_share
        self.squared_loss = torch.zeros(min(BINS, num_train_timesteps), dtype=torch.float64)
        self._drawn = self._weights = torch.zeros(0)  # of the batch at hand

    def probabilities(self) -> Tensor:
        """Probability of each bin, (bins,), float64; uniform until each of them has a loss."""
        root = self.squared_loss.sqrt()
        if self.mode == "uniform" or not (root > 0).all():
            return torch.full_like(root, 1 / len(root))
        return root / root.sum()

    def draw(self, batch: int, device: str | torch.device | None = None) -> Tensor:
        """Return timesteps (batch,), int64.

        Args:
            batch: number of items.
            device: where to.
        """
        probabilities, bins = self.probabilities(), len(self.squared_loss)
        drawn = torch.multinomial(probabilities, batch, replacement=True)
        timesteps = ((drawn + torch.rand(batch, dtype=torch.float64)) * self.num_train_timesteps / bins).long()
        last = torch.rand(batch) < self.last_share
        self._drawn = torch.where(last, -1, drawn)
        self._weights = torch.where(last, 1.0, 1 / (bins * probabilities[drawn]))
        return torch.where(last, self.num_train_timesteps - 1, timesteps).to(device)

    def weigh(self, losses: Tensor) -> Tensor:
        """Return the loss of the batch drawn last, a scalar, and learn from it where timesteps differ in loss.

        Args:
            losses: loss of each item, (batch,).
        """
        if self.mode == "uniform":
            return losses.mean()
        for drawn, loss in zip(self._drawn.tolist(), losses.detach().double().cpu()):
            if drawn >= 0:
                past = self.squared_loss[drawn] or loss**2
                self.squared_loss[drawn] = MEMORY * past + (1 - MEMORY) * loss**2
        return (losses * self._weights.to(losses)).mean()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"squared_loss": self.squared_loss.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.squared_loss.copy_(state["squared_loss"])

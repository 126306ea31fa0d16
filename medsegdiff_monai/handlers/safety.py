"""Numerical safety of a training."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import IterationEvents
from torch import nn

from ..engines import optimizer_step
from ..errors import InputError

__all__ = ["GradientClipping", "StopOnBadLoss"]


class GradientClipping:
    """Scale the gradients down to a largest norm before each step of the optimiser.

    Args:
        model: network in training.
        max_norm: largest norm of all gradients together.
    """

    def __init__(self, model: nn.Module, max_norm: float = 1.0) -> None:
        self.model = model
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip the gradients."""
        if optimizer_step(engine) is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)


class StopOnBadLoss:
    """Stop a training before a loss that is not finite reaches the weights, and name the cases of the batch."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Check the loss.

        Raises:
            InputError: where it is not finite.
        """
        state: Any = engine.state
        if not torch.isfinite(state.output["loss"]).all():
            cases = ", ".join(map(str, state.batch.get("case", ["unknown"])))
            raise InputError(
                f"the loss is {float(state.output['loss'])} at iteration {state.iteration}, on the cases {cases}: set "
                "--learning_rate lower, or --amp false; the last good checkpoint is kept."
            )

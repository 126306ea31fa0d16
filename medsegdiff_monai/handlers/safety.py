"""Numerical safety of a training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import nn
from torch.optim import Optimizer

from ..distributed import is_main
from ..errors import InputError
from ..settings import amp_dtype

__all__ = ["GradientClipping", "GradientScaling", "PlainErrors", "StopOnBadLoss"]

logger = logging.getLogger(__name__)

REMEDY = "set --learning_rate lower, or --amp false; the last good checkpoint is kept."


def _place(engine: Engine) -> str:
    """Where a training is, for its user: iteration and cases."""
    state: Any = engine.state
    return f"at iteration {state.iteration}, on the cases {', '.join(map(str, state.batch.get('case', ['unknown'])))}"


class GradientScaling:
    """Scale the loss of a training in float16, whose gradients would vanish else; bfloat16 and float32 need none.

    At the start the log says in which of the two a training is that has one of them.

    MONAI's trainer scales where it has a scaler; its own is for CUDA alone. A step whose gradients overflow is left
    out, and the scale halved.

    Args:
        amp: see :func:`medsegdiff_monai.settings.amp_dtype`.
    """

    def __init__(self, amp: bool | str = False) -> None:
        self.dtype = amp_dtype(amp)

    def attach(self, engine: Engine) -> None:
        """Attach to MONAI's trainer."""
        if self.dtype is not None:
            name = str(self.dtype).removeprefix("torch.")
            text = f"amp: the network computes in {name}; with --amp false in single precision."
            engine.add_event_handler(Events.STARTED, lambda: logger.info(text) if is_main() else None)
        if self.dtype == torch.float16:
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Give the trainer a scaler."""
        engine.amp, engine.scaler = True, torch.amp.GradScaler(engine.state.device.type)


class GradientClipping:
    """Scale the gradients down to a largest norm just before the optimiser steps.

    There they are those of all batches that were accumulated, and no longer scaled for float16.

    Args:
        optimizer: of the training.
        max_norm: largest norm of all gradients together.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float = 1.0) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        self.optimizer.register_step_pre_hook(lambda *_: self(engine))

    def __call__(self, engine: Engine) -> None:
        """Clip the gradients.

        Raises:
            InputError: where they are not finite, though the loss is.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not nn.utils.clip_grad_norm_(parameters, self.max_norm).isfinite():
            raise InputError(f"the gradients are not finite {_place(engine)}: {REMEDY}")


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
            raise InputError(f"the loss is {float(state.output['loss'])} {_place(engine)}: {REMEDY}")


class PlainErrors:
    """Pass errors on as they are, before MONAI's ``StatsHandler`` logs all of their frames (:mod:`.order`)."""

    def attach(self, engine: Engine) -> None:
        """Attach to an engine."""
        engine.add_event_handler(Events.EXCEPTION_RAISED, self)

    def __call__(self, engine: Engine, error: BaseException) -> None:
        """Raise the error again."""
        raise error

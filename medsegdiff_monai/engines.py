"""Learning rate and steps of MONAI's engines."""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Engine
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .errors import InputError

__all__ = ["cosine_decay", "optimizer_step"]


def cosine_decay(optimizer: Optimizer, max_epochs: int, warmup_epochs: int = 0) -> LambdaLR:
    """Return a schedule that lets the learning rate rise linearly, then fall to zero by a half cosine.

    It is stepped after each epoch and depends on the epoch alone (torch's ``CosineAnnealingLR`` and MONAI's
    ``WarmupCosineSchedule`` keep their length in a checkpoint, so that in a run resumed with more epochs the rate would
    rise again).

    Args:
        optimizer: optimiser whose learning rate is set.
        max_epochs: epochs of the whole training.
        warmup_epochs: epochs with a lower learning rate at the start: i / (warmup_epochs + 1) of it in the i-th.

    Raises:
        InputError: where the warm-up is longer than the training.
    """
    if not 0 <= warmup_epochs < max_epochs:
        raise InputError(f"warmup_epochs={warmup_epochs} must be at least 0 and below max_epochs={max_epochs}.")

    def share(epoch: int) -> float:
        if epoch < warmup_epochs:
            return (epoch + 1) / (warmup_epochs + 1)
        progress = min((epoch - warmup_epochs) / (max_epochs - warmup_epochs), 1.0)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, share)


def optimizer_step(engine: Engine) -> int | None:
    """Return the number of the optimiser's step in a trainer's iteration; None where gradients are only accumulated.

    MONAI's ``SupervisedTrainer`` steps in every ``accumulation_steps``-th iteration of an epoch and in its last.

    Args:
        engine: trainer, in an iteration.
    """
    state: Any = engine.state
    each = getattr(engine, "accumulation_steps", 1)
    epochs, done = divmod(state.iteration - 1, state.epoch_length)
    done += 1  # iterations of this epoch
    if done % each and done < state.epoch_length:
        return None
    return epochs * math.ceil(state.epoch_length / each) + math.ceil(done / each)

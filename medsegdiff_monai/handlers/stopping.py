"""When a training has done what it can."""

from __future__ import annotations

import logging
from typing import Any

from ignite.engine import Engine, Events

from ..errors import InputError

__all__ = ["EarlyStopping"]

logger = logging.getLogger(__name__)


class EarlyStopping:
    """Stop a training after a number of validations without a better one.

    Unlike Ignite's handler it has no counter of its own: the epoch of the best validation, which a checkpoint keeps,
    says all, so that a resumed run stops where the uninterrupted one does. Attach to the trainer (:mod:`.order`).

    Args:
        validator: engine whose key metric decides.
        patience: validations without a better one.
        val_interval: epochs from one validation to the next.

    Raises:
        InputError: for a ``patience`` below 1; at the start, where a resumed run has stopped early before.
    """

    def __init__(self, validator: Engine, patience: int, val_interval: int) -> None:
        if patience < 1:
            raise InputError(f"patience={patience} must be at least 1; leave it out to train for all max_epochs.")
        self.validator: Any = validator  # MONAI's workflows add to its state
        self.patience = patience
        self.val_interval = val_interval

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._refuse)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _exhausted(self, engine: Engine) -> bool:
        best = self.validator.state.best_metric_epoch
        return best > 0 and engine.state.epoch - best >= self.patience * self.val_interval

    def _refuse(self, engine: Engine) -> None:
        if self._exhausted(engine):
            raise InputError(
                f"this training stopped early at epoch {engine.state.epoch} (patience={self.patience}): set --patience "
                "higher, or leave it out, to train on."
            )

    def __call__(self, engine: Engine) -> None:
        """Stop the training where patience is at its end."""
        if self._exhausted(engine):
            best = self.validator.state.best_metric_epoch
            logger.info(f"Stopped early: no better validation since epoch {best} (patience={self.patience}).")
            engine.terminate()

"""The first part of a training."""

from __future__ import annotations

import logging
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from ..objective import SegmentationDiffusionPrepareBatch

__all__ = ["WarmStart"]

logger = logging.getLogger(__name__)


class WarmStart:
    """Draw a single mask of each image in the first part of a training, and sets of masks in the rest.

    Segmentation losses alone train a single mask (:func:`medsegdiff_monai.objective.ensemble_score`). That costs
    about half as much as a set of two, and what all masks of an image have in common is learned from more images.

    Which part an epoch belongs to depends on its number and on the trainer's ``max_epochs``. A network that has been
    trained before, and still has its record (as MONAI Label goes on with it), is past the first part.

    Members of a network that has only seen single masks are copies of each other, so no validation of the first part
    stands as the best one after the next has come: weights with a spread replace its weights, and patience begins with
    the second part.

    Args:
        prepare_batch: draws the masks, for the trainer that this is attached to.
        validator: engine that validates during the training, where it has one.
        share: of the epochs, 0 to 1.
    """

    def __init__(
        self, prepare_batch: SegmentationDiffusionPrepareBatch, validator: Engine | None = None, share: float = 0.5
    ) -> None:
        self.prepare_batch = prepare_batch
        self.validator: Any = validator  # MONAI's workflows add to its state
        self.num_members = prepare_batch.num_members
        self.share = share

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the number of masks for this epoch."""
        state: Any = engine.state
        network = getattr(engine, "network", None)
        record = getattr(getattr(network, "module", network), "record", None)  # within DistributedDataParallel
        if record is not None and record.letters.any():
            self.at(1.0)
            return
        before = self.prepare_batch.num_members
        self.at(state.epoch / state.max_epochs)
        if before < self.prepare_batch.num_members and idist.get_rank() == 0:
            logger.info(
                f"From epoch {state.epoch} on, the loss scores {self.num_members} masks of each image together: it is "
                "on another scale, and epochs take longer."
            )
        if self.validator is not None and (state.epoch - 1) / state.max_epochs <= self.share:
            self.validator.state.best_metric = self.validator.state.best_metric_epoch = -1

    def at(self, progress: float) -> None:
        """Set the number of masks for a part of the training that ends at ``progress``, 0 to 1."""
        self.prepare_batch.num_members = 1 if progress <= self.share else self.num_members

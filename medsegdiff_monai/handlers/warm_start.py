"""The first part of a training."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events

from ..objective import SegmentationDiffusionPrepareBatch

__all__ = ["WarmStart"]


class WarmStart:
    """Draw a single mask of each image in the first part of a training, and sets of masks in the rest.

    A set of one has no spread: its score is a loss of single masks. It costs about half as much, and what all masks of
    an image have in common is learned from more images.

    Which part an epoch belongs to depends on its number and on the trainer's ``max_epochs`` alone.

    Args:
        prepare_batch: draws the masks, for the trainer that this is attached to.
        share: of the epochs, 0 to 1.
    """

    def __init__(self, prepare_batch: SegmentationDiffusionPrepareBatch, share: float = 0.5) -> None:
        self.prepare_batch = prepare_batch
        self.num_members = prepare_batch.num_members
        self.share = share

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the number of masks for this epoch."""
        state: Any = engine.state
        self.at(state.epoch / state.max_epochs)

    def at(self, progress: float) -> None:
        """Set the number of masks for a part of the training that ends at ``progress``, 0 to 1."""
        self.prepare_batch.num_members = 1 if progress <= self.share else self.num_members

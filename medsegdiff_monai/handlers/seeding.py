"""Randomness of a training, drawn anew in each epoch."""

from __future__ import annotations

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from ignite.utils import manual_seed
from monai.data.utils import set_rnd
from torch.utils.data import Dataset

__all__ = ["EpochSeeding"]


class EpochSeeding:
    """Seed all that is random at the start of each epoch, by (seed, epoch, rank) alone.

    Shuffling, augmentation, timesteps, noise and own guesses of an epoch are then the same whether the epochs before it
    were run in the same process or in one that was interrupted, and whatever validation has drawn between them. Workers
    of a data loader are seeded by torch from the same state when an epoch starts them anew; persistent ones are not.

    Args:
        dataset: training data; MONAI's transforms have random states of their own.
        seed: of the whole training.
    """

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed Python, NumPy, torch and the transforms."""
        key = (self.seed % 2**32, engine.state.epoch, idist.get_rank())
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        manual_seed(seed)
        set_rnd(self.dataset, seed)

"""Ignite handlers: weights, checkpoints, seeding, safety, progress and history of a training run."""

from ..files import write_atomically
from .checkpoints import TrainingCheckpoint
from .history import TrainingHistory
from .progress import TrainingProgress
from .safety import GradientClipping, StopOnBadLoss
from .seeding import EpochSeeding
from .weights import BestModelSaver, ModelEMA, WeightsLoader

__all__ = [
    "BestModelSaver",
    "EpochSeeding",
    "GradientClipping",
    "ModelEMA",
    "StopOnBadLoss",
    "TrainingCheckpoint",
    "TrainingHistory",
    "TrainingProgress",
    "WeightsLoader",
    "write_atomically",
]

"""Ignite handlers: weights, checkpoints, safety, progress and history of a training run."""

from ..files import write_atomically
from .checkpoints import TrainingCheckpoint
from .history import TrainingHistory
from .progress import TrainingProgress
from .safety import GradientClipping, StopOnBadLoss
from .weights import BestModelSaver, ModelEMA, WeightsLoader

__all__ = [
    "BestModelSaver",
    "GradientClipping",
    "ModelEMA",
    "StopOnBadLoss",
    "TrainingCheckpoint",
    "TrainingHistory",
    "TrainingProgress",
    "WeightsLoader",
    "write_atomically",
]

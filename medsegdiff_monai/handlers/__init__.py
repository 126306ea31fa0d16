"""Ignite handlers of a training run: weights, checkpoints, seeding, safety, progress and what one sees of it."""

from ..files import write_atomically
from .checkpoints import TrainingCheckpoint
from .history import TrainingHistory
from .progress import TrainingProgress
from .report import TrainingReport
from .safety import GradientClipping, GradientScaling, StopOnBadLoss
from .seeding import EpochSeeding
from .stopping import EarlyStopping
from .tracking import TensorBoardLog
from .validation import ClassMetrics, EnergyDistance, SaturationWarning, ValidationPictures
from .warm_start import WarmStart
from .weights import BestModelSaver, ModelEMA, WeightsLoader

__all__ = [
    "BestModelSaver",
    "ClassMetrics",
    "EarlyStopping",
    "EnergyDistance",
    "EpochSeeding",
    "GradientClipping",
    "GradientScaling",
    "ModelEMA",
    "SaturationWarning",
    "StopOnBadLoss",
    "TensorBoardLog",
    "TrainingCheckpoint",
    "TrainingHistory",
    "TrainingProgress",
    "TrainingReport",
    "ValidationPictures",
    "WarmStart",
    "WeightsLoader",
    "write_atomically",
]

"""Ignite handlers of a training run: weights, checkpoints, seeding, safety, progress and what one sees of it."""

from ..files import write_atomically
from .calibration import FitCalibration
from .checkpoints import TrainingCheckpoint
from .history import TrainingHistory
from .progress import CaseProgress, ExpectedDuration, TrainingProgress
from .safety import GradientClipping, GradientScaling, PlainErrors, StopOnBadLoss
from .seeding import EpochSeeding
from .stopping import EarlyStopping
from .tracking import TensorBoardLog
from .training_report import TrainingReport
from .validation import ClassMetrics, CollapseWarning, EnergyDistance, SaturationWarning, ValidationPictures
from .warm_start import WarmStart
from .weights import BestModelSaver, ModelEMA, WeightsLoader

__all__ = [
    "BestModelSaver",
    "CaseProgress",
    "ClassMetrics",
    "CollapseWarning",
    "EarlyStopping",
    "EnergyDistance",
    "EpochSeeding",
    "ExpectedDuration",
    "FitCalibration",
    "GradientClipping",
    "GradientScaling",
    "ModelEMA",
    "PlainErrors",
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

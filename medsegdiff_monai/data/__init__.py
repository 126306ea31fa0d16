"""Data lists, their check, and readers of raw data sets."""

import warnings
from typing import Any

from .caching import cached_dataset
from .datalist import TrainingSplits, evaluation_items, training_splits
from .inference import CaseDataset, CaseList, CaseLoader, inference_items
from .reading import FileReader
from .rules import DataSpec, check_items
from .sampling import DistributedEvaluationSampler, DistributedTrainingSampler, training_sampler

__all__ = [
    "CaseDataset",
    "CaseList",
    "CaseLoader",
    "DataSpec",
    "DistributedEvaluationSampler",
    "DistributedTrainingSampler",
    "FileReader",
    "TrainingSplits",
    "cached_dataset",
    "check_items",
    "evaluation_items",
    "inference_items",
    "training_sampler",
    "training_splits",
]

_RENAMED = {"EvaluationShare": "DistributedEvaluationSampler", "TrainingShare": "DistributedTrainingSampler"}


def __getattr__(name: str) -> Any:
    """Return what had another name."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {_RENAMED[name]}.", FutureWarning, stacklevel=2)
    return globals()[_RENAMED[name]]

"""Data lists, their check, and readers of raw data sets."""

from .caching import cached_dataset
from .checks import DataSpec, check_items
from .datalist import CaseList, TrainingSplits, evaluation_items, inference_items, training_splits
from .sampling import EvaluationShare, TrainingShare, training_sampler

__all__ = [
    "CaseList",
    "DataSpec",
    "EvaluationShare",
    "TrainingShare",
    "TrainingSplits",
    "cached_dataset",
    "check_items",
    "evaluation_items",
    "inference_items",
    "training_sampler",
    "training_splits",
]

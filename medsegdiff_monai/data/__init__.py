"""Data lists, their check, and readers of raw data sets."""

from .caching import cached_dataset
from .datalist import TrainingSplits, evaluation_items, training_splits
from .inference import CaseDataset, CaseList, CaseLoader, inference_items
from .reading import FileReader
from .rules import DataSpec, check_items
from .sampling import EvaluationShare, TrainingShare, training_sampler

__all__ = [
    "CaseDataset",
    "CaseList",
    "CaseLoader",
    "DataSpec",
    "EvaluationShare",
    "FileReader",
    "TrainingShare",
    "TrainingSplits",
    "cached_dataset",
    "check_items",
    "evaluation_items",
    "inference_items",
    "training_sampler",
    "training_splits",
]

"""Data lists, their check, and readers of raw data sets."""

from .checks import DataSpec, check_items
from .datalist import CaseList, evaluation_items, inference_items, training_splits
from .sampling import training_sampler

__all__ = [
    "CaseList",
    "DataSpec",
    "check_items",
    "evaluation_items",
    "inference_items",
    "training_sampler",
    "training_splits",
]

"""The MedSegDiff network and its two ideas."""

from .dynamic_conditioning import DynamicConditioning
from .ff_parser import FFParser
from .medsegdiff_unet import MedSegDiffUNet
from .record import TrainingRecord

__all__ = ["DynamicConditioning", "FFParser", "MedSegDiffUNet", "TrainingRecord"]

"""MedSegDiff for MONAI: medical image segmentation by a diffusion model, with uncertainty."""

from . import distributed, errors, settings

__all__ = ["__version__", "distributed", "errors", "settings"]

__version__ = "0.1.0"

"""MedSegDiff for MONAI: medical image segmentation by a diffusion model, with uncertainty."""

from . import errors, settings

__all__ = ["__version__", "errors", "settings"]

__version__ = "0.1.0"

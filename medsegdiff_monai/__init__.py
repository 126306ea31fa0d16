"""MedSegDiff for MONAI: medical image segmentation by a diffusion model, with uncertainty."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inferers import DiffusionEnsembleInferer
    from .metrics import expected_calibration_error, generalised_energy_distance, hungarian_matched_iou
    from .networks import MedSegDiffUNet
    from .objective import ensemble_score
    from .schedulers import DDIMScheduler, DDPMScheduler, DPMSolverPlusPlusScheduler
    from .segmenter import MedSegDiff, Segmentation

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverPlusPlusScheduler",
    "DiffusionEnsembleInferer",
    "MedSegDiff",
    "MedSegDiffUNet",
    "Segmentation",
    "__version__",
    "ensemble_score",
    "expected_calibration_error",
    "generalised_energy_distance",
    "hungarian_matched_iou",
]

__version__ = "0.1.0"

_HOMES = {
    "inferers": ("DiffusionEnsembleInferer",),
    "metrics": ("expected_calibration_error", "generalised_energy_distance", "hungarian_matched_iou"),
    "networks": ("MedSegDiffUNet",),
    "objective": ("ensemble_score",),
    "schedulers": ("DDIMScheduler", "DDPMScheduler", "DPMSolverPlusPlusScheduler"),
    "segmenter": ("MedSegDiff", "Segmentation"),
}


def __getattr__(name: str) -> Any:
    """Import a name or module when it is first asked for: the help of a command needs none of them."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    try:
        if not name.startswith("_"):
            return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

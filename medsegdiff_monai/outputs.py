"""Which results of a case are written, and to which files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import InputError

__all__ = ["FILES", "OUTPUTS", "check_outputs", "output_files", "result_file"]

FILES = {
    "seg": ["seg.nii.gz"],
    "prob": ["prob.nii.gz"],
    "uncertainty": ["uncertainty_entropy.nii.gz", "uncertainty_mi.nii.gz"],
    "members": ["members.nii.gz"],
    "overlay": ["overlay.png"],
}
OUTPUTS = ("seg", "prob", "uncertainty", "overlay")  # where nothing else is asked for


def check_outputs(outputs: Sequence[str] | str) -> list[str]:
    """Read what is to be written: a list, or names with commas between them, as the command line may give it.

    Raises:
        InputError: for a name that stands for nothing, or a list without ``seg``.
    """
    names = [name.strip() for name in outputs.split(",")] if isinstance(outputs, str) else outputs
    if not isinstance(names, (list, tuple)) or not {"seg"} <= set(map(str, names)) <= set(FILES):
        raise InputError(
            f"outputs={outputs!r} must be a list of {', '.join(FILES)}, such as \"['seg','members']\"; seg must be in "
            "it, since the mask tells which cases are finished."
        )
    return list(names)


def result_file(output_dir: str | Path, case: str, name: str) -> Path:
    """Where a result of a case is written: ``<output_dir>/<case>/<case>_<name>``."""
    return Path(output_dir) / case / f"{case}_{name}"


def output_files(output_dir: str | Path, case: str, outputs: Sequence[str]) -> list[Path]:
    """All files that a finished case has.

    Args:
        output_dir: folder of the results.
        case: name of the case.
        outputs: what is written, as :func:`check_outputs` returns it.
    """
    return [result_file(output_dir, case, name) for output in outputs for name in FILES[output]]

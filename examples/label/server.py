"""A MONAI Label app folder with a copy of the bundle, and the command that serves it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = "medsegdiff"
STOCK_APPS = Path(sys.prefix) / "monailabel" / "sample-apps"
OWN_APPS = Path(__file__).parent


def server_command(work: str | Path, studies: str | Path, app: str = "active_learning", port: int = 8000) -> list[str]:
    """Copy an app and the bundle to ``work``, as MONAI Label expects them, and return the command that serves them.

    A bundle that is there already is kept, with the weights that were trained in it.

    Args:
        work: folder to write ``<app>/`` to, with the bundle in ``<app>/model/medsegdiff``.
        studies: folder of studies, or a DICOMweb address.
        app: ``active_learning`` (beside this file) or ``monaibundle`` (MONAI Label's own, unmodified).
        port: port to listen on, on loopback.
    """
    source = OWN_APPS / app if (OWN_APPS / app).is_dir() else STOCK_APPS / app
    target = Path(work).resolve() / app
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "logs", "model"), dirs_exist_ok=True)
    bundle = target / "model" / MODEL
    if not bundle.exists():
        outputs = shutil.ignore_patterns("train", "eval", "inference", "checkpoint_epoch=*.pt")
        shutil.copytree(ROOT / "bundle", bundle, ignore=outputs)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(target), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # the model is here already: with another source the app would ask the internet for its list of models
    for key, value in (("models", MODEL), ("zoo_source", "local"), ("sam2", "false")):
        command += ["--conf", key, value]
    return command

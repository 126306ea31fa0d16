"""A MONAI Label app folder with a copy of the bundle, and how it is served."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from medsegdiff_monai.errors import InputError

ROOT = Path(__file__).parents[2]
MODEL = "medsegdiff"
STOCK_APPS = Path(sys.prefix) / "monailabel" / "sample-apps"
OWN_APPS = Path(__file__).parent
WEB = "examples.label.serving.web:app"


def server_command(
    work: str | Path, studies: str | Path, app: str = "active_learning", port: int = 8000, bundle: str | Path = ""
) -> list[str]:
    """Copy an app and the bundle to ``work``, as MONAI Label expects them, and return the command that serves them.

    A bundle that is there already is kept, with the weights that were trained in it.

    Args:
        work: folder to write ``<app>/`` to, with the bundle in ``<app>/model/medsegdiff``.
        studies: folder of studies, or a DICOMweb address.
        app: ``active_learning`` (beside this file) or ``monaibundle`` (MONAI Label's own, unmodified).
        port: port to listen on, on loopback.
        bundle: folder of the bundle; by default the one of this repository.

    Raises:
        InputError: where there is no such app or bundle, or a bundle is given and another was copied before.
    """
    origin = Path(str(bundle)) if bundle else ROOT / "bundle"
    if not (origin / "configs" / "metadata.json").is_file():
        raise InputError(f"bundle {origin}: has no configs/metadata.json: give the folder of a MONAI bundle.")
    source = next((apps / app for apps in (OWN_APPS, STOCK_APPS) if (apps / app / "main.py").is_file()), None)
    if source is None:
        raise InputError(f"app {app!r}: there is none of this name: use active_learning or monaibundle.")
    target = Path(work).resolve() / app
    served = target / "model" / MODEL
    if bundle and served.exists():
        raise InputError(
            f"bundle {origin}: {served} is there from an earlier start: leave out --bundle to go on "
            "with it, or give another --work."
        )
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "logs", "model"), dirs_exist_ok=True)
    if not served.exists():
        # MONAI Label offers all weights in the folder, the shortest name first; those are another network's
        outputs = shutil.ignore_patterns("train", "eval", "inference", "checkpoint_epoch=*.pt", "lidc.pt")
        served.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=served.parent) as unfinished:  # a copy that is interrupted is not served
            shutil.copytree(origin, Path(unfinished) / MODEL, ignore=outputs).rename(served)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(target), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if source.parent == OWN_APPS:
        command += ["--uvicorn_app", WEB]
    # the model is here already: with another source the app would ask the internet for its list of models
    for key, value in (("models", MODEL), ("zoo_source", "local"), ("sam2", "false")):
        command += ["--conf", key, value]
    return command


def server_environment(work: str | Path, origins: str = "") -> dict[str, str]:
    """This process's environment, with what suits the bundle where MONAI Label's settings are not given.

    Args:
        work: folder to keep series from DICOMweb and uploaded studies in, rather than in the home folder.
        origins: of web pages, other than the server's own, that may ask it, with spaces between them.

    Raises:
        InputError: for an origin that is none.
    """
    given = dict(os.environ)
    # version 0.8.5 does not start where this is set
    listed = given.pop("MONAI_LABEL_CORS_ORIGINS", "[]")
    try:
        more = json.loads(listed)
    except json.JSONDecodeError:
        more = None
    if not isinstance(more, list):
        raise InputError(f'MONAI_LABEL_CORS_ORIGINS={listed}: must be a list, such as ["https://viewer.example"].')
    origins = " ".join([origins, *map(str, more)]).strip()
    for origin in origins.split():
        if not re.fullmatch(r"https?://[^/*]+", origin):
            raise InputError(f"origin {origin!r}: must be scheme and host, such as https://viewer.example:8443.")
    settings = {
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality": "MR"}',  # its default is CT
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(Path(work).resolve() / "dicom"),
        "MONAI_LABEL_SESSION_PATH": str(Path(work).resolve() / "sessions"),
        "MEDSEGDIFF_LABEL_ORIGINS": origins,
    }
    # dcmqi is installed beside Python; where MONAI Label does not find it, it downloads it
    path = os.pathsep.join([str(Path(sys.executable).parent), given.get("PATH", "")])
    modules = os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH", "")]))
    return {**settings, **given, "PATH": path, "PYTHONPATH": modules}

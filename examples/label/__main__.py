"""Start MONAI Label with the bundle: ``make label``.

``python -m examples.label [--studies DIR] [--work DIR] [--app active_learning|monaibundle] [--bundle DIR] [--port N]
[--origins 'https://HOST ...']``
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from psutil import pid_exists

from medsegdiff_monai.errors import InputError, show_input_errors_plainly

from .server import server_command, server_environment
from .studies import write_demo_studies


def main(
    studies: str = "",
    work: str = "label_output",
    app: str = "active_learning",
    bundle: str = "",
    port: int = 8000,
    origins: str = "",
) -> None:
    """Serve the bundle on loopback until interrupted.

    Args:
        studies: folder of NIfTI or NRRD volumes, or a DICOMweb address; by default demo studies are made.
        work: folder for the app with its copy of the bundle, for the demo studies, and for series fetched by DICOMweb.
        app: ``active_learning``, or MONAI Label's own ``monaibundle``, which knows no ranking by uncertainty.
        bundle: folder of the bundle to serve; by default the one of this repository.
        port: port to listen on.
        origins: of other web pages that may ask the server, such as ``https://viewer.example``, with spaces between.
    """
    folder = Path(work)
    if studies and not studies.startswith(("http://", "https://")) and not Path(studies).is_dir():
        raise InputError(f"studies {studies}: there is no such folder: give one, or the address of a DICOMweb archive.")
    environment = server_environment(folder, origins)
    command = server_command(folder, studies or folder / "studies", app, port, bundle)
    environment["MEDSEGDIFF_LABEL_FILES"] = str(own_files(folder))
    if not studies:
        write_demo_studies(folder / "studies")
        print(f"Demo studies: {folder / 'studies'} (crops of the MNI152 template; README.txt there says more)")
    print(f"MONAI Label: http://127.0.0.1:{port} (end it with Ctrl+C)")
    print("It answers whoever reaches that address, without a login: docs/label.md, Security")
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # so that a signal reaches the server itself


def own_files(work: Path) -> Path:
    """Return a folder for the files of requests, and delete those of servers that were killed: they hold images.

    Raises:
        InputError: where it cannot be made.
    """
    place = work.resolve() / "requests"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for left in place.iterdir():
            if left.name.isdigit() and (int(left.name) == os.getpid() or not pid_exists(int(left.name))):
                shutil.rmtree(left)
        own = place / str(os.getpid())  # which the server will have, too
        own.mkdir()
    except OSError as error:
        raise InputError(f"{place}: is no folder to write to ({error.strerror}): give another --work.") from error
    return own


def parse() -> dict[str, str | int]:
    """The options that were given, as they were typed."""
    parser = argparse.ArgumentParser("python -m examples.label", argument_default=argparse.SUPPRESS)
    for name in ("studies", "work", "app", "bundle", "origins"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    return vars(parser.parse_args())


if __name__ == "__main__":
    show_input_errors_plainly()
    main(**parse())

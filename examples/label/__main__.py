"""Start MONAI Label with the bundle: ``make label``.

``python -m examples.label [--studies DIR] [--work DIR] [--app active_learning|monaibundle] [--port N]``
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fire

from .server import server_command
from .studies import write_demo_studies


def main(studies: str = "", work: str = "label_output", app: str = "active_learning", port: int = 8000) -> None:
    """Serve the bundle on loopback until interrupted.

    Args:
        studies: folder of NIfTI or NRRD volumes, or a DICOMweb address; by default demo studies are made.
        work: folder for the app with its copy of the bundle, and for the demo studies.
        app: ``active_learning``, or MONAI Label's own ``monaibundle``, which knows no ranking by uncertainty.
        port: port to listen on.
    """
    folder = Path(work)
    if not studies:
        studies = str(write_demo_studies(folder / "studies"))
        print(f"Demo studies: {studies} (crops of the MNI152 template; README.txt there says more)")
    command = server_command(folder, studies, app, port)
    print(f"MONAI Label: http://127.0.0.1:{port} (end it with Ctrl+C)", flush=True)
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    fire.Fire(main)

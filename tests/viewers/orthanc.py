"""A real archive: Orthanc with its DICOMweb plug-in, as Debian packages them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from ..label.ports import free_port

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_SECONDS = 60


def missing() -> list[str]:
    """Names of Debian's packages that are not there."""
    found = {"orthanc": shutil.which("Orthanc"), "orthanc-dicomweb": PLUGIN.exists(), "chromium": chromium()}
    return [package for package, there in found.items() if not there]


def chromium() -> str | None:
    """The browser."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """Run an archive on loopback, with its storage in ``folder``; its address."""
    folder.mkdir()
    port = free_port()
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StudiesMetadata": "Full", "SeriesMetadata": "Full"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen([str(shutil.which("Orthanc")), str(folder / "orthanc.json")], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, folder / "orthanc.log")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(f"{address}/system", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.2)
    raise RuntimeError(f"Orthanc does not answer: {log.read_text()[-2000:]}")


def store(address: str, series: Path) -> None:
    """Store the files of a folder."""
    for file in sorted(series.iterdir()):
        answer = requests.post(f"{address}/instances", data=file.read_bytes(), timeout=60)
        assert answer.ok, answer.text

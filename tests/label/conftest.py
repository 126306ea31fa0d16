"""A real MONAI Label server on loopback, and small studies for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ..conftest import ROOT
from .ports import free_port

requests = pytest.importorskip("requests")

QUICK = {"num_members": 1, "num_steps": 1, "result_extension": ".nii.gz"}
START_SECONDS, TASK_SECONDS = 300, 900


class Server:
    """A server, started as ``make label`` does, with an app of its own in ``folder``."""

    def __init__(self, folder: Path, app: str, studies: str = "", **settings: str) -> None:
        self.model = "medsegdiff"
        self.folder = folder
        self.bundle = folder / app / "model" / self.model
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        env = {**os.environ, "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"), "CUDA_VISIBLE_DEVICES": ""}
        env["PYTHONPATH"] = str(ROOT)
        env["MONAI_LABEL_AUTO_UPDATE_SCORING"] = "false"  # else it scores whenever it has nothing else to do
        command = [sys.executable, "-m", "examples.label", "--work", str(folder), "--app", app, "--port", str(port)]
        command += ["--studies", studies or str(folder / "studies")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env={**env, **settings}, stdout=log, stderr=log)
        try:
            self.wait(self.is_up, START_SECONDS)
        except BaseException:
            self.process.kill()
            raise

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return requests.get(f"{self.url}/info/", timeout=60).ok
        except requests.ConnectionError:
            return False

    def wait(self, done: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def info(self) -> dict[str, Any]:
        return requests.get(f"{self.url}/info/").json()

    def options(self, section: str) -> dict[str, Any]:
        """What 3D Slicer sends for ``models`` or ``trainers``: all of its table of options, of a choice the first."""
        config = self.info()[section][self.model]["config"]
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}

    def client(self) -> Any:
        """The client in MONAI Label, which 3D Slicer's module uses."""
        from monailabel.client import MONAILabelClient

        return MONAILabelClient(self.url, tmpdir=str(self.folder), client_id="reader")

    def post(self, model: str = "", params: Any = None, **query: Any) -> requests.Response:
        files = {"file": (query["file"].name, query.pop("file").read_bytes())} if "file" in query else None
        text = params if isinstance(params, str) else json.dumps({**QUICK, **(params or {})})
        url = f"{self.url}/infer/{model or self.model}"
        return requests.post(url, params={"output": "image", **query}, data={"params": text}, files=files)

    def infer(self, params: dict[str, Any] | None = None, **query: Any) -> nib.Nifti1Image:
        """The mask that /infer returns for ``image=`` (id or folder), ``file=`` (upload) or ``session_id=``."""
        answer = self.post(params=params, **query)
        assert answer.status_code == 200, self.log.read_text()[-3000:]
        return nib.Nifti1Image.from_bytes(gunzip(answer.content))


def gunzip(content: bytes) -> bytes:
    import gzip

    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def voxels(mask: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(mask.dataobj)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> nib.Nifti1Image:
    """A crop of a demo study that fits into the network's field."""
    pytest.importorskip("monailabel")
    from examples.label.studies import write_demo_studies

    folder = write_demo_studies(tmp_path_factory.mktemp("demo"))
    return nib.load(folder / "mni152_right.nii.gz").slicer[4:34, 6:50, 5:35]


@contextmanager
def served(study: nib.Nifti1Image, folder: Path, app: str, number: int, **settings: str) -> Iterator[Server]:
    """A server of a number of studies in a folder, of different sizes."""
    (folder / "studies").mkdir()
    for i in range(number):
        nib.save(study.slicer[: 27 + i], folder / "studies" / f"study_{i}.nii.gz")
    server = Server(folder, app, **settings)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def stock(study: nib.Nifti1Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MONAI Label's own ``monaibundle`` app, unmodified, with four studies."""
    with served(study, tmp_path_factory.mktemp("stock"), "monaibundle", 4) as server:
        yield server


@pytest.fixture(scope="module")
def own(study: nib.Nifti1Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app of this repository, with three studies, and another web page that may ask it."""
    allowed = {"MONAI_LABEL_CORS_ORIGINS": '["https://viewer.example"]'}
    with served(study, tmp_path_factory.mktemp("own"), "active_learning", 3, **allowed) as server:
        yield server

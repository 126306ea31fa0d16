"""Many clients at once, and a server that is killed among them."""

from __future__ import annotations

import gzip
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import nibabel as nib
import numpy as np
import pytest

from medsegdiff_monai import MedSegDiff

from ..conftest import ROOT
from .conftest import QUICK, Server, requests, voxels

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own: make test-label")
import psutil

CLIENTS, REQUESTS, STUDIES = 8, 20, 4
GROWTH = 200 * 2**20  # bytes that the server may take more after the first half
BAD = [
    (400, {"params": {"num_members": 0}, "image": "study_0"}),
    (400, {"params": "{broken", "image": "study_1"}),
    (404, {"image": "no_such_study"}),
    (404, {"model": "no_such_model", "image": "study_2"}),
    (409, {"image": "study_3", "output": "dicom_seg"}),
    (400, {}),
]


@pytest.fixture
def busy(study, tmp_path):
    """A server of our app with four studies, and the mask that the bundle has for each without a server."""
    (tmp_path / "studies").mkdir()
    bundle = MedSegDiff.from_bundle(ROOT / "bundle", num_members=1, num_steps=1, device="cpu")
    masks = {}
    for i in range(STUDIES):
        file = tmp_path / "studies" / f"study_{i}.nii.gz"
        nib.save(study.slicer[: 27 + i], file)
        masks[f"study_{i}"] = bundle.segment(file).mask
    server = Server(tmp_path, "active_learning")
    yield server, masks
    server.stop()


def submit(server: Server, name: str, mask: np.ndarray) -> requests.Response:
    image = nib.load(server.folder / "studies" / f"{name}.nii.gz")
    content = gzip.compress(nib.Nifti1Image(mask.astype(np.uint8), image.affine).to_bytes())
    return requests.put(f"{server.url}/datastore/label", params={"image": name}, files={"label": ("l.nii.gz", content)})


def ask(server: Server, masks: dict[str, np.ndarray], number: int) -> None:
    """One of the things that clients ask, and whether the answer is right."""
    name = f"study_{number % STUDIES}"
    if number % 5 == 0:
        assert submit(server, name, masks[name]).ok
    elif number % 5 == 1:
        answer = requests.get(f"{server.url}/info/")
        assert answer.json()["datastore"]["total"] == STUDIES
    elif number % 5 == 2:
        status, query = BAD[number // 5 % len(BAD)]
        refused = server.post(**query)
        assert refused.status_code == status and "\n" not in refused.json()["detail"], refused.text
    else:
        np.testing.assert_array_equal(voxels(server.infer(QUICK, image=name)), masks[name])


@pytest.mark.slow
def test_every_good_request_is_right_and_every_bad_one_refused(busy):
    server, masks = busy
    process = psutil.Process(server.process.pid)
    half, used = CLIENTS * REQUESTS // 2, []
    with ThreadPoolExecutor(CLIENTS) as clients:
        for numbers in (range(half), range(half, 2 * half)):
            list(clients.map(lambda number: ask(server, masks, number), numbers))
            used.append(process.memory_info().rss)
    assert used[1] - used[0] < GROWTH, used
    assert not [file for file in (server.folder / "requests").rglob("*") if file.is_file()]


@pytest.mark.slow
def test_nothing_that_was_accepted_is_lost_when_the_server_is_killed(busy, tmp_path):
    server, masks = busy
    sent: list[tuple[str, np.ndarray]] = []

    def label_on() -> None:
        for number in count():
            name = f"study_{number % STUDIES}"
            sent.append((name, np.where(masks[name] > 0, number // STUDIES % 2 + 1, 0)))
            try:
                assert submit(server, *sent[-1]).ok
            except requests.ConnectionError:
                return

    with ThreadPoolExecutor(1) as client:
        task = client.submit(label_on)
        server.wait(lambda: len(sent) > 3 * STUDIES, 120)
        os.kill(server.process.pid, signal.SIGKILL)
        task.result(60)
    accepted, (flying, half_done) = dict(sent[:-1]), sent[-1]
    listed = json.loads((tmp_path / "studies" / "datastore_v2.json").read_text())["objects"]
    assert set(listed) == set(masks)
    again = Server(tmp_path, "active_learning")
    try:
        for name, mask in accepted.items():
            query = {"label": name, "tag": "final"}
            content = requests.get(f"{again.url}/datastore/label", params=query).content
            kept = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)
            assert np.array_equal(kept, mask) or (name == flying and np.array_equal(kept, half_done)), name
        assert not list((tmp_path / "studies").rglob("*.tmp"))
        np.testing.assert_array_equal(voxels(again.infer(QUICK, image="study_0")), masks["study_0"])
    finally:
        again.stop()

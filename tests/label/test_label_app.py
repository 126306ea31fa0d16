"""The app of this repository as a whole, over HTTP: who may ask, what is refused and how, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch

from .conftest import QUICK, TASK_SECONDS, requests

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own: make test-label")
import nrrd

from examples.label.__main__ import own_files
from medsegdiff_monai.errors import InputError

ALLOWED, FOREIGN = "https://viewer.example", "https://elsewhere.example"


def nifti(values: np.ndarray) -> tuple[str, bytes]:
    return "image.nii", nib.Nifti1Image(values, np.eye(4)).to_bytes()


def test_other_pages_are_refused_unless_they_are_allowed(own):
    assert requests.get(f"{own.url}/info/", headers={"Origin": FOREIGN}).status_code == 403
    assert requests.get(f"{own.url}/info/", headers={"Host": "rebound.example"}).status_code == 403
    answer = requests.get(f"{own.url}/info/", headers={"Origin": ALLOWED})
    assert answer.ok and answer.headers["access-control-allow-origin"] == ALLOWED
    asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Private-Network": "true"}
    for origin, ok in ((ALLOWED, True), (FOREIGN, False)):
        preflight = requests.options(f"{own.url}/datastore/label", headers={"Origin": origin, **asked})
        assert preflight.ok == ok
        assert ("access-control-allow-private-network" in preflight.headers) == ok


@pytest.mark.parametrize("path", ["/", "/ohif/", "/logs/", "/info/"])
def test_pages_load_nothing_from_elsewhere(path, own):
    page = requests.get(f"{own.url}{path}")
    assert page.ok and "script-src 'self'" in page.headers["content-security-policy"]
    if path in ("/", "/logs/"):  # the viewer has such addresses in it, which the policy stops
        assert not re.search(r"<(script|link)[^>]+https?://", page.text)
    if path == "/":
        assert "POST    /infer/{model}" in page.text


def test_weights_are_neither_replaced_nor_deleted_by_requests(own):
    model = own.bundle / "models" / "model.pt"
    before = model.read_bytes()
    assert requests.put(f"{own.url}/model/medsegdiff", files={"file": ("a.pt", b"x")}).status_code == 405
    assert requests.delete(f"{own.url}/model/medsegdiff").status_code == 405
    assert model.read_bytes() == before == requests.get(f"{own.url}/model/medsegdiff").content


@pytest.mark.parametrize(
    ("params", "status", "word"),
    [
        ({"num_members": 10**9}, 400, "at most 100"),
        ({"num_members": -1}, 400, "num_members"),
        ({"fusion": ["mean"]}, 400, "fusion"),
        ({"fusion": "median"}, 400, "fusion"),
        ({"num_members": "2000.0"}, 400, "at most 100"),
        ({"num_members": "²"}, 400, "whole number"),
        ({"device": "abacus"}, 400, "device"),
        ({"device": "meta"}, 400, "device"),
        ({"result_extension": ".exe"}, 400, ".seg.nrrd"),
        ({"result_dtype": "object"}, 400, "result_dtype"),
        ({"logging": "loud"}, 400, "logging"),
        ({"model_filename": "../other.pt"}, 409, "take model.pt"),
        ({"uncertainty": "perhaps"}, 400, "uncertainty"),
        ({"mask_series": True}, 409, "archive"),
        ("[1]", 400, "JSON object"),
        ("{", 400, "JSON"),
    ],
)
def test_options_that_cannot_be_used_are_refused_in_a_line(params, status, word, own):
    answer = own.post(params=params, image="study_0")
    assert answer.status_code == status, answer.text
    assert word in answer.json()["detail"] and "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    "values",
    [np.ones((20, 20), np.float32), np.ones((20, 20, 20, 2), np.float32), np.full((20, 20, 20), np.nan, np.float32)],
    ids=["flat", "four axes", "no numbers"],
)
def test_images_that_cannot_be_segmented_are_refused_in_a_line(values, own, tmp_path):
    name, content = nifti(values)
    (tmp_path / name).write_bytes(content)
    answer = own.post(file=tmp_path / name)
    assert answer.status_code == 400 and name in answer.json()["detail"], answer.text


def test_what_is_put_into_the_folder_is_checked_and_replaces_nothing(own, study):
    url, kept = f"{own.url}/datastore", (own.folder / "studies" / "study_1.nii.gz").read_bytes()

    def label(values: np.ndarray, params: str) -> requests.Response:
        files = {"label": ("label.nii", nib.Nifti1Image(values, image.affine).to_bytes())}
        return requests.put(f"{url}/label", params={"image": "study_1"}, data={"params": params}, files=files)

    image = nib.load(own.folder / "studies" / "study_1.nii.gz")
    empty = np.zeros(image.shape, np.uint8)
    answers = [
        (409, requests.put(f"{url}/image", params={"image": "study_1"}, files={"file": nifti(empty)})),
        (400, requests.put(f"{url}/image", params={"image": "new"}, files={"file": ("new.nii.gz", b"text")})),
        (400, requests.put(f"{url}/image/info", params={"image": "study_1"}, data={"info": "["})),
        (400, label(empty, "[]")),
        (400, label(empty, '{"label_info": "all"}')),
        (400, label(np.full(image.shape, np.nan, np.float32), "{}")),
        (409, requests.post(f"{own.url}/train/medsegdiff", json={})),
        (409, requests.post(f"{own.url}/train/", json={})),
        (404, requests.post(f"{own.url}/batch/infer/unknown", json={})),
    ]
    for status, answer in answers:
        assert answer.status_code == status and "\n" not in answer.json()["detail"], answer.text
    assert (own.folder / "studies" / "study_1.nii.gz").read_bytes() == kept
    assert own.info()["datastore"]["total"] == 3
    assert not [file for file in (own.folder / "requests").rglob("*") if file.is_file()]  # of no refused request


def test_grade_is_in_the_answer_and_kept_with_the_study(own, tmp_path):
    grade = own.post(params={"num_members": 3}, image="study_0", output="json").json()["grade"]
    assert set(grade["expected_dice"]) == {"anterior", "posterior"} and 0 < grade["disagreement"] < 1
    info = requests.get(f"{own.url}/datastore/image/info", params={"image": "study_0"}).json()
    assert info["grade"] == grade
    (tmp_path / "black.nii").write_bytes(nifti(np.zeros((30, 44, 30), np.float32))[1])
    black = own.post(file=tmp_path / "black.nii", output="json").json()["grade"]
    assert "the same value everywhere" in black["out_of_domain"]


def test_seg_nrrd_has_names_colours_and_uncertainty(own, tmp_path):
    params = {"num_members": 3, "uncertainty": True, "result_extension": ".seg.nrrd"}
    answer = own.post(params=params, image="study_0")
    (tmp_path / "mask.seg.nrrd").write_bytes(answer.content)
    header = nrrd.read_header(str(tmp_path / "mask.seg.nrrd"))
    names = {header[f"Segment{i}_Name"] for i in range(4)}
    assert names == {"anterior", "posterior", "anterior - unsure", "posterior - unsure"}
    assert len({header[f"Segment{i}_Color"] for i in range(4)}) == 4


def test_slicer_uploads_segments_submits_and_goes_on(own, study, tmp_path):
    """With the client in MONAI Label, which 3D Slicer's module uses; idx counts as Slicer's do."""
    client = own.client()
    sample = client.next_sample("worst_first", {})["id"]
    options = {**own.options("models"), "restore_label_idx": False, "result_extension": ".nrrd"}
    file, answer = client.infer("medsegdiff", sample, options)
    assert answer["grade"]["expected_dice"] and set(answer["label_names"]) == {"anterior", "posterior"}
    entries = [{"name": name, "idx": value} for name, value in answer["label_names"].items()]
    client.save_label(sample, str(file), params={"label_info": entries})
    assert own.info()["datastore"]["completed"] == 1
    assert client.next_sample("worst_first", {})["id"] != sample
    nib.save(study, tmp_path / "own.nii.gz")
    session = client.create_session(str(tmp_path / "own.nii.gz"))["session_id"]
    mask, _ = client.infer("medsegdiff", "", options, session_id=session)
    assert nrrd.read(str(mask))[0].shape == study.shape
    client.remove_session(session)
    assert own.post(session_id=session).status_code == 404


def test_server_answers_while_it_computes_and_forgets_who_has_gone(own):
    def ask(patience: float) -> int:
        """The status of the answer to what takes minutes, or 0 where nobody waited for it."""
        form = {"params": json.dumps({**QUICK, "num_members": 100, "num_steps": 100})}
        try:
            return requests.post(f"{own.url}/infer/medsegdiff?image=study_2", data=form, timeout=patience).status_code
        except requests.Timeout:
            return 0

    with ThreadPoolExecutor(10) as clients:
        first = clients.submit(ask, 20)
        time.sleep(1)
        others = [clients.submit(ask, 8) for _ in range(9)]
        time.sleep(2)
        start = time.monotonic()
        assert requests.get(f"{own.url}/info/").ok
        assert time.monotonic() - start < 5
        assert sorted(task.result() for task in others) == [0] * 7 + [503, 503]
        time.sleep(1)
        assert ask(2) == 0 and not first.done()  # it waits: those who wait no more have no places
        assert first.result() == 0
    time.sleep(1)
    start = time.monotonic()
    assert own.post(image="study_2").ok
    assert time.monotonic() - start < 30


def test_training_takes_options_in_either_form_and_refuses_others(own):
    client = own.client()
    nib.save(own.infer(image="study_0"), own.folder / "label.nii.gz")
    client.save_label("study_0", str(own.folder / "label.nii.gz"), params={"label_info": []})
    for wrong in ({"medsegdif": {"max_epochs": 1}}, {"medsegdiff": 5}):
        assert requests.post(f"{own.url}/train/", json=wrong).status_code == 400
    for form in ({"medsegdiff": {"max_epochs": 1}}, {"max_epochs": 1, "client_id": "x"}):
        answer = requests.post(f"{own.url}/train/", json=form)
        assert answer.ok and answer.json()["medsegdiff"]["result"]["request"]["max_epochs"] == 1, answer.text
        requests.delete(f"{own.url}/train/")
        own.wait(lambda: client.train_status()["status"] not in ("SUBMITTED", "RUNNING"), TASK_SECONDS)


def test_a_study_that_cannot_be_read_is_left_out_of_scoring(own):
    spoilt = own.folder / "studies" / "spoilt.nii.gz"
    spoilt.write_bytes(b"no image")
    try:
        own.wait(lambda: own.info()["datastore"]["total"] == 4, 30)
        answer = requests.post(f"{own.url}/scoring/disagreement", params={"run_sync": True}, json={})
        assert answer.ok, answer.text
        info = requests.get(f"{own.url}/datastore/image/info", params={"image": "study_2"}).json()
        assert info["grade"]["expected_dice"] and "Not scored: spoilt" in own.log.read_text()
    finally:
        spoilt.unlink()


def test_devices_are_named_as_the_server_offers_them(monkeypatch):
    from examples.label.serving import endpoint

    monkeypatch.setattr(endpoint, "device_list", lambda: ["NVIDIA H100 80GB HBM3:1"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("NVIDIA H100 80GB HBM3:1", ["NVIDIA H100 80GB HBM3:1"], "cuda:1", "cpu", None):
        assert endpoint._checked({"device": device})["device"] == device
    with pytest.raises(InputError, match="NVIDIA H100"):
        endpoint._checked({"device": "cuda:2"})


def test_files_of_killed_servers_are_deleted_and_those_of_running_ones_kept(tmp_path):
    place = tmp_path / "requests"
    running, killed = str(os.getppid()), "4194305"  # above what Linux gives
    for name in (running, killed):
        (place / name).mkdir(parents=True)
    own = own_files(tmp_path)
    assert own.name == str(os.getpid()) and {folder.name for folder in place.iterdir()} == {running, own.name}
    (tmp_path / "file" / "requests").parent.mkdir()
    (tmp_path / "file" / "requests").write_text("")
    with pytest.raises(InputError, match="another --work"):
        own_files(tmp_path / "file")

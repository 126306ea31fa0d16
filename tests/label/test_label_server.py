"""What a radiologist's viewer asks of MONAI Label, over REST: ``make test-label``."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import run
from nibabel.processing import resample_from_to

from ..conftest import CONFIGS, ROOT
from .conftest import TASK_SECONDS, Server, requests, voxels

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own: make test-label")
from .dicom import write_series

SHARED = ROOT.parent / "shared" / "data" / "Hippocampus3D"


def dice(one: np.ndarray, other: np.ndarray, label: int) -> float:
    a, b = one == label, other == label
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def save(image: nib.Nifti1Image, path: Path) -> Path:
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def plain(stock, study, tmp_path_factory):
    """The mask of the study as it is."""
    return stock.infer(file=save(study, tmp_path_factory.mktemp("plain") / "plain.nii.gz"))


@pytest.fixture(scope="module")
def noisy(study):
    """The study under noise, in which members differ."""
    noise = np.random.default_rng(0).normal(0, 250, study.shape)
    return nib.Nifti1Image((voxels(study) + noise).astype(np.int16), study.affine)


def test_info_lists_the_model(stock, plain):
    info = stock.info()
    model = info["models"]["medsegdiff"]
    assert model["dimension"] == 3 and model["type"] == "segmentation"
    assert model["labels"] == {"anterior": 1, "posterior": 2}
    assert set(np.unique(voxels(plain))) == {0, *model["labels"].values()}
    assert {k: model["config"][k] for k in ("num_members", "num_steps", "fusion")} == {
        "num_members": 5, "num_steps": 1, "fusion": "expected_dice"
    }  # fmt: skip
    assert "medsegdiff" in info["trainers"]


def test_only_this_machine_is_listened_to(stock):
    import psutil

    connections = psutil.Process(stock.process.pid).net_connections()
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


OPTIONS: list[dict[str, int | str]] = [
    {"num_members": 1, "num_steps": 1},
    {"num_members": 1, "num_steps": 8},
    {"num_members": "5", "num_steps": "8"},  # viewers send what was typed
    {"num_members": 5, "num_steps": 8, "fusion": "staple"},
]


def test_options_take_effect(stock, noisy, tmp_path):
    """Of a study of which little is sure, each choice makes the mask that it makes without a server."""
    file = save(noisy, tmp_path / "noisy.nii.gz")
    wanted, served = [], []
    for i, options in enumerate(OPTIONS):
        run(
            config_file=str(CONFIGS / "inference.json"), bundle_root=str(ROOT / "bundle"), images=[str(file)],
            device="cpu", output_dir=str(tmp_path / str(i)), **{**options, "num_members": int(options["num_members"])},
        )  # fmt: skip
        wanted.append(voxels(nib.load(next((tmp_path / str(i)).rglob("*_seg.nii.gz")))))
        served.append(voxels(stock.infer(options, file=file)))
    differing = np.array([[(mask != other).sum() for other in wanted] for mask in served])
    own = np.eye(len(OPTIONS), dtype=bool)
    assert differing[own].max() < 4 and differing[~own].min() > 8, differing
    assert stock.post(params={"fusion": "no such fusion"}, image="study_0").status_code == 500


def rotated(study):
    turn = np.eye(4)
    turn[:2, :2] = [[0.9397, -0.3420], [0.3420, 0.9397]]
    return nib.Nifti1Image(voxels(study), turn @ study.affine)


def reoriented(study, axcodes):
    ornt = nib.orientations.axcodes2ornt(axcodes)
    return study.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(study.affine), ornt))


@pytest.mark.parametrize("change", [lambda s: reoriented(s, "LIP"), lambda s: reoriented(s, "SPL"), rotated])
def test_mask_of_another_orientation_is_the_same_on_its_grid(change, stock, study, plain, tmp_path):
    turned = change(study)
    mask = stock.infer(file=save(turned, tmp_path / "turned.nii.gz"))
    assert mask.shape == turned.shape
    np.testing.assert_allclose(mask.affine, turned.affine, atol=1e-3)
    np.testing.assert_array_equal(voxels(mask), voxels(change(plain)))


def test_mask_of_another_spacing_covers_the_same_place(stock, study, plain, tmp_path):
    affine = study.affine @ np.diag([1.3, 1.0, 0.8, 1.0])
    coarse = resample_from_to(study, ((24, 44, 37), affine), order=1)
    mask = stock.infer(file=save(coarse, tmp_path / "coarse.nii.gz"))
    assert mask.shape == coarse.shape
    np.testing.assert_allclose(mask.affine, affine, atol=1e-3)
    expected = resample_from_to(plain, mask, order=0)
    assert min(dice(voxels(mask), voxels(expected), label) for label in (1, 2)) > 0.8


@pytest.mark.parametrize("shape", [(7, 11, 5), (30, 56, 30)])
def test_any_size(shape, stock, tmp_path):
    """Smaller than the network's field, and larger."""
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 900, shape, dtype=np.int16), np.diag([1, 1, 1, 1]))
    assert stock.infer(file=save(image, tmp_path / "image.nii.gz")).shape == shape


def test_dicom_series_as_a_folder_and_as_a_zip(stock, study, plain, tmp_path):
    """The folder where the server can see it; the zip as a session. Both are on the grid of the series."""
    series = write_series(study, tmp_path / "series")
    archive = tmp_path / "series.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for file in series.iterdir():
            z.write(file, file.name)
    with archive.open("rb") as f:
        session = requests.put(f"{stock.url}/session/", params={"uncompress": True}, files={"files": f}).json()
    for query in ({"image": str(series)}, {"session_id": session["session_id"]}):
        mask = stock.infer(**query)
        assert mask.shape == study.shape
        mask = resample_from_to(mask, plain, order=0)  # the same grid, axes counted from the other end
        np.testing.assert_array_equal(voxels(mask), voxels(plain))


def test_parallel_requests_equal_serial_ones_beside_bad_ones(stock):
    wanted = [({"num_members": members}, f"study_{i}") for members in (1, 2) for i in range(4)]
    serial = [voxels(stock.infer(params, image=image)) for params, image in wanted]
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(stock.infer, params, image=image) for params, image in wanted]
        broken = pool.submit(stock.post, params="{broken", image="study_0")
        parallel = [voxels(future.result()) for future in futures]
    assert 400 <= broken.result().status_code < 600
    for one, other in zip(serial, parallel):
        np.testing.assert_array_equal(one, other)


def test_bad_requests_are_refused_and_the_server_goes_on(stock, plain, study, tmp_path):
    (tmp_path / "text.nii.gz").write_text("no image")
    answers = [
        stock.post(params={"num_members": 0}, image="study_0"),
        stock.post(params={"num_steps": "two"}, image="study_0"),
        stock.post(file=tmp_path / "text.nii.gz"),
        stock.post(model="unknown", image="study_0"),
        stock.post(),
    ]
    assert all(400 <= answer.status_code < 600 for answer in answers)
    mask = stock.infer(file=save(study, tmp_path / "study.nii.gz"))  # with the options' own values again
    np.testing.assert_array_equal(voxels(mask), voxels(plain))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the hippocampus set")
def test_hippocampus_of_a_real_case(stock):
    case = json.loads((SHARED / "dataset.json").read_text())["validation"][0]
    mask = stock.infer(file=SHARED / case["image"])
    label = np.asarray(nib.load(SHARED / case["label"]).dataobj)
    assert min(dice(voxels(mask), label, value) for value in (1, 2)) > 0.8


def test_training_uses_the_labels_and_the_next_mask_uses_the_weights(stock, tmp_path):
    """Taught that what was anterior is posterior and the reverse, it moves that way, from where it stood."""
    client, weights = stock.client(), stock.bundle / "models" / "model.pt"
    for i in range(3):
        mask = stock.infer(image=f"study_{i}")
        swapped = nib.Nifti1Image((-voxels(mask).astype(np.int16) % 3).astype(np.uint8), mask.affine)
        client.save_label(f"study_{i}", str(save(swapped, tmp_path / f"label_{i}.nii.gz")), params={})
    before = voxels(stock.infer(image="study_3"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    client.train_start("medsegdiff", {**stock.options("trainers"), "max_epochs": 20, "val_split": 0.34})
    stock.wait(lambda: client.train_status()["status"] not in ("SUBMITTED", "RUNNING"), TASK_SECONDS)
    assert client.train_status()["status"] == "DONE", stock.log.read_text()[-3000:]
    assert hashlib.sha256(weights.read_bytes()).hexdigest() != digest
    after = voxels(stock.infer(image="study_3"))
    for old, new in ((1, 2), (2, 1)):
        assert dice(np.where(before == old, new, 0), after, new) > dice(np.where(before == old, new, 0), before, new)
    assert dice(before > 0, after > 0, True) > 0.7  # and has not forgotten where the hippocampus is


def test_studies_are_ranked_by_disagreement(study, noisy, tmp_path):
    """The app beside the stock one; its scores are those of the table of cases."""
    studies = tmp_path / "studies"
    studies.mkdir()
    for name, image in (("clear", study), ("noisy", noisy), ("labelled", study)):
        nib.save(image, studies / f"{name}.nii.gz")
    images = [str(studies / f"{name}.nii.gz") for name in ("clear", "noisy")]
    run(
        config_file=str(CONFIGS / "inference.json"), bundle_root=str(ROOT / "bundle"), images=images, device="cpu",
        output_dir=str(tmp_path / "out"), num_members=2,
    )  # fmt: skip
    with (tmp_path / "out" / "cases.csv").open() as f:
        expected = {row["case"]: 1 - float(row["mean_pairwise_dice"]) for row in csv.DictReader(f)}

    server = Server(tmp_path, "active_learning")
    try:
        info = server.info()
        assert set(info["strategies"]) == {"random", "first", "disagreement", "worst_first"}
        assert set(info["scoring"]) == {"disagreement"}
        empty = save(nib.Nifti1Image(np.zeros(study.shape, dtype=np.uint8), study.affine), tmp_path / "label.nii.gz")
        label = {"label": ("label.nii.gz", empty.read_bytes())}
        query = {"image": "labelled", "tag": "final"}
        assert requests.put(f"{server.url}/datastore/label", params=query, files=label).ok

        def score():
            query, task = {"run_sync": True}, {"simulation_size": 2}
            return requests.post(f"{server.url}/scoring/disagreement", params=query, json=task).json()

        assert score()["executed"] == 2
        assert score()["skipped"] == 2  # until the weights change
        found = {}
        for name in expected:
            answer = requests.get(f"{server.url}/datastore/image/info", params={"image": name})
            found[name] = answer.json()["epistemic_entropy"]
        assert found == pytest.approx(expected, abs=1e-3)
        ranked = sorted(expected, key=lambda name: expected[name], reverse=True)
        served = [requests.post(f"{server.url}/activelearning/disagreement", json={}).json()["id"] for _ in range(2)]
        assert served == ranked
        worst = requests.post(f"{server.url}/activelearning/worst_first", json={}).json()
        assert worst["id"] == "noisy" and worst["grade"]["flag"]
    finally:
        server.stop()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/info/")

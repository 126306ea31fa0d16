"""The server beside a real archive, in OHIF in a real browser: ``make test-viewers``, which keeps the screenshots."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ..conftest import ROOT

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own: make test-viewers")
pytest.importorskip("playwright", reason="the browser is driven by playwright: make test-viewers")
import pydicom
import requests

from ..label.conftest import TASK_SECONDS, Server, gunzip
from ..label.dicom import write_series
from .ohif import reader
from .orthanc import missing, orthanc, store

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs Debian's packages {', '.join(missing())}")


def oblique(image: nib.Nifti1Image, degrees: float, axis: int) -> nib.Nifti1Image:
    """The image turned in space."""
    turn, (i, j) = np.eye(4), [k for k in range(3) if k != axis]
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn[np.ix_((i, j), (i, j))] = (c, -s), (s, c)
    return nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive of three oblique MR series."""
    from examples.label.studies import write_demo_studies

    folder = tmp_path_factory.mktemp("viewers")
    demo = write_demo_studies(folder / "demo")
    with orthanc(folder / "orthanc") as address:
        for name, degrees, axis in (("right", 20, 0), ("left", -15, 1), ("right_thick_slices", 10, 2)):
            image = oblique(nib.load(demo / f"mni152_{name}.nii.gz"), degrees, axis)
            store(address, write_series(image, folder / name, f"MNI152-{name}"))
        yield address


@pytest.fixture(scope="module")
def server(archive, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "active_learning", studies=f"{archive}/dicom-web")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pictures() -> Path:
    folder = Path(os.environ.get("MEDSEGDIFF_PICTURES", ROOT / "build" / "viewers"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def colourful(picture: bytes) -> np.ndarray:
    """How many pixels of each third of a picture, which is a plane, are not grey."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)[60:840]
    coloured = np.ptp(pixels, axis=2) > 40
    return np.array([part.sum() for part in np.array_split(coloured, 3, axis=1)])


def widest_slice(seg: bytes, segment: int) -> str:
    """The UID of the image in which a segment of a DICOM-SEG has most pixels."""
    stored = pydicom.dcmread(io.BytesIO(seg))
    areas = {}
    for frame, about in zip(stored.pixel_array, stored.PerFrameFunctionalGroupsSequence):
        if about.SegmentIdentificationSequence[0].ReferencedSegmentNumber == segment:
            source = about.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            areas[source] = frame.sum()
    return max(areas, key=lambda source: areas[source])


def test_a_study_from_the_list_to_the_next_one(server, archive, pictures):
    series = requests.get(f"{archive}/dicom-web/series", params={"Modality": "MR"}).json()
    study, image = (series[0][tag]["Value"][0] for tag in ("0020000D", "0020000E"))
    with reader(server.url, pictures) as ohif:
        assert len(ohif.list_studies()) == 3
        ohif.open(study, "monai-label")
        ohif.connect()
        before = colourful(ohif.picture("opened"))
        ohif.run()

        def masked(seen: bytes) -> bool:
            """In all three planes."""
            return bool((colourful(seen) > before + 200).all())

        assert masked(ohif.picture_when("mask", masked))
        ohif.run(uncertainty=True, uncertainty_series=True)
        assert masked(ohif.picture_when("mask_with_uncertainty", masked))

        seg = server.post(params={"num_members": 3, "uncertainty": True}, image=image, output="dicom_seg")
        assert seg.ok, seg.text
        assert requests.post(f"{archive}/instances", data=seg.content).ok
        assert server.info()["datastore"]["completed"] == 0  # what the model draws is nobody's label
        ohif.open(study, "segmentation")
        plain = colourful(ohif.picture("segmentation")).sum()
        names = ["anterior", "posterior", "anterior - unsure", "posterior - unsure"]
        assert ohif.load_segmentation(r"^MedSegDiff") == names
        wanted = {"SOPInstanceUID": widest_slice(seg.content, 1 + names.index("anterior - unsure"))}
        (slice_,) = requests.get(f"{archive}/dicom-web/instances", params={**wanted, "includefield": "00200013"}).json()
        ohif.scroll_to(slice_["00200013"]["Value"][0])
        seen = ohif.picture_when("dicom_seg", lambda seen: colourful(seen).sum() > plain + 1000)
        shown = colourful(seen).sum()
        assert shown > plain + 1000
        hide = partial(ohif.hide, "anterior - unsure")
        seen = ohif.picture_when("dicom_seg_without_unsure", lambda seen: colourful(seen).sum() < shown - 100, hide)
        assert plain + 1000 < colourful(seen).sum() < shown - 100  # the other segments stay
        drawn = requests.get(f"{archive}/dicom-web/series", params={"Modality": "OT"}).json()
        assert [one["0020000D"]["Value"] for one in drawn] == [[study]] and server.info()["datastore"]["total"] == 3
        ohif.open(study, "viewer")
        ohif.show_series("Uncertainty of")
        ohif.scroll_to(slice_["00200013"]["Value"][0])
        seen = ohif.picture_when("series_of_uncertainty", lambda seen: colourful(seen).sum() > 200)
        assert colourful(seen).sum() > 200
        assert ohif.foreign == [] and ohif.broken == []


def test_a_reader_stores_a_label_trains_and_goes_to_the_next_study(server, archive, pictures, tmp_path):
    """All of it in the viewer: the model's mask, taken over as the reader's own, is read back voxel by voxel."""
    series = requests.get(f"{archive}/dicom-web/series", params={"Modality": "MR"}).json()
    study, image = (series[1][tag]["Value"][0] for tag in ("0020000D", "0020000E"))
    before = server.info()["datastore"]["completed"]
    with reader(server.url, pictures) as ohif:
        ohif.open(study, "monai-label")
        ohif.connect()
        ohif.run(mask_series=True)
        assert server.info()["datastore"]["completed"] == before  # it is the model's, not the reader's
        ohif.open(study, "segmentation")
        assert ohif.load_segmentation(r"^MedSegDiff") == ["anterior", "posterior"]
        ohif.picture("before_export")
        ohif.export_segmentation("reader")
        assert server.info()["datastore"]["completed"] == before + 1
        label = requests.get(f"{server.url}/datastore/label", params={"label": image, "tag": "final"})
        label = nib.Nifti1Image.from_bytes(gunzip(label.content))
        mask = server.infer({"num_members": 3}, image=image)
        np.testing.assert_array_equal(np.asarray(label.dataobj), np.asarray(mask.dataobj))
        np.testing.assert_allclose(label.affine, mask.affine, atol=1e-4)

        ohif.open(study, "monai-label")
        ohif.connect()
        ohif.update_model(epochs=1)
        client = server.client()
        server.wait(lambda: client.train_status()["status"] not in ("SUBMITTED", "RUNNING"), TASK_SECONDS)
        assert client.train_status()["status"] == "DONE", server.log.read_text()[-3000:]
        offered = ohif.next_sample("first")
        assert offered != study and offered in {one["0020000D"]["Value"][0] for one in series}
        assert ohif.foreign == [] and ohif.broken == []


def test_labels_go_to_the_archive_and_come_back_for_training(server, archive, tmp_path):
    client = server.client()
    labelled = []
    while (studies := server.info()["datastore"])["completed"] < studies["total"] - 1:
        sample = client.next_sample("first", {})["id"]
        assert sample not in labelled  # the study that was just labelled is not offered again
        mask = server.infer({"num_members": 2}, image=sample)
        nib.save(mask, tmp_path / "label.nii.gz")
        client.save_label(sample, str(tmp_path / "label.nii.gz"), params={"label_info": []})
        labelled.append(sample)
    stored = requests.get(f"{archive}/dicom-web/series", params={"Modality": "SEG"}).json()
    assert len(stored) >= len(labelled) > 0
    copies = [file for file in server.folder.glob("dicom/*/labels/final/*.nii.gz") if file.name[:-7] in labelled]
    assert len(copies) == len(labelled)
    kept = {file.name: np.asarray(nib.load(file).dataobj) for file in copies}
    for file in copies:  # so that they are read from the archive
        file.unlink()
    client.train_start("medsegdiff", {**server.options("trainers"), "max_epochs": 1, "val_split": 0.5})
    server.wait(lambda: client.train_status()["status"] not in ("SUBMITTED", "RUNNING"), TASK_SECONDS)
    assert client.train_status()["status"] == "DONE", server.log.read_text()[-3000:]
    for file in copies:
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), kept[file.name])
    assert client.next_sample("first", {})["id"] not in labelled

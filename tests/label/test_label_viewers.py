"""What 3D Slicer and OHIF send, as their sources in MONAI Label's package have it: ``make test-label``."""

from __future__ import annotations

from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from .conftest import Server, requests, voxels

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own: make test-label")
import pydicom
import SimpleITK as sitk

from examples.label.serving.viewer import MENDED

from .dicom import Archive, dicomweb, write_series


def test_slicer_gets_a_sample_segments_it_and_submits_it(stock):
    """Its client, its file format, and its way to read it: the same mask as NIfTI, on the grid of the sample."""
    client, options = stock.client(), stock.options("models")
    sample = client.next_sample("first", {})
    file, result = client.infer(
        stock.model, sample["id"], {**options, "result_extension": ".nrrd", "result_dtype": "uint8"}
    )
    assert result["label_names"] == {"anterior": 1, "posterior": 2}
    mask, image = sitk.ReadImage(file), sitk.ReadImage(sample["path"])
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(mask, geometry)(), getattr(image, geometry)(), atol=1e-3)
    nifti = stock.infer(options, image=sample["id"])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T, voxels(nifti))

    label = stock.folder / "submitted.nii.gz"
    nib.save(nifti, label)
    client.save_label(sample["id"], str(label), params={"label_info": [{"name": "anterior", "idx": 1}]})
    assert client.next_sample("first", {}).get("id") != sample["id"]
    saved = requests.get(f"{stock.url}/datastore/label", params={"label": sample["id"], "tag": "final"}).content
    assert saved == label.read_bytes()


def test_slicer_uploads_a_volume_of_its_own_as_a_session(stock, study, tmp_path):
    """A volume that is not among the studies: its module sends it, asks for masks by the session, and ends it."""
    client, file = stock.client(), tmp_path / "volume.nii.gz"
    nib.save(study.slicer[:26], file)
    session = client.create_session(str(file))["session_id"]
    assert client.get_session(session)
    options = {**stock.options("models"), "result_extension": ".nrrd", "result_dtype": "uint8", "num_members": 1}
    masks = []
    for restore in (True, False):  # the model's values are the labels' already
        params = {**options, "restore_label_idx": restore}
        mask, result = client.infer(stock.model, str(file), params, session_id=session)
        assert result["label_names"] == {"anterior": 1, "posterior": 2}
        masks.append(sitk.GetArrayFromImage(sitk.ReadImage(mask)))
    np.testing.assert_array_equal(*masks)
    np.testing.assert_array_equal(masks[0].T, voxels(stock.infer({"num_members": 1}, file=file)))
    client.remove_session(session)
    assert stock.post(session_id=session).status_code >= 400


@pytest.fixture(scope="module")
def ohif(study, tmp_path_factory):
    """A server whose studies are one MR series in a DICOMweb archive; with the archive."""
    folder = tmp_path_factory.mktemp("ohif")
    files = write_series(study, folder / "series").iterdir()
    archive = Archive([file.read_bytes() for file in files])
    with dicomweb(archive) as address:
        server = Server(folder, "active_learning", studies=address)
        yield server, archive
        server.stop()


def test_ohif_is_served_and_reaches_the_archive(ohif):
    server, archive = ohif
    page = requests.get(f"{server.url}/ohif/")
    assert page.ok and "<html" in page.text
    found = requests.get(f"{server.url}/proxy/dicom/qido/studies", params={"Modality": "MR"}).json()
    assert [study["0020000E"]["Value"] for study in found] == [[archive.series()[0].SeriesInstanceUID]]


def test_ohif_gets_a_series_segments_it_and_submits_it(ohif, study, tmp_path):
    server, archive = ohif
    series = str(archive.series()[0].SeriesInstanceUID)
    sample = requests.post(f"{server.url}/activelearning/disagreement", json={}).json()
    assert sample["id"] == series
    params = {**server.options("models"), "restore_label_idx": False, "result_compress": False}
    params |= {"result_extension": ".nrrd", "result_dtype": "uint8"}
    answer = server.post(params=params, image=series)
    assert answer.ok, server.log.read_text()[-3000:]
    (tmp_path / "mask.nrrd").write_bytes(answer.content)
    mask = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "mask.nrrd"))
    nib.save(study, tmp_path / "study.nii.gz")
    expected = voxels(server.infer(server.options("models"), file=tmp_path / "study.nii.gz"))
    np.testing.assert_array_equal(mask, expected.T)
    answer = server.post(params={**params, "restore_label_idx": True}, image=series)
    (tmp_path / "restored.nrrd").write_bytes(answer.content)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "restored.nrrd")), mask)

    label = {"label": ("label.bin", mask.astype(np.uint8).tobytes())}
    answer = requests.put(f"{server.url}/datastore/label", params={"image": series}, data={"params": "{}"}, files=label)
    assert answer.ok, server.log.read_text()[-3000:]
    (stored,) = archive.series(Modality="SEG")
    assert stored.ReferencedSeriesSequence[0].SeriesInstanceUID == series and len(stored.SegmentSequence) == 2


def test_series_of_uncertainty_is_stored_beside_the_image_and_is_no_study(ohif, study, tmp_path):
    server, archive = ohif
    series = archive.series(Modality="MR")[0]
    answer = server.post(params={"uncertainty_series": True}, image=str(series.SeriesInstanceUID), output="json")
    assert answer.ok, answer.text
    (stored,) = archive.series(Modality="OT")
    assert answer.json()["uncertainty_series"] == stored.SeriesInstanceUID
    assert stored.StudyInstanceUID == series.StudyInstanceUID
    assert len(archive.find(Modality="OT")) == len(archive.find(SeriesInstanceUID=series.SeriesInstanceUID))
    assert server.info()["datastore"]["total"] == 1
    archive.refuses = True
    refused = server.post(params={"uncertainty_series": True}, image=str(series.SeriesInstanceUID))
    archive.refuses = False
    assert refused.status_code == 409 and "0xa700" in refused.json()["detail"]
    assert len(archive.series(Modality="OT")) == 1
    elsewhere = {"result_extension": ".dcm", "dicom_series": str(tmp_path)}  # no folder that a client names is read
    refused = server.post(params=elsewhere, image=str(series.SeriesInstanceUID))
    assert refused.status_code == 400 and "output=dicom_seg" in refused.json()["detail"]
    nib.save(study, tmp_path / "study.nii.gz")
    for wrong, status in (({"uncertainty_series": True}, 409), ({"uncertainty_series": "perhaps"}, 400)):
        refused = server.post(params=wrong, file=tmp_path / "study.nii.gz")
        assert refused.status_code == status and "uncertainty_series" in refused.json()["detail"]


def test_series_of_the_mask_is_stored_beside_the_image_and_is_no_label(ohif):
    server, archive = ohif
    series = archive.series(Modality="MR")[0]
    before = {one.SeriesInstanceUID for one in archive.series(Modality="SEG")}
    completed = server.info()["datastore"]["completed"]
    params = {"mask_series": True, "uncertainty": True, "num_members": 3}
    answer = server.post(params=params, image=str(series.SeriesInstanceUID), output="json")
    assert answer.ok, answer.text
    (stored,) = (one for one in archive.series(Modality="SEG") if one.SeriesInstanceUID not in before)
    assert answer.json()["mask_series"] == stored.SeriesInstanceUID
    assert stored.ReferencedSeriesSequence[0].SeriesInstanceUID == series.SeriesInstanceUID
    names = [item.SegmentLabel for item in stored.SegmentSequence]
    assert names == ["anterior", "posterior", "anterior - unsure", "posterior - unsure"]
    assert {item.SegmentAlgorithmType for item in stored.SegmentSequence} == {"AUTOMATIC"}
    assert server.info()["datastore"]["completed"] == completed


def test_viewer_is_served_without_its_faults(ohif):
    """Whether it then works is seen in the browser (tests/viewers)."""
    server, _ = ohif
    folder = Path(str(find_spec("monailabel").origin)).parent / "endpoints" / "static" / "ohif"
    scripts = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.js")}
    faulty = {name for name, script in scripts.items() if any(fault in script for fault in MENDED)}
    assert len(faulty) == 1  # another version of the viewer may need none of it
    for name in (*faulty, "app-config.js"):
        expected = scripts[name]
        for fault, right in MENDED.items():
            assert (fault in expected) == (name in faulty)
            expected = expected.replace(fault, right)
        served = requests.get(f"{server.url}/ohif/{name}")
        assert served.text == expected and "javascript" in served.headers["content-type"]
        assert "default-src 'self'" in served.headers["content-security-policy"]


@pytest.mark.parametrize("fault", ["a slice is missing", "slices of two directions"])
def test_series_that_is_no_volume_is_refused_and_not_offered(fault, ohif, study, tmp_path):
    server, archive = ohif
    before = list(archive.instances)
    turned = nib.Nifti1Image(voxels(study), study.affine @ np.diag([1, 1, 1, 1])[[0, 2, 1, 3]])
    files = [file.read_bytes() for file in sorted(write_series(study, tmp_path / "series").iterdir())]
    if fault == "a slice is missing":
        del files[10]
    else:
        others = [pydicom.dcmread(file) for file in sorted(write_series(turned, tmp_path / "turned").iterdir())[:3]]
        one = pydicom.dcmread(tmp_path / "series" / "000.dcm")
        for i, other in enumerate(others):
            other.SeriesInstanceUID, other.StudyInstanceUID = one.SeriesInstanceUID, one.StudyInstanceUID
            other.InstanceNumber = 100 + i
            other.save_as(tmp_path / f"{i}.dcm")
            files.append((tmp_path / f"{i}.dcm").read_bytes())
    archive.instances += files
    series = str(pydicom.dcmread(tmp_path / "series" / "000.dcm").SeriesInstanceUID)
    try:
        assert server.info()["datastore"]["total"] == 2
        offered = requests.post(f"{server.url}/activelearning/first", json={})  # passes it over
        assert offered.ok and offered.json().get("id") != series, offered.text
        refused = server.post(image=series)
        assert refused.status_code == 409 and series in refused.json()["detail"], refused.text
        assert "/tmp" not in refused.json()["detail"]
        assert server.info()["datastore"]["total"] == 1
    finally:
        archive.instances[:] = before


@pytest.mark.parametrize(
    "path",
    ["%2e%2e/system", "..%2fsystem", "%252e%252e/system", "tools/x", "studies/%2e%2e/%2e%2e/system", "studies/../x"],
)
def test_proxy_reaches_nothing_but_dicomweb(path, ohif):
    server, _ = ohif
    for method in ("GET", "POST"):
        connection = HTTPConnection(server.url.removeprefix("http://"))
        connection.request(method, f"/proxy/dicom/{path}")  # as it is: others resolve the dots themselves
        assert connection.getresponse().status == 404
    asked = requests.post(f"{server.url}/proxy/dicom/wado/series/1.2", data=b"")  # only studies can be stored
    assert asked.status_code == 404

"""What the app adds to MONAI Label, without a server: labels, formats, datastore, queue and guard."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ..conftest import ROOT

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own: make test-label")
import pydicom
import SimpleITK as sitk
from monailabel.datastore.utils.convert import dicom_to_nifti
from pydicom.sr.codedict import Code, codes

from examples.label.serving.datastores import Folder
from examples.label.serving.dicom_overlay import overlay_series
from examples.label.serving.dicom_seg import is_label, read_dicom_seg, write_dicom_seg
from examples.label.serving.endpoint import Turns
from examples.label.serving.inference import _check, unless_stopped
from examples.label.serving.labels import combine, model_values, read_submitted
from examples.label.serving.legend import Legend
from examples.label.serving.refusals import Busy, Conflict, NotThere, Stopped
from examples.label.serving.seg_nrrd import read_seg_nrrd, write_seg_nrrd
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.pictures import COLOURS

from .dicom import write_series


def oblique() -> nib.Nifti1Image:
    """A small image whose axes are perpendicular to each other, but not along the patient's."""
    axes, upper = np.linalg.qr(np.array([[1.1, -0.3, 0.1], [0.3, 0.9, -0.4], [0.0, 0.4, 1.9]]))
    affine = np.eye(4)
    affine[:3, :3] = axes * np.sign(np.diag(upper)) * (0.9, 1.2, 2.0)
    affine[:3, 3] = 5, -7, 3
    return nib.Nifti1Image(np.arange(9 * 11 * 7, dtype=np.int16).reshape(9, 11, 7), affine)


@pytest.fixture(scope="module")
def legend() -> Legend:
    return Legend(ROOT / "bundle")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """The folder of an oblique series, and its NIfTI copy as the server makes it."""
    folder = write_series(oblique(), tmp_path_factory.mktemp("dicom") / "series", "Müller")
    return folder, dicom_to_nifti(folder)


def drawn(image, *boxes):
    label = np.zeros(nib.load(image).shape, dtype=np.uint8)
    for value, box in boxes:
        label[box] = value
    return label


A, P = np.s_[1:4, 2:6, 1:3], np.s_[4:7, 2:6, 3:6]


def test_legend_is_the_bundles(legend):
    assert legend.values == {"anterior": 1, "posterior": 2}
    assert [one.colour for one in legend.classes] == [tuple(map(int, c)) for c in COLOURS[1:3]]
    everything = [*legend.in_label_maps, *legend.unsure]
    assert len({one.colour for one in legend.in_label_maps}) == 6 and len({one.name for one in everything}) == 8
    assert legend.find(" POSTERIOR ").value == 2 and legend.find("tumour") is None
    assert legend.series_number == 9000100 and legend.version in legend.series_description
    assert len(legend.series_description) <= 64


def test_declared_codes_reach_the_dicom_seg(legend, series, tmp_path):
    bundle = tmp_path / "bundle"
    (bundle / "configs").mkdir(parents=True)
    metadata = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text())
    kind = {"CodeValue": "T-1", "CodingSchemeDesignator": "99TEST", "CodeMeaning": "Hinterer Teil"}
    metadata["segment_codes"] = {"posterior": {"SegmentedPropertyTypeCodeSequence": kind}}
    (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata))
    folder, image = series
    label = drawn(image, (1, A), (2, P))
    declared = Legend(bundle)
    write_dicom_seg(tmp_path / "l.dcm", [(label, declared.classes)], nib.load(image).affine, folder, declared, False)
    kinds = [s.SegmentedPropertyTypeCodeSequence[0] for s in pydicom.dcmread(tmp_path / "l.dcm").SegmentSequence]
    assert [(k.CodeValue, k.CodingSchemeDesignator) for k in kinds] == [("1", "99MEDSEGDIFF"), ("T-1", "99TEST")]
    assert kinds[1].CodeMeaning == "Hinterer Teil"


def test_shipped_classes_have_codes_of_snomed(legend, series, tmp_path):
    folder, image = series
    label = drawn(image, (1, A), (2, P))
    write_dicom_seg(tmp_path / "l.dcm", [(label, legend.classes)], nib.load(image).affine, folder, legend, False)
    kinds = [s.SegmentedPropertyTypeCodeSequence[0] for s in pydicom.dcmread(tmp_path / "l.dcm").SegmentSequence]
    for kind, modifier in zip(kinds, (codes.SCT.Anterior, codes.SCT.Posterior), strict=True):
        assert Code(kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == codes.SCT.Hippocampus
        (found,) = kind.SegmentedPropertyTypeModifierCodeSequence
        assert Code(found.CodeValue, found.CodingSchemeDesignator, found.CodeMeaning) == modifier


CODE = {"CodeValue": "1", "CodingSchemeDesignator": "99TEST", "CodeMeaning": "one"}
TYPE = "SegmentedPropertyTypeCodeSequence"


@pytest.mark.parametrize(
    ("declared", "word"),
    [
        ([], "an object of coded terms"),
        ({"anterior": None}, "an object of coded terms"),
        ({"anteror": {TYPE: CODE}}, "'anteror', which is no class"),
        ({"anterior": {"TypeCode": CODE}}, "'TypeCode': take"),
        ({"anterior": {TYPE: [CODE]}}, "must have CodeValue"),
        ({"anterior": {TYPE: {"CodeValue": "1"}}}, "must have CodeValue"),
        ({"anterior": {TYPE: {**CODE, "CodeValue": ""}}}, "CodeValue=''"),
        ({"anterior": {TYPE: {**CODE, "CodingSchemeDesignator": "é"}}}, "CodingSchemeDesignator='é'"),
    ],
)
def test_codes_that_are_none_are_refused_at_the_start(declared, word, tmp_path):
    (tmp_path / "configs").mkdir()
    metadata = json.loads((ROOT / "bundle" / "configs" / "metadata.json").read_text())
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps({**metadata, "segment_codes": declared}))
    with pytest.raises(InputError, match=re.escape(word)) as caught:
        Legend(tmp_path)
    assert "metadata.json" in str(caught.value)


def test_slices_without_names_and_numbers_get_a_series_that_archives_take(legend, series, tmp_path):
    folder, image = series
    for file in folder.iterdir():
        source = pydicom.dcmread(file)
        del source.PatientName, source.StudyDate, source.InstanceNumber
        source.save_as(tmp_path / file.name)
    values = nib.load(image).get_fdata()
    made = overlay_series(values, np.zeros(values.shape, np.float32), nib.load(image).affine, tmp_path, legend)
    assert {str(one.PatientName) for one in made} == {""} and {one.StudyDate for one in made} == {""}
    assert sorted(one.InstanceNumber for one in made) == list(range(1, len(made) + 1))


def test_series_of_uncertainty_lies_on_its_series_and_is_no_study(legend, series, tmp_path):
    """Each pixel has the colour of the voxel at its place: grey where all is sure, no grey where nothing is."""
    folder, image = series
    values = nib.load(image).get_fdata()
    entropy = np.zeros(values.shape, dtype=np.float32)
    entropy[A] = 1
    made = overlay_series(values, entropy, nib.load(image).affine, folder, legend)
    sources = {str(s.SOPInstanceUID): s for s in map(pydicom.dcmread, folder.iterdir())}
    assert len(made) == len(sources) == values.shape[2]
    to_lps = np.diag([-1, -1, 1, 1]) @ nib.load(image).affine
    unsure = np.zeros(values.shape, dtype=bool)
    for one in made:
        buffer = BytesIO()
        one.save_as(buffer, write_like_original=False)
        stored = pydicom.dcmread(BytesIO(buffer.getvalue()))
        source = sources[stored.SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert stored.Modality == "OT" and stored.StudyInstanceUID == source.StudyInstanceUID
        assert str(stored.PatientName) == "Müller" and legend.version in stored.SeriesDescription
        pixels, shown = stored.pixel_array.astype(int), source.pixel_array.astype(int)
        sure = np.ptp(pixels, axis=2) == 0
        order = np.argsort(shown[sure])
        assert (np.diff(pixels[sure][order, 0]) >= 0).all()  # the image
        along_row, along_column = np.reshape(stored.ImageOrientationPatient, (2, 3))
        corner, spacing = np.array(stored.ImagePositionPatient), stored.PixelSpacing
        for row, column in np.argwhere(~sure):
            place = corner + column * spacing[1] * along_row + row * spacing[0] * along_column
            unsure[tuple(np.linalg.solve(to_lps, [*place, 1])[:3].round().astype(int))] = True
    np.testing.assert_array_equal(unsure, entropy == 1)
    assert len({one.SeriesInstanceUID for one in made}) == 1 and len({one.SOPInstanceUID for one in made}) == len(made)
    with pytest.raises(Conflict, match="all slices"):
        overlay_series(values[:-1], entropy[:-1], nib.load(image).affine, folder, legend)


@pytest.mark.parametrize("boxes", [[(2, P)], [(1, A)], [(1, A), (2, P)]])
def test_dicom_seg_names_segments_by_value_and_comes_back_the_same(boxes, legend, series, tmp_path):
    """A label with posterior alone is posterior, whatever MONAI Label's converter makes of its position."""
    folder, image = series
    label, file = drawn(image, *boxes), tmp_path / "label.dcm"
    write_dicom_seg(file, [(label, legend.classes)], nib.load(image).affine, folder, legend, automatic=False)
    stored = pydicom.dcmread(file)
    names = {one.value: one.name for one in legend.classes}
    assert [item.SegmentLabel for item in stored.SegmentSequence] == [names[value] for value, _ in boxes]
    assert len({tuple(item.RecommendedDisplayCIELabValue) for item in stored.SegmentSequence}) == len(boxes)
    assert legend.model in stored.SeriesDescription and stored.SeriesNumber == legend.series_number
    assert str(stored.PatientName) == "Müller"
    assert is_label(stored, legend)
    np.testing.assert_array_equal(read_dicom_seg(file, image, legend), label)


def test_dicom_seg_with_uncertainty_says_what_the_mask_is(legend, series, tmp_path):
    folder, image = series
    mask, unsure = drawn(image, (1, A), (2, P)), drawn(image, (1, np.s_[3:5, 2:6, 2:4]))
    layers = [(mask, legend.classes), (unsure, legend.unsure[:1]), (0 * unsure, legend.unsure[1:])]
    write_dicom_seg(tmp_path / "u.dcm", layers, nib.load(image).affine, folder, legend, automatic=True)
    stored = pydicom.dcmread(tmp_path / "u.dcm")
    assert [item.SegmentLabel for item in stored.SegmentSequence] == ["anterior", "posterior", "anterior - unsure"]
    assert not is_label(stored, legend)  # nobody has looked at it
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "u.dcm", image, legend), mask)
    with pytest.raises(Conflict, match="empty"):
        write_dicom_seg(tmp_path / "e.dcm", [(0 * mask, legend.classes)], nib.load(image).affine, folder, legend, True)


def test_dicom_seg_of_another_place_or_class_is_refused(legend, series, tmp_path):
    folder, image = series
    label, file = drawn(image, (2, P)), tmp_path / "label.dcm"
    write_dicom_seg(file, [(label, legend.classes)], nib.load(image).affine, folder, legend, automatic=False)
    moved = sitk.ReadImage(image)
    moved.SetOrigin([x + 8 for x in moved.GetOrigin()])
    sitk.WriteImage(moved, str(tmp_path / "moved.nii.gz"))
    with pytest.raises(Conflict, match="posterior"):
        read_dicom_seg(file, tmp_path / "moved.nii.gz", legend)
    stored = pydicom.dcmread(file)
    stored.SegmentSequence[0].SegmentLabel = "tumour"
    stored.save_as(file)
    assert not is_label(stored, legend)
    with pytest.raises(InputError, match="tumour"):
        read_dicom_seg(file, image, legend)


def test_dicom_seg_on_a_finer_grid_is_resampled(legend, series, tmp_path):
    folder, image = series
    label = drawn(image, (1, A), (2, P))
    write_dicom_seg(tmp_path / "l.dcm", [(label, legend.classes)], nib.load(image).affine, folder, legend, False)
    coarse = sitk.ReadImage(image)
    origin = coarse.TransformContinuousIndexToPhysicalPoint([-0.25] * 3)
    size, step = [2 * n for n in coarse.GetSize()], [s / 2 for s in coarse.GetSpacing()]
    fine = sitk.Resample(coarse, size, sitk.Transform(), sitk.sitkNearestNeighbor, origin, step, coarse.GetDirection())
    sitk.WriteImage(fine, str(tmp_path / "fine.nii.gz"))
    expected = label.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "l.dcm", tmp_path / "fine.nii.gz", legend), expected)


SLICER = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]


@pytest.mark.parametrize(
    ("values", "label_info", "expected"),
    [
        ([0, 2], [], [0, 2]),
        ([0, 2], SLICER, [0, 2]),
        ([0, 1], [{"name": "Posterior", "idx": 1}], [0, 2]),  # the only segment is the first one of the file
        ([0, 2], [{"name": "posterior", "idx": 2}], [0, 2]),
        ([1, 2], SLICER[::-1], [1, 2]),
        ([1, 2], [{"name": "anterior", "idx": 2}, {"name": "posterior", "idx": 3}], [1, 2]),  # a scribble came first
        ([1, 2], [{"name": "posterior"}, {"name": "anterior"}], [2, 1]),
        ([3, 5, 1], [], [1, 0, 1]),  # marked as unsure: inside counts as the class, outside does not
    ],
)
def test_values_are_named_by_label_info(values, label_info, expected, legend):
    np.testing.assert_array_equal(model_values(np.array(values), label_info, legend), expected)


@pytest.mark.parametrize(
    ("values", "label_info", "word"),
    [
        ([0, 9], [], "9"),
        ([0, 1], [{"name": "tumour", "idx": 1}], "tumour"),
        ([0, 3], SLICER, "idx"),
        ([0, 0.5], [], "whole"),
        ([0, 2], [{"name": "anterior", "idx": 2}, {"name": "posterior", "idx": 3}], "two ways"),
    ],
)
def test_values_that_nothing_names_are_refused(values, label_info, word, legend):
    with pytest.raises(InputError, match=word):
        model_values(np.array(values), label_info, legend)


def test_seg_nrrd_has_names_colours_and_place(legend, tmp_path):
    image = oblique()
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[A], mask[P] = 1, 2
    unsure = np.zeros_like(mask)
    unsure[3:5] = 1
    for layers in ([(mask, legend.classes)], [(mask, legend.classes), (unsure, legend.unsure[:1])]):
        file = tmp_path / f"{len(layers)}.seg.nrrd"
        write_seg_nrrd(file, layers, image.affine)
        segments, affine = read_seg_nrrd(file)
        assert [name for name, _ in segments] == ["anterior", "posterior", "anterior - unsure"][: len(layers) + 1]
        np.testing.assert_allclose(affine, image.affine, atol=1e-6)
        np.testing.assert_array_equal(combine(segments, legend), mask)
        assert f"Segment1_Color:={77 / 255:.6f}".encode() in file.read_bytes()[:4000]
        read = sitk.ReadImage(str(file))
        np.testing.assert_allclose(read.GetOrigin(), image.affine[:3, 3] * (-1, -1, 1), atol=1e-5)
    with pytest.raises(InputError, match="overlap"):
        combine([("anterior", mask > 0), ("posterior", mask > 0)], legend)


def test_uncertain_map_keeps_the_mask(legend):
    votes = np.random.default_rng(0).random((5, 2, 6, 7, 8)) > 0.5
    votes[:, 1] &= ~votes[:, 0]
    mask = np.where(votes[:, 0].mean(0) > 0.5, 1, np.where(votes[:, 1].mean(0) > 0.5, 2, 0)).astype(np.uint8)
    marked = legend.uncertain_map(mask, votes)
    assert set(np.unique(marked)) > {3, 4, 5, 6}
    np.testing.assert_array_equal(model_values(marked, [], legend), mask)
    np.testing.assert_array_equal(legend.uncertain_map(mask, np.stack([mask == 1, mask == 2])[None]), mask)


@pytest.fixture
def studies(tmp_path, legend):
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("a", "b"):
        nib.save(oblique(), folder / f"{name}.nii.gz")
    return folder, Folder(legend, str(folder), extensions=["*.nii.gz", "*.nrrd"], auto_reload=True)


def label_file(folder: Path, values: np.ndarray, affine: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(values.astype(np.uint8), affine), folder / "submitted.nii.gz")
    return str(folder / "submitted.nii.gz")


def test_label_is_kept_with_the_models_values_or_refused(studies, tmp_path):
    _, store = studies
    image = oblique()
    values = np.zeros(image.shape)
    values[P] = 1
    file = label_file(tmp_path, values, image.affine)
    store.save_label("a", file, "final", {"label_info": [{"name": "posterior", "idx": 1}]})
    np.testing.assert_array_equal(nib.load(store.get_label_uri("a", "final")).get_fdata(), 2 * values)
    assert store.get_unlabeled_images() == ["b"]
    store.save_label("a", file, "final", {})
    assert Path(store.get_label_uri("a", "final")).read_bytes() == Path(file).read_bytes()
    turned = nib.Nifti1Image(values, image.affine).as_reoriented(np.array([[0, -1], [1, 1], [2, -1]]))
    store.save_label("b", label_file(tmp_path, turned.get_fdata(), turned.affine), "final", {})
    np.testing.assert_array_equal(nib.load(store.get_label_uri("b", "final")).get_fdata(), values)
    with pytest.raises(Conflict, match="grid"):
        store.save_label("a", label_file(tmp_path, values[1:], image.affine), "final", {})
    with pytest.raises(NotThere, match="nobody"):
        store.save_label("nobody", file, "final", {})


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "/tmp/out"])
def test_names_that_lead_out_of_the_folder_are_refused(name, studies, tmp_path):
    folder, store = studies
    with pytest.raises(InputError, match="no name"):
        store.add_image(name, str(folder / "a.nii.gz"), {})
    label = label_file(tmp_path, np.zeros(oblique().shape), oblique().affine)
    with pytest.raises(InputError, match="no name"):
        store.save_label("a", label, name, {})


def test_datastore_is_whole_whenever_it_is_killed_and_shared_by_processes(studies, tmp_path, legend, monkeypatch):
    folder, store = studies
    image = oblique()
    other = Folder(legend, str(folder), extensions=["*.nii.gz"])  # such as the process that scores
    store.update_image_info("a", {"mine": 1})
    other.update_image_info("b", {"theirs": 2})
    store.update_image_info("a", {"more": 3})
    listed = json.loads((folder / "datastore_v2.json").read_text())["objects"]
    assert listed["a"]["image"]["info"]["mine"] == 1 and listed["b"]["image"]["info"]["theirs"] == 2
    before = (folder / "datastore_v2.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save_label("a", label_file(tmp_path, np.zeros(image.shape), image.affine), "final", {})
    assert (folder / "datastore_v2.json").read_bytes() == before
    assert not list((folder / "labels" / "final").glob("*.nii.gz"))
    assert Folder(legend, str(folder), extensions=["*.nii.gz"]).get_labeled_images() == []


def test_study_that_is_moved_in_is_seen_at_once(studies, tmp_path):
    folder, store = studies
    shutil.copy(folder / "a.nii.gz", tmp_path / "new.nii.gz")
    (tmp_path / "new.nii.gz").rename(folder / "new.nii.gz")
    for _ in range(50):
        if "new" in store.list_images():
            break
        threading.Event().wait(0.1)
    assert "new" in store.list_images()


def test_submitted_seg_nrrd_is_read_by_its_names(legend, tmp_path):
    image = oblique()
    nib.save(image, tmp_path / "image.nii.gz")
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[P] = 2
    write_seg_nrrd(tmp_path / "label.seg.nrrd", [(mask, legend.classes)], image.affine)
    label, affine, as_it_is = read_submitted(tmp_path / "label.seg.nrrd", tmp_path / "image.nii.gz", [], legend)
    np.testing.assert_array_equal(label, mask)
    assert not as_it_is and np.allclose(affine, image.affine, atol=1e-4)


def test_turns_are_taken_one_by_one_up_to_a_number():
    async def scenario():
        turns, running, most, done = Turns(3), [], [], []

        def work():
            running.append(1)
            most.append(len(running))
            threading.Event().wait(0.05)
            running.pop()
            done.append(1)

        async def stays():
            return False

        tasks = [asyncio.create_task(turns.run(work, stays)) for _ in range(4)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results].count(Busy) == 1 and max(most) == 1 and len(done) == 3
        await turns.run(work, stays)  # places are given back

    asyncio.run(scenario())


def test_work_stops_when_the_client_has_gone_and_is_not_begun_when_it_waited():
    async def scenario():
        turns, begun, passes = Turns(), [], []

        def work():
            begun.append(1)
            for _ in range(200):
                _check()
                passes.append(1)
                threading.Event().wait(0.05)

        async def left():
            return True

        tasks = [asyncio.create_task(turns.run(work, left)) for _ in range(2)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, Stopped) for result in results)
        assert len(begun) == 1 and len(passes) < 100

    asyncio.run(scenario())
    with unless_stopped(threading.Event()):
        _check()

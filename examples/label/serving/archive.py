"""A DICOMweb archive of studies: asked anew each time, its labels brought onto their images."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore
from monailabel.datastore.utils.convert import binary_to_image, dicom_to_nifti
from monailabel.datastore.utils.dicom import dicom_web_download_series
from pydicom import dcmread
from pydicom.dataset import Dataset

from medsegdiff_monai.data.dicom import check_series
from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.files import remove_leftovers, replacing
from medsegdiff_monai.nifti import nifti_bytes

from .datastores import FINAL, Folder
from .dicom_seg import is_label, read_dicom_seg, write_dicom_seg
from .labels import read_submitted
from .legend import Legend
from .refusals import Conflict, NotThere

__all__ = ["Archive", "dicom_series"]

MADE_OF = "SeriesInstanceUID"  # in the info of a label: the series in the archive that it was read from


def dicom_series(image: str) -> str:
    """Return the folder of a study's DICOM files.

    Args:
        image: that folder, or the NIfTI copy beside it.

    Raises:
        Conflict: where there is none.
    """
    folder = Path(image) if Path(image).is_dir() else Path(image.removesuffix(".nii.gz"))
    if not folder.is_dir():
        raise Conflict("DICOM needs a DICOM series, and this image is none: take output=image, or an archive.")
    return str(folder)


def _check_stored(answer: Dataset, number: int) -> None:
    """See that an archive has taken what was sent: it may refuse files in an answer that is none of an error.

    Raises:
        Conflict: where it has not.
    """
    failed = answer.get("FailedSOPSequence") or []
    if failed or len(answer.get("ReferencedSOPSequence") or []) < number:
        reasons = sorted({hex(int(one.get("FailureReason") or 0)) for one in failed}) or ["it gave no reason"]
        raise Conflict(f"the archive has not stored the series ({', '.join(reasons)}): see its log.")


def _files(series: Dataset) -> int:
    """How many files an archive says that a series has; 0 where it does not."""
    return int(series.get("NumberOfSeriesRelatedInstances") or 0)


class Archive(Folder, DICOMWebDatastore):
    """A DICOMweb archive, with copies of its series in a folder.

    MONAI Label's own asks the archive for its series every two hours, names segments by their position, and takes
    labels back cropped to what is marked, with the values that another program counted. A label here is a DICOM-SEG
    that has a class of the model among its segments, and was not drawn by the model alone; of several the last one.

    Args:
        legend: of the model.
        **kwargs: as for MONAI Label's datastore.
    """

    def __init__(self, legend: Legend, **kwargs: Any) -> None:
        self.legend = legend
        self._threads = threading.RLock()
        self._downloads = threading.RLock()
        self._seen: dict[str, Dataset] = {}  # header of each DICOM-SEG; what a series holds does not change
        self._no_volumes: dict[str, int] = {}  # series that are none, such as localizers, with their number of files
        DICOMWebDatastore.__init__(self, **kwargs)
        remove_leftovers(self._datastore_path)
        self._handler.on_moved = self._on_move

    def _series(self, **wanted: str) -> list[Dataset]:
        found = self._client.search_for_series(search_filters=wanted)
        return [Dataset.from_json(one) for one in found]

    def list_images(self) -> list[str]:
        """The series that are offered, as the archive has them now, without those that turned out to be no volumes."""
        own = self.legend.map_description
        found = [one for one in self._series(**self._search_filter) if str(one.get("SeriesDescription", "")) != own]
        return [
            str(one.SeriesInstanceUID) for one in found if self._no_volumes.get(one.SeriesInstanceUID) != _files(one)
        ]

    def labels(self) -> dict[str, Dataset]:
        """The header of the last label of each series, as the archive has them now."""
        images, found = set(self.list_images()), {}
        for header in sorted(map(self._header, self._series(Modality="SEG")), key=self._when):
            referenced = header.get("ReferencedSeriesSequence")
            if referenced and is_label(header, self.legend):
                found[str(referenced[0].SeriesInstanceUID)] = header
        return {image: header for image, header in found.items() if image in images}

    def _header(self, series: Dataset) -> Dataset:
        name = str(series.SeriesInstanceUID)
        if name not in self._seen:
            metadata = self._client.retrieve_series_metadata(str(series.StudyInstanceUID), name)
            self._seen[name] = Dataset.from_json(metadata[0])
        return self._seen[name]

    @staticmethod
    def _when(header: Dataset) -> tuple[str, ...]:
        keys = ("ContentDate", "ContentTime", "SeriesInstanceUID")
        return tuple(str(header.get(key) or "") for key in keys)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """The series that have a label."""
        return list(self.labels())

    def known(self, image_id: str) -> str:
        """Return the name of a series that is there.

        Raises:
            NotThere: otherwise.
        """
        if not any(one.SeriesInstanceUID == image_id for one in self._series(SeriesInstanceUID=image_id)):
            raise NotThere(f"series {image_id!r} is not in the archive {self.name()}.")
        return image_id

    def get_image_uri(self, image_id: str) -> str:
        """Return the NIfTI copy of a series, fetched anew where the archive has more of it by now.

        Raises:
            NotThere: where there is no such series.
            Conflict: where its slices make no volume: they have several directions, or some are missing.
        """
        place = Path(self._datastore.image_path())
        folder, nifti = place / image_id, place / f"{image_id}.nii.gz"
        with self._downloads:
            found = [one for one in self._series(SeriesInstanceUID=image_id) if one.SeriesInstanceUID == image_id]
            if not found:
                self.known(image_id)
            wanted = _files(found[0])
            here = len(list(folder.glob("*.dcm"))) if folder.is_dir() else 0
            if not (nifti.is_file() and here and wanted in (0, here)):
                try:
                    self._fetch(image_id, folder)
                    self._no_volumes.pop(image_id, None)
                except InputError as error:
                    self._no_volumes[image_id] = wanted
                    raise Conflict(f"series {image_id}: {error} It is not offered any more.") from error
        return str(nifti.resolve())

    def _fetch(self, series: str, folder: Path) -> None:
        with TemporaryDirectory(dir=folder.parent, prefix=".fetch") as unfinished:
            dicom_web_download_series(None, series, f"{unfinished}/series", self._client, self._fetch_by_frame)
            try:
                check_series(Path(unfinished, "series"))
            except InputError as error:
                raise InputError(str(error).replace(f"{unfinished}/series", "it")) from error
            file = dicom_to_nifti(f"{unfinished}/series")
            try:
                shutil.rmtree(folder, ignore_errors=True)
                Path(unfinished, "series").rename(folder)
                with replacing(folder.with_name(f"{series}.nii.gz")) as copy:
                    shutil.copy(file, copy)
            finally:
                Path(file).unlink(missing_ok=True)
        self._enter(series)

    def _enter(self, series: str) -> None:
        """Put a series that was fetched into the list."""
        with self._changing():
            old = self._datastore.objects.get(series)
            info = {**(old.image.info if old else {}), **self._dicom_info(series), "name": f"{series}.nii.gz"}
            labels = old.labels if old else {}
            self._datastore.objects[series] = ImageLabelModel(image=DataModel(info=info, ext=".nii.gz"), labels=labels)
            self._update_datastore_file()

    def save_label(  # type: ignore[override]
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Keep a label; a final one goes to the archive as DICOM-SEG.

        Args:
            image_id: series.
            label_filename: label map, ``.seg.nrrd``, or ``.bin``: bytes in the order of the series' voxels.
            label_tag: ``final`` for a label to train on.
            label_info: ``label_info`` in it names the values, see :func:`.labels.model_values`.
            label_id: not used.

        Raises:
            NotThere: where there is no such series.
            InputError: see :func:`.labels.read_submitted`.
        """
        image = self.get_image_uri(image_id)
        converted = self._from_bytes(image, label_filename) if label_filename.endswith(".bin") else ""
        try:
            entries = label_info.get("label_info") or []
            label, affine, _ = read_submitted(converted or label_filename, image, entries, self.legend)
        finally:
            if converted:
                Path(converted).unlink(missing_ok=True)
        info = {**label_info, **self._upload(image_id, label, affine)} if label_tag == FINAL else dict(label_info)
        self._keep(image_id, nifti_bytes(label[None], affine, label.ndim), ".nii.gz", label_tag, info)
        return image_id

    @staticmethod
    def _from_bytes(image: str, label: str) -> str:
        try:
            return str(binary_to_image(image, label))
        except ValueError as error:
            raise Conflict(f"label: has another number of voxels than its series ({error}).") from error

    def _upload(self, image_id: str, label: np.ndarray, affine: np.ndarray) -> dict[str, str]:
        """Store a label in the archive; what to keep of it."""
        with TemporaryDirectory() as folder:
            file = Path(folder, "label.dcm")
            series = Path(self._datastore.image_path(), image_id)
            write_dicom_seg(file, [(label, self.legend.classes)], affine, series, self.legend, automatic=False)
            stored = dcmread(file)
            _check_stored(self._client.store_instances([stored]), 1)
            return {MADE_OF: str(stored.SeriesInstanceUID), "Modality": "SEG"}

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Refuse to add a study.

        Raises:
            Conflict: always.
        """
        raise Conflict("studies are in the archive: store the DICOM files there.")

    def add_series(self, instances: list[Dataset]) -> str:
        """Store a series in the archive; its name."""
        _check_stored(self._client.store_instances(instances), len(instances))
        return str(instances[0].SeriesInstanceUID)

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """Return the label of a series as NIfTI on its grid, as the archive has it now; empty where there is none."""
        if label_tag == FINAL:
            header = self.labels().get(label_id)
            if header is None:
                return ""
            self._bring(label_id, header)
        return LocalDatastore.get_label_uri(self, label_id, label_tag)

    def _bring(self, image_id: str, header: Dataset) -> None:
        """Read a label from the archive, unless it is here already."""
        image, series = self.get_image_uri(image_id), str(header.SeriesInstanceUID)
        known = self.get_label_info(image_id, FINAL).get(MADE_OF) == series
        if known and Path(LocalDatastore.get_label_uri(self, image_id, FINAL)).is_file():
            return
        with TemporaryDirectory() as folder:
            dicom_web_download_series(str(header.StudyInstanceUID), series, folder, self._client, False)
            (file,) = Path(folder).glob("*.dcm")
            label = read_dicom_seg(file, image, self.legend)
        affine = np.asarray(load_image(image).affine, dtype=np.float64)
        self._keep(image_id, nifti_bytes(label[None], affine, label.ndim), ".nii.gz", FINAL, self._dicom_info(series))

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label that is not in the archive, from which nothing is ever removed here."""
        if label_tag == FINAL and label_id in self.labels():
            raise Conflict(f"the label of {label_id} is a DICOM-SEG in the archive: delete that series there.")
        super().remove_label(label_id, label_tag)

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Image and label of each series that has one.

        Raises:
            Conflict: naming all labels in the archive that cannot be used.
        """
        faults, found = [], []
        for image_id, header in self.labels().items():
            try:
                self._bring(image_id, header)
            except InputError as fault:
                faults.append(f"{header.SeriesInstanceUID}: {fault}")
                continue
            found.append(
                {"image": self.get_image_uri(image_id), "label": LocalDatastore.get_label_uri(self, image_id, FINAL)}
            )
        if faults:
            raise Conflict("labels in the archive cannot be used: " + "; ".join(faults))
        return found

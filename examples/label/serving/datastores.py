"""Studies in a folder, or in a DICOMweb archive: complete whenever the server stops, and never out of date."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore
from monailabel.datastore.utils.convert import binary_to_image, dicom_to_nifti
from monailabel.datastore.utils.dicom import dicom_web_download_series
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom import dcmread
from pydicom.dataset import Dataset

from medsegdiff_monai.data.dicom import check_series
from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.files import remove_leftovers, replacing, write_atomically
from medsegdiff_monai.nifti import nifti_bytes

from .dicom_seg import is_label, read_dicom_seg, write_dicom_seg
from .labels import read_submitted
from .legend import Legend
from .refusals import Conflict, NotThere

__all__ = ["Archive", "Folder", "dicom_series"]

FINAL = str(DefaultLabelTag.FINAL.value)
MADE_OF = "SeriesInstanceUID"  # in the info of a label: the series in the archive that it was read from


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.^+ -]+", name) or set(name) <= {"."}:
        raise InputError(f"{name!r} is no name for a study or a tag: take letters, digits, and any of . _ ^ + -")


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


class Folder(LocalDatastore):
    """A folder of studies.

    MONAI Label's own writes its list and the labels where they stand: a server that is killed meanwhile leaves half of
    them. It lets two processes (the server, and its tasks) overwrite each other's entries, does not see files that are
    moved into the folder, and takes whatever values a label has.

    Args:
        legend: of the model.
        *args: as for MONAI Label's datastore.
        **kwargs: the same.
    """

    def __init__(self, legend: Legend, *args: Any, **kwargs: Any) -> None:
        self.legend = legend
        self._threads = threading.RLock()
        super().__init__(*args, **kwargs)
        remove_leftovers(self._datastore_path)
        if hasattr(self, "_handler"):
            self._handler.on_moved = self._on_move

    @property
    def _processes(self) -> FileLock:
        if "_file_lock" not in self.__dict__:
            self._file_lock = FileLock(str(Path(self._datastore_path, ".changes.lock")), thread_local=False)
        return self._file_lock

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Nobody else changes the list of studies, and what others changed is known."""
        with self._threads, self._processes:
            self._init_from_datastore_file()
            yield

    def _on_move(self, event: Any) -> None:
        if event.dest_path == self._datastore_config_path:
            self._init_from_datastore_file()
        elif not Path(event.src_path).name.startswith("."):
            self.refresh()

    def _update_datastore_file(self, lock: bool = True) -> None:
        content = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        write_atomically(self._datastore_config_path, content.encode())
        self._config_ts = os.stat(self._datastore_config_path).st_mtime

    def _reconcile_datastore(self) -> None:
        with self._changing():
            super()._reconcile_datastore()

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add a study.

        Raises:
            InputError: for a name that leads out of the folder, or a file that is no image.
            Conflict: for the name of a study that is there.
        """
        _check_name(image_id or Path(image_filename).name)
        try:
            load_image(image_filename)
        except InputError as error:
            raise InputError(str(error).replace(str(image_filename), image_id)) from error
        with self._changing():
            if image_id in self._datastore.objects:
                raise Conflict(f"study {image_id!r} is there already: take another name, or delete it first.")
            return super().add_image(image_id, image_filename, image_info)

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known of a study."""
        with self._changing():
            super().update_image_info(image_id, info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add to what is known of a label."""
        with self._changing():
            super().update_label_info(label_id, label_tag, info)

    def remove_image(self, image_id: str) -> None:
        """Remove a study with its labels."""
        with self._changing():
            super().remove_image(image_id)
            self.refresh()

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label."""
        if not self.get_label_uri(label_id, label_tag):
            raise NotThere(f"study {label_id!r} has no label {label_tag!r}.")
        with self._changing():
            super().remove_label(label_id, label_tag)
            self.refresh()

    def list_images(self) -> list[str]:
        """Names of all studies."""
        return list(self._datastore.objects)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Names of the studies that have a label."""
        return [name for name, one in list(self._datastore.objects.items()) if one.labels.get(FINAL)]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Names of the studies that have none."""
        labelled = set(self.get_labeled_images())
        return [name for name in self.list_images() if name not in labelled]

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """A zip of the studies that have a label."""
        if not self.get_labeled_images():
            raise Conflict("no study has a label yet, so there is nothing to download.")
        return super().get_dataset_archive(limit_cases)

    def known(self, image_id: str) -> str:
        """Return the name of a study that is there.

        Raises:
            NotThere: otherwise.
        """
        if not self._datastore.objects.get(image_id):
            raise NotThere(f"study {image_id!r} is not there: GET /datastore/ lists the studies.")
        return image_id

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Keep a label, with the model's values, on the grid of its study.

        Args:
            image_id: study.
            label_filename: label map, or ``.seg.nrrd``.
            label_tag: ``final`` for a label to train on.
            label_info: ``label_info`` in it names the values, see :func:`.labels.model_values`.

        Raises:
            NotThere: where there is no such study.
            InputError: see :func:`.labels.read_submitted`.
        """
        image = self.get_image_uri(self.known(image_id))
        entries = label_info.get("label_info") or []
        label, affine, as_it_is = read_submitted(label_filename, image, entries, self.legend)
        if as_it_is:
            self._keep(
                image_id, Path(label_filename).read_bytes(), self._to_id(label_filename)[1], label_tag, label_info
            )
        else:
            self._keep(image_id, nifti_bytes(label[None], affine, label.ndim), ".nii.gz", label_tag, label_info)
        return image_id

    def _keep(self, image_id: str, content: bytes, ext: str, tag: str, info: dict[str, Any]) -> None:
        """Put a label into its place, whole or not at all; then into the list."""
        _check_name(tag)
        with self._changing():
            old, new = (
                LocalDatastore.get_label_uri(self, image_id, tag),
                Path(self._datastore.label_path(tag), f"{image_id}{ext}"),
            )
            write_atomically(new, content)
            study = self._datastore.objects[self.known(image_id)]
            study.labels[tag] = DataModel(info={**info, "ts": int(new.stat().st_mtime), "name": new.name}, ext=ext)
            self._update_datastore_file()
            if old and Path(old) != new.resolve():
                Path(old).unlink(missing_ok=True)


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

"""Studies in a folder: complete whenever the server stops, and never out of date."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.local import DataModel, LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag

from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.files import remove_leftovers, write_atomically
from medsegdiff_monai.nifti import nifti_bytes

from .labels import read_submitted
from .legend import Legend
from .refusals import Conflict, NotThere

__all__ = ["FINAL", "Folder"]

FINAL = str(DefaultLabelTag.FINAL.value)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.^+ -]+", name) or set(name) <= {"."}:
        raise InputError(f"{name!r} is no name for a study or a tag: take letters, digits, and any of . _ ^ + -")


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

"""MONAI Label's task for bundles, with the grade of each case, where the members disagree, and a way to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
from monailabel.tasks.infer.bundle import BundleInferTask

from medsegdiff_monai.cases import CaseResult, named_regions
from medsegdiff_monai.data.rules import image_faults
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.grading import measure, reasons_to_look

from .dicom_overlay import overlay_series
from .dicom_seg import write_dicom_seg
from .legend import Legend, Segment
from .refusals import Conflict, Stopped
from .seg_nrrd import write_seg_nrrd

__all__ = ["SERIES", "GradedInferTask", "grade_of", "storing", "unless_stopped", "wants"]

SERIES = ("mask_series", "uncertainty_series")  # options that store a series in the archive of the study

AT_A_TIME = 16  # members, after which it is looked whether to go on
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)
_store: ContextVar[Callable[[list[pydicom.Dataset]], str] | None] = ContextVar("store", default=None)


@contextmanager
def storing(store: Callable[[list[pydicom.Dataset]], str]) -> Iterator[None]:
    """Series that are made in this context go to ``store``, which returns their name."""
    token = _store.set(store)
    try:
        yield
    finally:
        _store.reset(token)


@contextmanager
def unless_stopped(stop: threading.Event) -> Iterator[None]:
    """What is computed in this context ends with ``Stopped`` soon after ``stop`` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def _check(*_: object) -> None:
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise Stopped


def grade_of(case: CaseResult) -> dict[str, Any]:
    """Say how far a case can be trusted, for JSON.

    Returns:
        ``expected_dice`` of each class, ``flag`` (reasons to look at it, empty if there are none), ``out_of_domain``
        (those among them that say that the training has seen nothing like it), and ``disagreement``, 1 minus the mean
        Dice between pairs of members.
    """
    one = case.case
    facts = measure(case.image, one.spacing, one.mask)
    at_home = reasons_to_look(one.names, case.grade, one.mask, facts, one.unit)
    expected = (round(dice, 4) for dice in case.grade.expected.tolist())
    return {
        "expected_dice": dict(zip(one.names, expected)),
        "flag": "; ".join(case.reasons),
        "out_of_domain": "; ".join(reason for reason in case.reasons if reason not in at_home),
        "disagreement": round(1 - float(case.agreement.mean()), 6),
    }


class GradedInferTask(BundleInferTask):
    """Segment with a bundle.

    MONAI Label's task keeps the options of a request in itself: one request at a time. The option ``uncertainty`` marks
    where the members disagree: with ``.seg.nrrd`` and DICOM-SEG as further segments that overlap the mask, in a single
    label map, as viewers ask for, by values of their own (:meth:`.legend.Legend.uncertain_map`). With the options
    ``mask_series`` and ``uncertainty_series`` there are also the DICOM-SEG, and pictures of the map of uncertainty
    (:func:`.dicom_overlay.overlay_series`), to be stored beside the image.

    Args:
        path: folder of the bundle.
        conf: of the app.
        legend: of the bundle.
        **kwargs: as for MONAI Label's task.
    """

    def __init__(self, path: str, conf: dict[str, str], legend: Legend, **kwargs: Any) -> None:
        self.legend = legend
        self._one_at_a_time = threading.Lock()
        super().__init__(path, conf, load_strict=True, **kwargs)
        self._config["model_filename"].sort(key="model.pt".__ne__)  # viewers take the first one
        self.labels = {one.name: one.value for one in legend.in_label_maps}
        self._config |= {"uncertainty": False} | dict.fromkeys(SERIES, False)

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> tuple[Any, dict[str, Any]]:
        """Segment an image.

        Raises:
            InputError: for options that are out of range, or weights that are not there.
            Stopped: where nobody waits for the result any more.
        """
        with self._one_at_a_time:
            _check()
            self._check_weights(request.get("model_filename"))
            result = super().__call__(request, callbacks)
        if not self.skip_writer:
            result[1]["label_names"] = result[1].pop("segments")
        return result

    def _check_weights(self, asked: Any) -> None:
        """MONAI Label takes others where these are not there, and goes on without any where there are none."""
        there = sorted(file.name for file in Path(self.bundle_path, "models").glob("*.[pt][ts]"))  # .pt, .ts
        if not there:
            raise Conflict("the bundle has no weights: put them into its models, and start the server again.")
        for name in asked if isinstance(asked, list) else [asked]:
            if name and name not in there:
                raise Conflict(f"model_filename={name!r}: is not in the bundle's models: take {', '.join(there)}.")

    def inferer(self, data: Any = None) -> Any:
        """The bundle's inferer, which looks after each pass of the network whether to go on."""
        inferer = super().inferer(data)
        inferer.progress = _check
        inferer.member_batch_size = min(inferer.member_batch_size, AT_A_TIME)
        return inferer

    def pre_transforms(self, data: Any = None) -> Any:
        """The bundle's, with a look at the image once it is read."""
        read, shaped, *rest = super().pre_transforms(data)
        return [read, shaped, self._check_image, *rest]

    def _check_image(self, data: dict[str, Any]) -> dict[str, Any]:
        faults = image_faults(
            data["image"], Path(data["image_path"]).name, self.bundle_config.get_parsed_content("data_spec")
        )
        if faults:
            raise InputError("; ".join(faults))
        return data

    def _get_network(self, device: str, data: Any) -> Any:
        try:
            network = super()._get_network(device, data)
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            raise InputError(
                f"model_filename={data.get('model_filename')!r}: these weights are not of this bundle's network: "
                "choose model.pt."
            ) from error
        self._record = getattr(network, "record", None)
        return network

    def case(self, data: Mapping[str, Any]) -> CaseResult:
        """The case that was segmented, as the package has it."""
        spec = self.bundle_config.get_parsed_content("data_spec")
        own = {one.name: [one.value] for one in self.legend.classes}
        regions = named_regions(spec.num_classes, spec.regions or (own if len(own) == spec.num_classes else None), None)
        return CaseResult({"image": data["image"]}, data, regions, self._record)

    def writer(self, data: dict[str, Any], extension: Any = None, dtype: Any = None) -> tuple[Any, Any]:
        """Write the mask in the format that was asked for; its grade goes into the answer."""
        _check()
        case, unsure = self.case(data), wants(data, "uncertainty")
        votes = np.asarray(case.case.member_masks.cpu())
        if unsure and len(votes) < 2:
            raise InputError("uncertainty: one member has nobody to disagree with: set num_members to at least 2.")
        segments = self.legend.in_label_maps if unsure else self.legend.classes
        data["result"] = {
            "grade": grade_of(case), "model_version": self.legend.version,
            "segments": {one.name: one.value for one in segments},
        }  # fmt: skip
        mask, folder = np.asarray(data["pred"].cpu()).astype(np.uint8), data.get("dicom_series")
        store = _store.get()
        if store is not None and wants(data, "uncertainty_series"):
            entropy = np.asarray(data["uncertainty_entropy"].cpu())[0]
            drawn = overlay_series(case.image[0], entropy, case.affine, folder, self.legend)
            data["result"]["uncertainty_series"] = store(drawn)

        def dicom_seg(file: str) -> None:
            layers = self._layers(mask, votes, unsure)
            write_dicom_seg(file, layers, case.affine, folder, self.legend, automatic=True)

        if store is not None and wants(data, "mask_series"):
            with TemporaryDirectory() as scratch:
                dicom_seg(f"{scratch}/mask.dcm")
                data["result"]["mask_series"] = store([pydicom.dcmread(f"{scratch}/mask.dcm")])
        ext = str(extension or data.get("result_extension") or "").lower()
        if ext == ".seg.nrrd":
            return _temporary(
                ext, lambda file: write_seg_nrrd(file, self._layers(mask, votes, unsure), case.affine)
            ), data["result"]
        if ext == ".dcm":
            if not folder:
                raise InputError("result_extension='.dcm': ask for output=dicom_seg instead.")
            return _temporary(ext, dicom_seg), data["result"]
        if unsure:
            data["pred"] = self.legend.uncertain_map(mask, votes)
        return super().writer(data, extension, dtype)

    def _layers(self, mask: np.ndarray, votes: np.ndarray, unsure: bool) -> list[tuple[np.ndarray, list[Segment]]]:
        layers = [(mask, self.legend.classes)]
        if unsure:
            split = votes.any(0) & ~votes.all(0)
            layers += [(voxels.astype(np.uint8), [one]) for voxels, one in zip(split, self.legend.unsure)]
        return layers


def wants(request: Mapping[str, Any], option: str) -> bool:
    """Whether an option that viewers send as a boolean or as text is set."""
    value = str(request.get(option)).lower()
    if value not in ("true", "false", "none", ""):
        raise InputError(f"{option}={request[option]!r} must be true or false.")
    return value == "true"


def _temporary(ext: str, write: Callable[[str], None]) -> str:
    with NamedTemporaryFile(suffix=ext, delete=False) as file:
        try:
            write(file.name)
        except BaseException:
            Path(file.name).unlink()
            raise
    return file.name

"""MONAI Label's ``monaibundle`` app as a reading room needs it: graded cases, labels that are what they are called.

The stock app serves any bundle, but knows two strategies only, random and first, and makes them in its own
``init_strategies``: no option of it reaches further. Its scoring by dropout suits no network without dropout. An app of
one's own that extends another is MONAI Label's way for both; the stock app is imported as it is. What else is put
right is in ``examples/label/serving``, each part with the fault that it is there for.
"""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.epistemic import Epistemic
from monailabel.tasks.scoring.epistemic_v2 import EpistemicScoring

from examples.label.serving.archive import Archive, dicom_series
from examples.label.serving.datastores import Folder
from examples.label.serving.inference import SERIES, GradedInferTask, grade_of, storing, wants
from examples.label.serving.legend import Legend
from examples.label.serving.refusals import Conflict, NotThere
from medsegdiff_monai.errors import InputError, find_input_error

logger = logging.getLogger(__name__)

STOCK_APP = Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle" / "main.py"


def _stock_app() -> Any:
    """The class of MONAI Label's ``monaibundle`` app."""
    spec: Any = spec_from_file_location("monaibundle", STOCK_APP)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MyApp


class EnsembleDisagreement(EpistemicScoring):
    """Score each unlabelled study by how far the members of the ensemble disagree about it, and grade it.

    The score is 1 minus the mean Dice over pairs of members and over classes: 0 where all draw the same mask, whatever
    the size of the volume. MONAI Label decides which studies are due: those scored with these weights are skipped.
    """

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score what is due, one study at a time."""
        return super().__call__({**request, "max_workers": 1}, datastore)

    def run_scoring(self, image_id: str, simulation_size: int, model_ts: int, datastore: Datastore) -> None:
        """Score one study with ``simulation_size`` members; the log names one that cannot be read."""
        try:
            request = {"image": datastore.get_image_uri(image_id), "num_members": simulation_size, "logging": "error"}
            _, results = self.infer_task(request=request)
        except Exception as error:
            found = find_input_error(error)
            if found is None:
                raise
            logger.warning(f"Not scored: {image_id}: {found}")
            return
        disagreement = 1 - float(results["pairwise_dice"].mean())
        grade = grade_of(self.infer_task.case(results))
        info = {self.key_output_entropy: disagreement, self.key_output_ts: model_ts, "grade": grade}
        datastore.update_image_info(image_id, info)


class WorstFirst(Strategy):
    """Offer the unlabelled study with the worst grade: outside the training's range first, then flagged, then by Dice.

    Studies that have not been graded come last.
    """

    def __init__(self) -> None:
        super().__init__("The study with the worst grade: out of the model's domain, flagged, least expected Dice")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return the name of the study, and its grade."""
        studies = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        grades = {name: datastore.get_image_info(name).get("grade") for name in studies}
        if not studies:
            return None
        worst = min(studies, key=lambda name: (self._order(grades[name]), name))
        return {"id": worst, "grade": grades[worst]}

    @staticmethod
    def _order(grade: dict[str, Any] | None) -> tuple[int, int, float]:
        if grade is None:
            return 1, 0, 0.0
        rank = 0 if grade["out_of_domain"] else 1 if grade["flag"] else 2
        return 0, rank, min(grade["expected_dice"].values())


class MedSegDiffApp(_stock_app(), MONAILabelApp):  # type: ignore[misc]
    """The stock app for one bundle.

    MONAI Label looks for a class whose own bases include ``MONAILabelApp``, hence the second one.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        bundles = sorted(Path(app_dir, "model").glob("*/configs/metadata.json"))
        names = [name.strip() for name in conf.get("models", "").split(",")]
        served = [file.parents[1] for file in bundles if names == ["all"] or file.parents[1].name in names]
        if len(served) != 1:
            raise InputError(
                f"models={conf.get('models')}: this app serves one bundle; {app_dir}/model has {len(bundles)}."
            )
        self.legend = Legend(served[0])
        super().__init__(app_dir, studies, conf)
        self.labels = [one.name for one in self.legend.classes]

    def init_datastore(self) -> Datastore:
        """A folder, or an archive, of studies."""
        if not self.studies.startswith(("http://", "https://")):
            return Folder(
                self.legend,
                self.studies,
                extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
                auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
                read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
            )
        return super().init_datastore()

    def _init_dicomweb_datastore(self) -> Datastore:
        """The archive, with what MONAI Label makes of its settings."""
        stock = super()._init_dicomweb_datastore()
        stock._observer.stop()
        return Archive(
            self.legend, client=stock._client, search_filter=stock._search_filter,
            cache_path=settings.MONAI_LABEL_DICOMWEB_CACHE_PATH or None, fetch_by_frame=stock._fetch_by_frame,
        )  # fmt: skip

    def init_infers(self) -> dict[str, InferTask]:
        """Inference with the bundle."""
        return {name: GradedInferTask(path, self.conf, self.legend) for name, path in self.models.items()}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Score with the bundle."""
        methods = super().init_scoring_methods()
        for name, path in self.models.items():
            method = EnsembleDisagreement(GradedInferTask(path, self.conf, self.legend, skip_writer=True))
            method.description = f"1 - mean Dice between the ensemble's members of {name}"
            methods["disagreement"] = method
        return methods

    def init_strategies(self) -> dict[str, Strategy]:
        """Offer the study about which the ensemble disagrees most, or the one with the worst grade."""
        disagreement = Epistemic(desc="The study the ensemble disagrees about most")
        return {**super().init_strategies(), "disagreement": disagreement, "worst_first": WorstFirst()}

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment an image; the grade of a study is kept with it, and series that are asked for in its archive.

        Raises:
            InputError: for what cannot be done.
        """
        if request.get("model") not in self._infers:
            raise NotThere(f"model {request.get('model')!r} is not there: take {', '.join(self._infers)}.")
        store, study = datastore or self.datastore(), not Path(request["image"]).is_absolute()
        beside = [option for option in SERIES if wants(request, option)]
        if beside:
            if not (study and isinstance(store, Archive)):
                raise Conflict(f"{beside[0]}: goes into a DICOM archive, and this image is in none: leave it out.")
            request["dicom_series"] = dicom_series(store.get_image_uri(request["image"]))
        try:
            with storing(store.add_series) if beside else nullcontext():
                result = super().infer(request, datastore)
        except Exception as error:
            found = find_input_error(error)
            if found is None:
                raise
            raise found from error
        if study:
            store.update_image_info(request["image"], {"grade": result["params"]["grade"]})
        return result

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment many studies, without those that are no volumes, which the log names."""
        store = datastore or self.datastore()
        for name in store.list_images():
            try:
                store.get_image_uri(name)
            except Conflict as error:
                logger.warning(f"Left out: {error}")
        several = torch.cuda.device_count() > 1 and request.get("multi_gpu", True)
        return super().batch_infer({**request, "multi_gpu": several}, datastore)

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Offer a study; those that turn out to be no volumes are passed over."""
        for _ in self.datastore().list_images():
            try:
                return super().next_sample(request)
            except Conflict as error:
                logger.warning(f"Not offered: {error}")
        return {}

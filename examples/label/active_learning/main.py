"""MONAI Label's ``monaibundle`` app with one scoring method and one strategy more.

The stock app serves any bundle, but knows two strategies only, random and first, and makes them in its own
``init_strategies``: no option of it reaches further. Its scoring by dropout suits no network without dropout. An app of
one's own that extends another is MONAI Label's way for both; the stock app is imported as it is.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.epistemic import Epistemic
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.scoring.epistemic_v2 import EpistemicScoring

STOCK_APP = Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle" / "main.py"


def _stock_app() -> Any:
    """The class of MONAI Label's ``monaibundle`` app."""
    spec: Any = spec_from_file_location("monaibundle", STOCK_APP)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MyApp


class EnsembleDisagreement(EpistemicScoring):
    """Score each unlabelled study by how far the members of the ensemble disagree about it.

    The score is 1 minus the mean Dice over pairs of members and over classes: 0 where all draw the same mask, whatever
    the size of the volume. MONAI Label decides which studies are due: those scored with these weights are skipped.
    """

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score what is due, one study at a time: MONAI Label's bundle task keeps a request's options in itself."""
        return super().__call__({**request, "max_workers": 1}, datastore)

    def run_scoring(self, image_id: str, simulation_size: int, model_ts: int, datastore: Datastore) -> None:
        """Score one study with ``simulation_size`` members."""
        request = {"image": datastore.get_image_uri(image_id), "num_members": simulation_size, "logging": "error"}
        _, results = self.infer_task(request=request)
        disagreement = 1 - float(results["pairwise_dice"].mean())
        datastore.update_image_info(image_id, {self.key_output_entropy: disagreement, self.key_output_ts: model_ts})


class MedSegDiffApp(_stock_app(), MONAILabelApp):  # type: ignore[misc]
    """The stock app with ``disagreement`` as scoring method and as strategy.

    MONAI Label looks for a class whose own bases include ``MONAILabelApp``, hence the second one.
    """

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Score by each of the bundles that are served."""
        methods = super().init_scoring_methods()
        for name, path in self.models.items():
            task = BundleInferTask(path, self.conf, skip_writer=True)
            method = EnsembleDisagreement(task)
            method.description = f"1 - mean Dice between the ensemble's members of {name}"
            methods["disagreement" if len(self.models) == 1 else f"disagreement_{name}"] = method
        return methods

    def init_strategies(self) -> dict[str, Strategy]:
        """Offer the study about which the ensemble disagrees most."""
        return {
            **super().init_strategies(),
            "disagreement": Epistemic(desc="The study the ensemble disagrees about most"),
        }

"""The bundle from Python: load it once, segment as many images as you like, train, evaluate."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser, run
from monai.data import MetaTensor
from PIL import Image
from torch import Tensor

from .cases import CaseResult, named_regions
from .configs import read_config, to_be_set
from .data.inference import CaseDataset
from .data.names import case_names
from .data.rules import image_faults
from .deep_ensemble import load_checkpoints
from .errors import InputError
from .files import lock_folder, unlock_folder
from .journal import CaseJournal
from .networks import TrainingRecord
from .outputs import OUTPUTS
from .results import CaseWriter
from .settings import find_bundle_root
from .variables import VARIABLES

__all__ = ["MedSegDiff", "Segmentation"]


class Segmentation:
    """A segmented image, on its own grid.

    Args:
        result: the case.

    Attributes:
        mask: label map (*spatial), as ``_seg`` is written.
        probability: calibrated, of each class, (classes, *spatial), in [0, 1].
        uncertainty: entropy of the probability, (*spatial), bits.
        members: label map of each member, (members, *spatial).
        expected_dice: the Dice to expect of each class, by name.
        flag: why a person should look at it, empty if there is no reason.
        affine: (4, 4), voxel to millimetres, RAS+.
    """

    def __init__(self, result: CaseResult) -> None:
        self._result = result
        output = result.output
        self.mask = np.asarray(output["pred"][0].cpu())
        self.probability = np.asarray(output["prob"].cpu())
        self.uncertainty = np.asarray(output["uncertainty_entropy"][0].cpu())
        self.members = result.member_maps()
        self.expected_dice: dict[str, float] = dict(zip(result.case.names, result.grade.expected.tolist()))
        self.flag = "; ".join(result.reasons)
        self.affine = result.affine

    def save(self, folder: str | Path, outputs: Sequence[str] = OUTPUTS) -> Path:
        """Write what the command ``segment`` writes: files of the case, tables and report.

        Args:
            folder: to write to; cases that are there stay.
            outputs: see :func:`medsegdiff_monai.outputs.check_outputs`.

        Returns:
            The folder of this case.

        Raises:
            InputError: where it cannot be written.
        """
        regions = self._result.regions
        named = dict(zip(regions.names, regions.values))
        writer = CaseWriter(str(folder), len(named), named, merge=True, outputs=outputs, record=self._result.record)
        lock_folder(folder)
        try:
            writer.open()
            writer.write(self._result, 0.0)
            writer.close()
        finally:
            unlock_folder(folder)
        return Path(folder) / self._result.name

    def show(self) -> Image.Image:
        """Return a picture of image, mask, uncertainty and members side by side, which notebooks display."""
        return Image.open(io.BytesIO(self._result.picture(self._result.name)))


class MedSegDiff:
    """A bundle's segmenter: preprocessing, network with its weights, members, and what is made of them.

    Args:
        parser: the bundle's ``inference.json`` under its overlays, checked.
        files: these files.
        bundle_root: the bundle's folder.
        override: config variables that were set.
    """

    def __init__(
        self, parser: ConfigParser, files: Sequence[str], bundle_root: str, override: Mapping[str, Any]
    ) -> None:
        self.parser, self._files, self.bundle_root, self._override = parser, list(files), bundle_root, dict(override)
        self.device = torch.device(parser.get_parsed_content("device"))
        self.network: Any = parser.get_parsed_content("network").eval()
        checkpoint = parser.get_parsed_content("checkpoint")
        load_checkpoints(checkpoint, self.network)
        names = ("preprocessing", "inferer", "postprocessing", "data_spec")
        self.preprocessing, self.inferer, self.postprocessing, self.spec = map(parser.get_parsed_content, names)
        self.record: TrainingRecord | None = getattr(self.network, "record", None)
        self.regions = named_regions(self.spec.num_classes, self.spec.regions, self.record)

    @classmethod
    def from_bundle(cls, bundle: str | Path | None = None, *overlays: str | Path, **override: Any) -> MedSegDiff:
        """Load a bundle.

        Args:
            bundle: its folder; by default the one in the working directory, else the one that is installed.
            *overlays: configs to put over ``inference.json``, such as the one a training was given.
            **override: config variables, such as ``num_members=16`` or ``checkpoint="model.pt"``; a list of weights
                shares the members among them.

        Raises:
            InputError: for a bundle or overlay that is not there, variables that do not fit, or unfit weights.
        """
        root = str(bundle or find_bundle_root())
        files = [f"{root}/configs/inference.json", *map(str, overlays)]
        parser = read_config(files, **to_be_set({"bundle_root": root, **override}))
        return cls(parser, files, root, override)

    def segment(self, image: str | Path | np.ndarray | Tensor, affine: np.ndarray | None = None) -> Segmentation:
        """Segment an image, as the command ``segment`` does.

        Args:
            image: a file, the folder of a DICOM series, or an array (channels, *spatial); the axis of the channels may
                be missing where there is one. Arrays are in the axis order of NIfTI: x, y, z.
            affine: (4, 4) of an array, voxel to millimetres, RAS+; by default voxels of 1 mm.

        Raises:
            InputError: for an image that cannot be read, or does not fit the network.
        """
        item = self._read(image) if isinstance(image, (str, Path)) else self._take(image, affine)
        with torch.no_grad():
            pred = self.inferer(item["image"][None].to(self.device), self.network)[0]
        output = self.postprocessing({**item, "pred": pred})
        return Segmentation(CaseResult(item, output, self.regions, self.record))

    def _read(self, path: str | Path) -> dict[str, Any]:
        path = str(Path(path).resolve())
        return CaseDataset([{"image": path, "case": case_names([path])[0]}], self.preprocessing, self.spec)[0]

    def _take(self, array: np.ndarray | Tensor, affine: np.ndarray | None) -> dict[str, Any]:
        values = torch.as_tensor(np.asarray(array), dtype=torch.float32)
        dims = self.spec.spatial_dims
        if values.ndim not in (dims, dims + 1):
            raise InputError(
                f"array of shape {list(values.shape)}: must have {dims} axes, or the channels before them."
            )
        values = values[None] if values.ndim == dims else values
        image = MetaTensor(values, affine=torch.as_tensor(np.eye(4) if affine is None else affine, dtype=torch.float64))
        image.meta["filename_or_obj"] = "array.nii.gz"
        faults = image_faults(image, "array", self.spec)
        if faults:
            raise InputError("\n  ".join(faults))
        return {**self.preprocessing({"image": image.clone(), "case": "array"}, start=2), "source": image}

    def train(self, dataset_dir: str | Path, output_dir: str | Path, **override: Any) -> MedSegDiff:
        """Train on a data set in Decathlon layout, as ``monai.bundle run training`` does.

        Args:
            dataset_dir: folder that holds ``dataset.json``.
            output_dir: folder for curves, pictures and report; the weights go to ``models`` in it.
            **override: config variables, such as ``max_epochs=20``.

        Returns:
            The bundle with the weights of the best validation.

        Raises:
            InputError: for bad data or variables, before anything is done.
        """
        models = f"{output_dir}/models"
        self._run("train", "training", dataset_dir, output_dir, ckpt_dir=models, **override)
        known = {name: value for name, value in {**self._override, **override}.items() if _has("inference", name)}
        known["checkpoint"] = f"{models}/model.pt"
        return MedSegDiff.from_bundle(self.bundle_root, *self._files[1:], **known)

    def evaluate(self, dataset_dir: str | Path, output_dir: str | Path, **override: Any) -> list[dict[str, Any]]:
        """Segment and score the cases of a data set in Decathlon layout, as ``monai.bundle run evaluating`` does.

        Args:
            dataset_dir: folder that holds ``dataset.json``.
            output_dir: folder for masks, tables and report.
            **override: config variables, such as ``eval_split="test"``.

        Returns:
            The rows of ``cases.csv``.

        Raises:
            InputError: for bad data or variables, before anything is done.
        """
        checkpoint = {"checkpoint": self.parser.get_parsed_content("checkpoint")}
        self._run("evaluate", "evaluating", dataset_dir, output_dir, **{**checkpoint, **override})
        return [entry["row"] for entry in CaseJournal(output_dir).entries.values()]

    def _run(self, config: str, what: str, dataset_dir: str | Path, output_dir: str | Path, **override: Any) -> None:
        files = [f"{self.bundle_root}/configs/{config}.json", *self._files[1:]]
        folders = {"bundle_root": self.bundle_root, "dataset_dir": str(dataset_dir), "output_dir": str(output_dir)}
        known = {name: value for name, value in self._override.items() if _has(config, name)}
        run(run_id=what, config_file=files, **to_be_set({**known, **folders, **override}))


def _has(config: str, name: str) -> bool:
    return name in VARIABLES and config in VARIABLES[name].configs

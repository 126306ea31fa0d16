"""Results of segmented cases: NIfTI files in the input's geometry, a picture, and a row in a table."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.metrics import compute_dice, compute_iou
from monai.transforms import EnsureChannelFirst, LoadImage
from torch import Tensor

from .data.datalist import case_names
from .distributed import gather, is_main
from .files import write_atomically
from .fusion import most_different
from .inferers import ANTITHETIC
from .metrics import RATER_SCORES, expected_calibration_error, rater_scores
from .outputs import OUTPUTS, check_outputs, result_file
from .pictures import overlay_bytes, palette_png_bytes
from .transforms import Regions

__all__ = ["CaseWriter", "distinct_members", "nifti_bytes", "raters_of", "read_source"]

logger = logging.getLogger(__name__)

SCORES = ("dice", "iou", "ece", *RATER_SCORES)


def read_source(item: Mapping[str, Any]) -> tuple[str, MetaTensor, np.ndarray]:
    """Read the image of a case anew, in its own grid, as results are.

    Args:
        item: a case that was segmented, ``image`` being a ``MetaTensor`` of any grid.

    Returns:
        The file, the image (channels, *spatial), and its affine (4, 4), voxel to millimetres, RAS+.
    """
    source = str(item["image"].meta["filename_or_obj"])
    image: Any = EnsureChannelFirst()(LoadImage(image_only=True)(source))
    return source, image, np.asarray(to_affine_nd(3, image.affine), dtype=np.float64)  # ITK's is 3 x 3 in 2D


def raters_of(item: Mapping[str, Any], output: Mapping[str, Any]) -> Tensor | None:
    """The masks of a case's raters, boolean (raters, classes, *spatial); None where the data have none.

    Args:
        item: the case; what transforms added to it stays here.
        output: what was made of it.
    """
    raters = {**item, **output}.get("raters")
    return torch.as_tensor(np.asarray(raters.cpu())) > 0 if isinstance(raters, Tensor) else None


def distinct_members(output: Mapping[str, Tensor], regions: Regions) -> dict[str, np.ndarray]:
    """Label maps (1, *spatial) of the members to show, up to three that differ most; none of a single one.

    Args:
        output: what :class:`medsegdiff_monai.transforms.FuseMembersd` returns.
        regions: what the channels of the masks are.
    """
    masks = output["member_masks"]
    chosen = {f"member {i + 1} of {len(masks)}": masks[i] for i in most_different(masks)}
    return {name: np.asarray(regions.label_map(mask).cpu()) for name, mask in chosen.items()}


def nifti_bytes(array: np.ndarray, affine: np.ndarray, spatial_dims: int, squeeze: bool = True) -> bytes:
    """Return a gzipped NIfTI file.

    Args:
        array: (channels, *spatial); channels are the fourth axis of the file.
        affine: (4, 4), voxel to millimetres, RAS+.
        spatial_dims: 2 or 3.
        squeeze: whether a single channel is written without that axis.
    """
    if squeeze and array.shape[0] == 1:
        array = array[0]
    else:
        array = np.moveaxis(array, 0, -1)
        array = array[:, :, None] if spatial_dims == 2 else array
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=5, mtime=0)


class CaseWriter:
    """Write the results of each case as soon as it is segmented.

    In ``<output_dir>/<case>/``, as ``outputs`` names them: ``seg`` is ``<case>_seg.nii.gz`` (``_seg.png`` too where the
    input was PNG, JPEG or BMP), ``prob`` ``_prob.nii.gz``, ``uncertainty`` ``_uncertainty_entropy.nii.gz`` and
    ``_uncertainty_mi.nii.gz``, ``members`` ``_members.nii.gz`` (a label map of each along the fourth axis) and
    ``overlay`` ``_overlay.png``. A row in ``<output_dir>/cases.csv`` has size of each class and its standard deviation
    over the members, mean uncertainty, mean Dice over pairs of members, seconds; Dice, IoU and expected calibration
    error where there is a label; and :func:`medsegdiff_monai.metrics.rater_scores` where there are several raters, to
    whose mean the calibration is then compared. Of several processes each writes the files of its cases; the first one
    writes the table, its own rows at once, all in the end.

    Args:
        output_dir: folder to write to.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
        merge: whether the rows of cases that an earlier run has written are kept.
        outputs: what is written, see :func:`medsegdiff_monai.outputs.check_outputs`.

    Raises:
        InputError: for ``outputs`` that there are not, or without ``seg``.
    """

    def __init__(
        self,
        output_dir: str,
        num_classes: int,
        regions: Mapping[str, Sequence[int]] | None = None,
        merge: bool = False,
        outputs: Sequence[str] | str = OUTPUTS,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.regions = Regions(num_classes, regions)
        self.merge = merge
        self.outputs = check_outputs(outputs)
        self.rows: dict[str, dict[str, Any]] = {}
        self._columns: list[str] = []  # of the table as it stands
        self._began = 0.0
        self._fresh: list[dict[str, Any]] = []  # rows of this run

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self._resume)
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, self._summarise)

    def _resume(self, engine: Engine) -> None:
        """Keep the rows of cases that an earlier run has finished."""
        table = self.output_dir / "cases.csv"
        if self.merge and table.is_file():
            with table.open(newline="", encoding="utf-8") as file:
                self.rows = {row["case"]: row for row in csv.DictReader(file)}

    def _begin(self, engine: Engine) -> None:
        self._began = time.perf_counter()

    def _write(self, engine: Engine) -> None:
        state: Any = engine.state  # lists of items, after MONAI's decollation
        seconds = (time.perf_counter() - self._began) / len(state.output)
        for item, output in zip(state.batch, state.output):
            self._write_case(item, output, seconds)

    def _summarise(self, engine: Engine) -> None:
        """Log mean and standard deviation of the scores over the cases of this run."""
        self._fresh = gather(self._fresh)
        if not is_main():
            return
        if len(self._fresh) > len(self.rows):  # other processes have some
            self.rows = {row["case"]: row for row in self._fresh}
            self._write_table(list(dict.fromkeys(key for row in self._fresh for key in row)))
        for key in dict.fromkeys(k for row in self._fresh for k in row if k.startswith(SCORES)):
            values = np.array([row[key] for row in self._fresh if np.isfinite(row.get(key, np.nan))])
            if len(values):
                logger.info(f"{key}: {values.mean():.4f} (std {values.std():.4f}, {len(values)} cases)")
        logger.info(f"Results of {len(self._fresh)} cases are in {self.output_dir}")

    def _write_case(self, item: Mapping[str, Any], output: Mapping[str, Tensor], seconds: float) -> None:
        source, image, affine = read_source(item)
        case = item.get("case") or case_names([source])[0]
        label = output["label"] if isinstance(output.get("label"), Tensor) else None
        row = {"case": case, "source": source, **self._sizes(output, affine), "seconds": round(seconds, 3)}
        for name in ("uncertainty_entropy", "uncertainty_mi"):
            row[f"mean_{name}"] = round(float(output[name].mean()), 6)
        row["members"] = members = len(output["member_sizes"])
        if members > 1:
            row["mean_pairwise_dice"] = round(float(output["pairwise_dice"].mean()), 6)
        if label is not None:
            row.update(self._scores(output, label, raters_of(item, output)))
        self._write_files(case, source, image, affine, output, label, row)
        self._fresh.append(row)
        if is_main():
            self._write_row(row)

    def _write_row(self, row: dict[str, Any]) -> None:
        """Append a row to the table; write all of it anew where its columns change or the case has a row."""
        known = self._columns or [key for earlier in self.rows.values() for key in earlier]
        columns = list(dict.fromkeys([*known, *row]))
        append = columns == self._columns and row["case"] not in self.rows
        self.rows[row["case"]] = row
        if not append:
            self._write_table(columns)
            return
        text = io.StringIO()
        csv.DictWriter(text, columns).writerow(row)
        with (self.output_dir / "cases.csv").open("ab") as file:
            file.write(text.getvalue().encode())

    def _write_table(self, columns: list[str]) -> None:
        """Write all of the table anew."""
        text = io.StringIO()
        table = csv.DictWriter(text, columns, restval="")
        table.writeheader()
        table.writerows(self.rows.values())
        write_atomically(self.output_dir / "cases.csv", text.getvalue().encode())
        self._columns = columns

    def _sizes(self, output: Mapping[str, Tensor], affine: np.ndarray) -> dict[str, float]:
        """Size of each class, and its standard deviation over the members where there are several."""
        masks, members = output["mask"], output["member_sizes"]
        dims = masks.ndim - 1
        unit = float(np.prod(nib.affines.voxel_sizes(affine)[:dims]))
        kind = "area_mm2" if dims == 2 else "volume_mm3"
        sizes = {f"{kind}_{n}": round(float(m.sum()) * unit, 3) for n, m in zip(self.regions.names, masks)}
        if len(members) > 1:
            spread = members.std(0) * masks[0].numel() * unit
            sizes.update({f"{kind}_std_{n}": round(float(s), 3) for n, s in zip(self.regions.names, spread)})
        return sizes

    def _scores(self, output: Mapping[str, Tensor], label: Tensor, raters: Tensor | None) -> dict[str, float]:
        """Scores of the mask against the label, of the probability and of the members against all raters."""
        mask, truth = output["mask"][None], label[None]
        expected = label if raters is None else raters.double().mean(0)
        scores: dict[str, Sequence[float] | Tensor] = {
            "dice": compute_dice(mask, truth, ignore_empty=False)[0],
            "iou": compute_iou(mask, truth, ignore_empty=False)[0],
            "ece": expected_calibration_error(output["prob"], expected),
        }
        row = {f"{key}_{n}": v for key, values in scores.items() for n, v in zip(self.regions.names, values)}
        if raters is not None:
            endings = [f"_{name}" for name in self.regions.names] if len(self.regions.names) > 1 else [""]
            found = rater_scores(output["member_masks"], raters, ANTITHETIC)
            row |= {f"{key}{ending}": v for key, values in found.items() for ending, v in zip(endings, values)}
        return {key: round(float(value), 6) for key, value in row.items()}

    def _write_files(
        self,
        case: str,
        source: str,
        image: MetaTensor,
        affine: np.ndarray,
        output: Mapping[str, Tensor],
        label: Tensor | None,
        row: Mapping[str, Any],
    ) -> None:
        dims = image.ndim - 1
        mask = np.asarray(output["pred"].cpu())

        def write(name: str, content: bytes) -> None:
            write_atomically(result_file(self.output_dir, case, name), content)

        if "overlay" in self.outputs:
            write("overlay.png", self._picture(case, image, affine, output, label, row))
        maps = ["prob"] if "prob" in self.outputs else []
        maps += ["uncertainty_entropy", "uncertainty_mi"] if "uncertainty" in self.outputs else []
        for name in maps:
            array = np.asarray(output[name].cpu()).astype(np.float32)
            write(f"{name}.nii.gz", nifti_bytes(array, affine, dims))
        if "members" in self.outputs:
            members = torch.cat([self.regions.label_map(masks) for masks in output["member_masks"]])
            write("members.nii.gz", nifti_bytes(np.asarray(members.cpu()), affine, dims, squeeze=False))
        if source.lower().endswith((".png", ".jpg", ".jpeg", ".bmp")):
            write("seg.png", palette_png_bytes(mask[0]))
        # the mask comes last: where it stands, the case is finished
        write("seg.nii.gz", nifti_bytes(mask, affine, dims))

    def _picture(
        self,
        case: str,
        image: MetaTensor,
        affine: np.ndarray,
        output: Mapping[str, Tensor],
        label: Tensor | None,
        row: Mapping[str, Any],
    ) -> bytes:
        dice = [f"{name} {row[f'dice_{name}']:.3f}" for name in self.regions.names if f"dice_{name}" in row]
        return overlay_bytes(
            np.asarray(image),
            np.asarray(output["pred"].cpu()),
            np.asarray(output["uncertainty_entropy"].cpu()),
            None if label is None else self.regions.label_map(torch.as_tensor(label)).cpu().numpy(),
            affine,
            self.regions.names,
            case + (f"   Dice: {', '.join(dice)}" if dice else ""),
            distinct_members(output, self.regions),
        )

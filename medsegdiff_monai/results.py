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
from PIL import Image
from torch import Tensor

from .data.datalist import case_names, segmentation_file
from .distributed import gather, is_main
from .files import write_atomically
from .metrics import expected_calibration_error
from .transforms import Regions

__all__ = ["CaseWriter", "nifti_bytes", "overlay_bytes", "read_source"]

logger = logging.getLogger(__name__)

COLOURS = np.array(
    [(0, 0, 0), (230, 75, 53), (77, 187, 213), (243, 200, 60), (0, 160, 135), (132, 100, 190), (240, 130, 180)],
    dtype=np.uint8,
)  # background, then one for each label; further labels begin again


def _colour(label: np.ndarray) -> np.ndarray:
    index = label.astype(np.int64)
    return COLOURS[np.where(index > 0, (index - 1) % (len(COLOURS) - 1) + 1, 0)]


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


def nifti_bytes(array: np.ndarray, affine: np.ndarray, spatial_dims: int) -> bytes:
    """Return a gzipped NIfTI file.

    Args:
        array: (channels, *spatial); one channel is written without a channel axis, several as the fourth axis.
        affine: (4, 4), voxel to millimetres, RAS+.
        spatial_dims: 2 or 3.
    """
    if array.shape[0] == 1:
        array = array[0]
    else:
        array = np.moveaxis(array, 0, -1)
        array = array[:, :, None] if spatial_dims == 2 else array
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=5, mtime=0)


def _png_bytes(label: np.ndarray) -> bytes:
    """Label map (x, y) as a palette PNG: the pixel values are the labels, the palette makes them visible."""
    picture = Image.fromarray(np.ascontiguousarray(label.T), mode="P")
    picture.putpalette(_colour(np.arange(256)).tobytes())
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def _slice(volume: np.ndarray, spatial_dims: int, index: int) -> np.ndarray:
    """The plane to show: the image itself in 2D, one along the third axis in 3D; channels last."""
    plane = volume if spatial_dims == 2 else volume[..., index]
    return np.moveaxis(plane, 0, -1)


def _grey(image: np.ndarray) -> np.ndarray:
    """Scale (x, y, channels) to RGB in [0, 1]: three channels as colours, else the first one as grey."""
    image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    low, high = np.percentile(image, (0.5, 99.5))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def overlay_bytes(
    image: np.ndarray,
    prediction: np.ndarray,
    uncertainty: np.ndarray,
    truth: np.ndarray | None,
    affine: np.ndarray,
    names: Sequence[str],
    title: str,
) -> bytes:
    """Return a PNG with image, ground truth (if any), prediction and uncertainty side by side.

    In 3D the slice along the third axis with the largest structure is shown.

    Args:
        image: (channels, *spatial).
        prediction: label map (1, *spatial).
        uncertainty: (1, *spatial) in [0, 1].
        truth: label map (1, *spatial), or None.
        affine: (4, 4); its voxel size sets the aspect ratio.
        names: of the labels 1, 2, ...
        title: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    dims = image.ndim - 1
    shown = prediction if truth is None else truth
    index = 0 if dims == 2 else int((shown if shown.any() else prediction)[0].sum(axis=(0, 1), dtype=float).argmax())
    zoom = nib.affines.voxel_sizes(affine)
    background = _grey(_slice(image, dims, index))

    def blend(label: np.ndarray) -> np.ndarray:
        plane = _slice(label, dims, index)[..., 0]
        return np.where(plane[..., None] > 0, 0.45 * background + 0.55 * _colour(plane) / 255, background)

    panels = [("image", background)]
    if truth is not None:
        panels.append(("ground truth", blend(truth)))
    panels += [("prediction", blend(prediction)), ("uncertainty (bits)", _slice(uncertainty, dims, index)[..., 0])]
    shape = panels[0][1].shape
    width = float(np.clip(3.2 * shape[0] * zoom[0] / (shape[1] * zoom[1]), 1.6, 4.8))
    figure = Figure(figsize=(width * len(panels) + 0.8, 4.4), layout="constrained")
    for axis, (name, panel) in zip(figure.subplots(1, len(panels)), panels):
        grey = {"cmap": "magma", "vmin": 0, "vmax": 1} if panel.ndim == 2 else {}
        drawn = axis.imshow(
            np.swapaxes(panel, 0, 1),
            # NIfTI's second axis points up (anterior), a picture's down
            origin="upper" if np.allclose(affine, np.eye(4)) or affine[1, 1] < 0 else "lower",
            aspect=zoom[1] / zoom[0],
            interpolation="nearest",
            **grey,
        )
        axis.set_title(name)
        axis.set_axis_off()
    figure.colorbar(drawn, ax=axis, shrink=0.8)
    handles = [Patch(color=tuple(_colour(np.array(i + 1)) / 255), label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(names)), frameon=False)
    figure.suptitle(title, fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


class CaseWriter:
    """Write the results of each case as soon as it is segmented.

    ``<output_dir>/<case>/<case>_seg.nii.gz``, ``_prob.nii.gz``, ``_uncertainty_entropy.nii.gz``,
    ``_uncertainty_mi.nii.gz``, ``_overlay.png``, ``_seg.png`` where the input was PNG, JPEG or BMP; and a row in
    ``<output_dir>/cases.csv``: size of each class and its standard deviation over the members, mean uncertainty, mean
    Dice over pairs of members, seconds, and Dice, IoU and expected calibration error where there is a label. Of several
    processes each writes the files of its cases; the first one writes the table, its own rows at once, all in the end.

    Args:
        output_dir: folder to write to.
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
        merge: whether the rows of cases that an earlier run has written are kept.
    """

    def __init__(
        self, output_dir: str, num_classes: int, regions: Mapping[str, Sequence[int]] | None = None, merge: bool = False
    ) -> None:
        self.output_dir = Path(output_dir)
        self.regions = Regions(num_classes, regions)
        self.merge = merge
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
        for key in dict.fromkeys(k for row in self._fresh for k in row if k.startswith(("dice_", "iou_", "ece_"))):
            values = np.array([row[key] for row in self._fresh if key in row])
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
            row.update(self._scores(output, label))
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

    def _scores(self, output: Mapping[str, Tensor], label: Tensor) -> dict[str, float]:
        """Dice and IoU of the mask, and the expected calibration error of the members' mean, for each class."""
        mask, truth = output["mask"][None], label[None]
        values = {
            "dice": compute_dice(mask, truth, ignore_empty=False),
            "iou": compute_iou(mask, truth, ignore_empty=False),
            "ece": expected_calibration_error(output["mean_prob"], label)[None],
        }
        return {f"{k}_{n}": round(float(v), 6) for k, row in values.items() for n, v in zip(self.regions.names, row[0])}

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
        folder = self.output_dir / case
        results = {k: np.asarray(output[k].cpu()) for k in ("pred", "prob", "uncertainty_entropy", "uncertainty_mi")}
        dims = image.ndim - 1
        dice = [f"{name} {row[f'dice_{name}']:.3f}" for name in self.regions.names if f"dice_{name}" in row]
        overlay = overlay_bytes(
            np.asarray(image),
            results["pred"],
            results["uncertainty_entropy"],
            None if label is None else self.regions.label_map(torch.as_tensor(label)).cpu().numpy(),
            affine,
            self.regions.names,
            case + (f"   Dice: {', '.join(dice)}" if dice else ""),
        )
        write_atomically(folder / f"{case}_overlay.png", overlay)
        for name in ("prob", "uncertainty_entropy", "uncertainty_mi"):
            array = results[name].astype(np.float32)
            write_atomically(folder / f"{case}_{name}.nii.gz", nifti_bytes(array, affine, dims))
        if source.lower().endswith((".png", ".jpg", ".jpeg", ".bmp")):
            write_atomically(folder / f"{case}_seg.png", _png_bytes(results["pred"][0]))
        # the mask comes last: where it stands, the case is finished
        write_atomically(segmentation_file(self.output_dir, case), nifti_bytes(results["pred"], affine, dims))

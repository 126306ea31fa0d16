"""Pictures of segmented cases."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

import nibabel as nib
import numpy as np
from PIL import Image
from torch import Tensor

from .panels import draw_panels

__all__ = ["error_map", "grey", "grey_window", "overlay_bytes", "palette_png_bytes"]

COLOURS = np.array(
    [(0, 0, 0), (230, 75, 53), (77, 187, 213), (243, 200, 60), (0, 160, 135), (132, 100, 190), (240, 130, 180)],
    dtype=np.uint8,
)  # background, then one for each label; further labels begin again
ERRORS = {"false positive": (255, 140, 0), "false negative": (70, 130, 255), "another class": (200, 60, 200)}
LARGEST = (528, 352)  # width and height of a panel in pixels


def _colours(values: Sequence[int] = ()) -> np.ndarray:
    """RGB colours (labels, 3) of label values, of which ``values`` have the first ones in their order."""
    index = np.arange(max(255, *values, 0) + 1)
    plain = COLOURS[np.where(index > 0, (index - 1) % (len(COLOURS) - 1) + 1, 0)]
    colours = plain.copy()
    colours[list(values)] = plain[1 : len(values) + 1]
    return colours


def palette_png_bytes(label: np.ndarray, values: Sequence[int] = ()) -> bytes:
    """Label map (x, y) as a PNG whose pixel values are the labels; a palette, which ends at 255, makes them visible.

    Args:
        label: whole numbers from 0; above 255 the PNG is one of 16 bits in grey.
        values: those that have the first colours.
    """
    if label.max(initial=0) > 255:
        picture = Image.fromarray(np.ascontiguousarray(label.T.astype(np.uint16)))
    else:
        picture = Image.fromarray(np.ascontiguousarray(label.T.astype(np.uint8)), mode="P")
        picture.putpalette(_colours(values)[:256].tobytes())
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def _slice(volume: np.ndarray, spatial_dims: int, index: int) -> np.ndarray:
    """The plane to show: the image itself in 2D, one along the third axis in 3D; channels last."""
    plane = volume if spatial_dims == 2 else volume[..., index]
    return np.moveaxis(plane, 0, -1)


def grey_window(image: np.ndarray) -> tuple[float, float]:
    """Values of an image that are shown as black and white."""
    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(high)


def grey(image: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """Scale (x, y, channels) to RGB in [0, 1]: three channels as colours, else the first one as grey.

    Args:
        image: the plane.
        window: values that are black and white, by default :func:`grey_window` of the plane.
    """
    image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    low, high = window or grey_window(image)
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def error_map(mask: Tensor, label: Tensor) -> np.ndarray:
    """Say where a mask is wrong: 1 where it has a class too many, 2 where it lacks one, 3 where it has another.

    Args:
        mask: {0, 1}, (classes, *spatial).
        label: the same, NaN where nobody has labelled: nothing is wrong there.

    Returns:
        (1, *spatial), uint8, 0 where it is right.
    """
    found, wanted, known = (np.asarray(x.cpu()) for x in (mask > 0, label > 0, ~label.isnan()))
    positive, negative = (found & ~wanted & known).any(0), (wanted & ~found & known).any(0)
    return (positive + 2 * negative)[None].astype(np.uint8)


def overlay_bytes(
    image: np.ndarray,
    prediction: np.ndarray,
    uncertainty: np.ndarray,
    truth: np.ndarray | None,
    affine: np.ndarray,
    names: Mapping[int, str],
    title: str,
    members: Iterable[tuple[str, np.ndarray]] = (),
    errors: np.ndarray | None = None,
) -> bytes:
    """Return a PNG with image, ground truth (if any), prediction, errors (if any) and uncertainty, and members below.

    In 3D the slice along the third axis with the largest structure is shown.

    Args:
        image: (channels, *spatial).
        prediction: label map (1, *spatial).
        uncertainty: (1, *spatial) in [0, 1].
        truth: label map (1, *spatial), or None.
        affine: (4, 4); its voxel size sets the aspect ratio.
        names: of the values in a label map.
        title: of the picture.
        members: what stands above each member that is shown, and its label map (1, *spatial).
        errors: see :func:`error_map`.
    """
    dims = image.ndim - 1
    shown = prediction if truth is None else truth
    index = 0 if dims == 2 else int((shown if shown.any() else prediction)[0].sum(axis=(0, 1), dtype=float).argmax())
    background = grey(_slice(image, dims, index))
    colours = _colours(list(names)) / 255
    wrong = np.array([(0, 0, 0), *ERRORS.values()]) / 255

    def blend(label: np.ndarray, colours: np.ndarray = colours) -> np.ndarray:
        plane, panel = _slice(label, dims, index)[..., 0], background.copy()
        inside = plane > 0
        panel[inside] = 0.45 * background[inside] + 0.55 * colours[plane[inside]]
        return panel

    panels = {"image": background}
    if truth is not None:
        panels["ground truth"] = blend(truth)
    panels["prediction"] = blend(prediction)
    if errors is not None:
        panels["errors"] = blend(errors, wrong)
    panels["uncertainty (bits)"] = _slice(uncertainty, dims, index)[..., 0]
    below = {name: blend(label) for name, label in members}
    rows = [panels, below] if below else [panels]
    upright = [{name: _upright(panel, affine) for name, panel in row.items()} for row in rows]
    legend = {name: colours[value] for value, name in names.items()}
    legend |= dict(zip(list(ERRORS)[: 2 + (len(names) > 1)], wrong[1:])) if errors is not None else {}
    return draw_panels(upright, _size(background, affine), legend, title)


def _upright(panel: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Rows and columns of a plane (x, y, ...); NIfTI's second axis points up (anterior), a picture's down."""
    panel = np.swapaxes(panel, 0, 1)
    return panel if np.allclose(affine, np.eye(4)) or affine[1, 1] < 0 else panel[::-1]


def _size(plane: np.ndarray, affine: np.ndarray) -> tuple[int, int]:
    """Width and height in pixels of a panel that shows a plane (x, y, 3) of the image."""
    zoom = nib.affines.voxel_sizes(affine)
    width, height = plane.shape[0] * zoom[0], plane.shape[1] * zoom[1]
    scale = min(LARGEST[0] / width, LARGEST[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))

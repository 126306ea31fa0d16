"""Pictures as a person sees them: PNG, JPEG, BMP and TIFF, upright, in grey or in colours, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import PILReader
from monai.utils import MetaKeys, ensure_tuple
from PIL import ExifTags, Image, ImageOps

from ..errors import InputError, reading
from .bounds import check_place

__all__ = [
    "PICTURES",
    "PictureReader",
    "check_picture",
    "is_turned",
    "label_values",
    "mask_values",
    "open_picture",
    "picture_values",
    "stored_values",
]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # a file's content decides which it is
MAX_PIXELS = 89_478_485  # Pillow warns above
MAX_PICTURE_LABELS = 32  # more values than these are grey levels, colours or numbers of objects
SCALED = {"L;2": 85, "L;4": 17}  # Pillow stretches grey of 2 and 4 bits to 0-255
BITS, PHOTOMETRIC, DESCRIPTION, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 270, 338, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2


def _open(path: str | Path) -> Image.Image:
    """Open a picture whose header can be trusted; its pixels are not yet read.

    Raises:
        InputError: for what would not be read as it looks.
    """
    check_place(Path(path))
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{path}: claims {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}: "
            "it may be a decompression bomb; replace it."
        )
    pages = _pages(image)
    if pages > 1:
        raise InputError(
            f"{path}: holds {pages} pages: save each as a picture of its own, or all as a volume (NIfTI, MHA)."
        )
    if re.search("(?<!BGR);1[26]", _raw_mode(image)) and not image.mode.startswith("I"):
        raise InputError(f"{path}: holds channels of 16 bits, which only grey pictures may: save it with 8 bits each.")
    _check_tiff(image, path)
    return image


def _raw_mode(image: Any) -> str:
    """How the pixels are stored."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


def _pages(image: Image.Image) -> int:
    """The number of pictures in a file; of a photograph with a preview (MPO) the first alone counts."""
    if image.format == "MPO":
        return 1
    text = str(_tags(image).get(DESCRIPTION, ""))
    stack = re.search(r"^images=(\d{1,9})", text, re.M) if text.startswith("ImageJ=") else None
    # ImageJ writes large stacks behind a single page
    return max(getattr(image, "n_frames", 1), int(stack[1]) if stack else 1)


def _check_tiff(image: Image.Image, path: str | Path) -> None:
    """Refuse what Pillow reads otherwise than the tags of a TIFF say."""
    tags = _tags(image)
    if 0 in ensure_tuple(tags.get(EXTRA_SAMPLES, ())):
        raise InputError(f"{path}: holds more channels than a picture has: save each as a file of its own.")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode not in ("1", "L"):
        raise InputError(f"{path}: shows its lowest value as white: save it with black as 0.")
    if image.mode == "L" and SIGNED in ensure_tuple(tags.get(SAMPLE_FORMAT, ())):
        raise InputError(f"{path}: holds signed numbers of 8 bits: save it with 16 bits, or from 0 to 255.")


def _upright(image: Image.Image) -> Image.Image:
    """The picture with its pixels, turned as its EXIF tag says."""
    image = ImageOps.exif_transpose(image)
    return image.convert("LA") if image.mode == "La" else image  # of which Pillow makes nothing else


def _lowest_alpha(image: Image.Image) -> int:
    """The alpha of the most transparent pixel; 255 where all are opaque."""
    if not image.has_transparency_data:
        return 255
    key = image.info.get("transparency")
    if image.mode.startswith("I"):  # of 16 bits: one value is the transparent one
        return 0 if (np.asarray(image) == key).any() else 255
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return int(lowest if isinstance(lowest, (int, float)) else lowest[0])


def _seen(image: Image.Image, path: str | Path) -> Image.Image:
    """A picture in one of the modes L, RGB, I;16, I and F, as a person sees it; colours that are all grey become grey.

    Raises:
        InputError: where parts of it are transparent.
    """
    image = _upright(image)
    if _lowest_alpha(image) < 255:
        raise InputError(f"{path}: is transparent in places: flatten it onto the background that is meant.")
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        return image
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    colours = image.convert("RGBA").convert("RGB") if image.has_transparency_data else image.convert("RGB")
    return _grey_if_equal(colours)


def _grey_if_equal(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    return image.getchannel(0) if (pixels == pixels[..., :1]).all() else image


class PictureReader(PILReader):
    """MONAI's reader of pictures, with the pixels as a person sees them: (columns, rows[, 3]).

    Args:
        channels: of the network. A grey picture is repeated where there are three; else it has one, even if it is
            stored with three that are equal. Of several files, which are channels themselves, each is left as it is.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Return the picture, or a list of several.

        Args:
            data: a file, or several.
            kwargs: of no meaning here.

        Raises:
            InputError: for a picture that is not what it seems.
        """
        images = []
        for name in ensure_tuple(data):
            image = _open(name)
            seen = _seen(image, name)
            seen.format = image.format
            images.append(seen)
        return images if len(images) > 1 else images[0]

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Return pixels and metadata of what :meth:`read` gave."""
        pixels, meta = super().get_data(img)
        if self.channels == 3 and pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
            meta[MetaKeys.ORIGINAL_CHANNEL_DIM] = -1
        return pixels, meta


def check_picture(path: str | Path) -> None:
    """Refuse, by its header alone, a picture that is too large or would not be read as it looks.

    Raises:
        InputError: for that.
    """
    with _open(path):
        pass


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture as a person sees it, pixels included, in one of the modes L, RGB, I;16, I and F.

    Raises:
        InputError: where it cannot be read, is too large or not what it seems.
    """
    with reading(path):
        return _seen(_open(path), path)


def is_turned(path: str | Path) -> bool:
    """Whether the EXIF tag of a picture turns or mirrors it; no for one that cannot be read."""
    try:
        with reading(path), _open(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except InputError:
        return False


def stored_values(path: str | Path) -> tuple[np.ndarray, str]:
    """Read the values (rows, columns[, channels]) that a picture has in its file, upright.

    Returns:
        The values, and ``lossy`` (JPEG), ``label`` (indices of a palette or single bits) or ``grey``.

    Raises:
        InputError: where it cannot be read.
    """
    with reading(path):
        image = _open(path)
        lossy = image.format in ("JPEG", "MPO")
        values = np.asarray(_upright(image))
    kind = "label" if image.mode in ("1", "P") else "grey"
    return values.astype(np.uint8) if values.dtype == bool else values, "lossy" if lossy else kind


def picture_values(path: str | Path) -> np.ndarray:
    """Read a picture as grey values (rows, columns).

    Raises:
        InputError: as :func:`open_picture`.
    """
    image = open_picture(path)
    return np.asarray(image.convert("L") if image.mode == "RGB" else image)


def mask_values(path: str | Path, alpha: bool = False) -> tuple[np.ndarray, str]:
    """Read the values (rows, columns) that a mask has in its file, and how it is stored.

    Args:
        path: picture.
        alpha: whether the alpha channel of a mask that is of one colour throughout may be read in its place.

    Returns:
        The values, and ``label`` (indices of a palette or single bits), ``alpha``, ``lossy`` (JPEG) or ``grey``.

    Raises:
        InputError: where it cannot be read, or its values are not those that a person sees.
    """
    with reading(path):
        image = _open(path)
        raw, inverted = _raw_mode(image), _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO
        lossy = image.format in ("JPEG", "MPO")
        image = _upright(image)
        if inverted:
            raise InputError(f"{path}: shows the value 0 as white (an inverting table): save the background as 0.")
        if _lowest_alpha(image) < 255:
            if not alpha:
                raise InputError(f"{path}: is transparent in places: save label values without an alpha channel.")
            return _alpha_values(image, path), "alpha"
        if image.mode == "P":
            return _palette_values(image, path)
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8), "label"
        values = np.asarray(_seen(image, path))
    if values.ndim == 3:
        raise InputError(f"{path}: holds colours: save label values, 0 for the background.")
    return values // SCALED[raw] if raw in SCALED else values, "lossy" if lossy else "grey"


def _alpha_values(image: Image.Image, path: str | Path) -> np.ndarray:
    """The alpha channel (rows, columns) of a drawing in one colour."""
    pixels = np.asarray(image.convert("RGBA"))
    seen = pixels[pixels[..., 3] > 0][:, :3]
    if len(seen) and (seen != seen[0]).any():
        raise InputError(
            f"{path}: is transparent in places and of several colours elsewhere: save label values without an alpha "
            "channel, 0 for the background."
        )
    return pixels[..., 3]


def _palette_values(image: Image.Image, path: str | Path) -> tuple[np.ndarray, str]:
    """The indices (rows, columns) of a palette picture, where its colours do not say otherwise."""
    indices = np.asarray(image)
    used = np.unique(indices)
    listed = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    colours = np.concatenate([listed, np.zeros((256 - len(listed), 3), np.uint8)])[used]
    if len(used) > MAX_PICTURE_LABELS:
        if (colours == colours[:, :1]).all():
            return np.asarray(image.convert("L")), "grey"
        raise InputError(f"{path}: holds {len(used)} colours: save label values, 0 for the background.")
    if (colours == used[:, None]).all():
        return indices, "grey"
    different = len(np.unique(colours, axis=0))
    if different == 1:  # a palette that was never set
        return indices, "label"
    if different < len(used):
        raise InputError(f"{path}: shows several of the values {used.tolist()} in one colour: save label values.")
    black = used[(colours == 0).all(1)]
    if len(black) and black[0] != 0:
        raise InputError(
            f"{path}: shows the value {black[0]} as black, as the background should be: save label values, 0 for the "
            "background."
        )
    return indices, "label"


def label_values(path: str | Path) -> np.ndarray:
    """Read a label map (rows, columns) that was saved as a picture; palette indices are label values.

    Raises:
        InputError: where it cannot be read, or its values are no labels.
    """
    values, stored = mask_values(path)
    found = np.unique(values)
    if stored == "lossy" and not set(found.tolist()) <= {0, 255}:
        raise InputError(
            f"{path}: JPEG blurs label values: save them as PNG, or let `prepare folder` make masks of 0 and 255 sharp."
        )
    if len(found) > MAX_PICTURE_LABELS:
        raise InputError(f"{path}: {too_many(len(found))}")
    return values


def too_many(count: int) -> str:
    """What is wrong with masks of so many values."""
    return (
        f"holds {count} values, which is no label map of classes: save one value for each class, even where there are "
        "several objects of it, without soft edges."
    )

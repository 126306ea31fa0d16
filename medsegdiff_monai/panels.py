"""Panels side by side, with titles, a colour bar and a legend: with Pillow, in a small part of Matplotlib's time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_panels"]

GAP, TITLE, BAR = 9, 30, 62  # pixels: between panels, above a panel, beside a map
COLUMN = 176  # the least width, for the title
COLOUR_MAP = "magma"
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def draw_panels(
    rows: Sequence[Mapping[str, np.ndarray]], size: tuple[int, int], legend: Mapping[str, Sequence[float]], title: str
) -> bytes:
    """Return a PNG of panels with their titles.

    Args:
        rows: panels by their titles: colours (rows, columns, 3) in [0, 1], or a map (rows, columns) of values in
            [0, 1], which stands last in its row and has a colour bar.
        size: width and height of each panel in pixels, to which it is enlarged.
        legend: RGB colours in [0, 1] by what they stand for.
        title: of the picture.
    """
    title, legend = _one_line(title), {_one_line(name): colour for name, colour in legend.items()}
    width, height = size
    bar = BAR if any(panel.ndim == 2 for row in rows for panel in row.values()) else 0
    column = max(width, COLUMN)
    inner = max(len(row) * (column + GAP) for row in rows) + GAP + bar
    across = max(inner, round(_font(14).getlength(title)) + 2 * GAP)
    entries = list(_placed(legend, across))
    bottom = TITLE + len(rows) * (height + TITLE + 2 * GAP)
    picture = Image.new("RGB", (across, bottom + (entries[-1][1] + TITLE if entries else 0)), WHITE)
    draw = ImageDraw.Draw(picture)
    draw.text((across // 2, TITLE // 2), title, BLACK, _font(14), "mm")
    for i, row in enumerate(rows):
        top = TITLE + i * (height + TITLE + 2 * GAP) + TITLE
        for j, (name, panel) in enumerate(row.items()):
            left = (across - inner) // 2 + GAP + j * (column + GAP) + (column - width) // 2
            draw.text((left + width // 2, top - TITLE // 2), name, BLACK, _font(17), "mm")
            picture.paste(_pixels(panel).resize(size, Image.Resampling.NEAREST), (left, top))
            if panel.ndim == 2:
                _draw_bar(picture, left + width + GAP, top, height)
    for left, top, name in entries:
        colour = tuple(round(255 * part) for part in legend[name])
        draw.rectangle((left, bottom + top + 4, left + 30, bottom + top + 16), colour)
        draw.text((left + 42, bottom + top + 10), name, BLACK, _font(14), "lm")
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=3)  # the default takes longer and saves nothing
    return out.getvalue()


def _one_line(text: str) -> str:
    """What can be drawn of a text: names of files may be no text, and Pillow takes a line at a time."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _pixels(panel: np.ndarray) -> Image.Image:
    colours = matplotlib.colormaps[COLOUR_MAP](panel)[..., :3] if panel.ndim == 2 else panel
    bounded = np.fmin(np.fmax(colours, 0), 1)  # what is no number becomes 0
    return Image.fromarray((bounded * 255).round().astype(np.uint8))


def _draw_bar(picture: Image.Image, left: int, top: int, height: int) -> None:
    """Draw the colours of values from 1 to 0 downwards."""
    draw = ImageDraw.Draw(picture)
    picture.paste(_pixels(np.linspace(1, 0, 256)[:, None]).resize((18, height)), (left, top))
    draw.rectangle((left, top, left + 18, top + height), outline=BLACK)
    for value in np.linspace(0, 1, 6):
        y = top + round((1 - value) * height)
        draw.line((left + 18, y, left + 22, y), BLACK)
        draw.text((left + 26, min(max(y, top + 7), top + height - 7)), f"{value:.1f}", BLACK, _font(13), "lm")


def _placed(legend: Mapping[str, object], across: int) -> Iterator[tuple[int, int, str]]:
    """Where the entries of a legend are, from its left and its top, in as many lines as they need."""
    widths = {name: 66 + round(_font(14).getlength(name)) for name in legend}
    lines: list[list[str]] = [[]]
    for name, width in widths.items():
        if lines[-1] and sum(widths[other] for other in lines[-1]) + width > across:
            lines.append([])
        lines[-1].append(name)
    for number, line in enumerate(lines):
        left = max(0, across - sum(widths[name] for name in line)) // 2 + GAP
        for name in line:
            yield left, number * 24, name
            left += widths[name]

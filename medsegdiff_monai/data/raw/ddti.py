"""DDTI: thyroid ultrasound with outlines of the nodules."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...errors import InputError
from ..pictures import PICTURES, open_picture, picture_values
from ..reading import NIFTI, files_below, inside, load_image, read_xml
from .layout import Case, CaseFiles, Layout, same_size

__all__ = ["find"]

LABELS = {"0": "background", "1": "nodule"}
JPEG_CUT = 127  # compression blurs the edge of a mask
MIN_POINTS = 3


def find(source: Path, rater: str = "radiologist") -> Layout:
    """Recognise the edition and list the pictures with their masks.

    Layouts: the owners' ``1.xml``, ``1_1.jpg`` in one folder (390 XML and 480 pictures now, 99 and 134 in 2015); the
    masks of 2023, ``1_1.nii``, beside those pictures; the repackaging ``1_or_data/{image,mask}/N.PNG`` (637 pairs).

    Quirks of the XML (xuao575/DDTI_preprocessing, Dezarti/nodulos_tiroideos):

    - A ``mark`` holds ``image`` and ``svg``, or several of them in a row, which are paired in order; ``svg`` is JSON, a
      list of objects, each of which is one outline; other keys are ignored.
    - An absent, empty or broken ``svg``, and an outline of fewer than three points, are passed over; a picture
      without a usable outline is left out, since it may well show a nodule.
    - Outlines have gaps (MedSegDiff issue 11): the closed polygon is filled. Points out of frame are clipped. The
      union of a picture's outlines is the mask.
    - The file's stem is the case, whatever ``number`` says; a difference is noted.
    - Pictures that no outline names, and names without picture, are left out and named.
    - Two scans may share a screen, and borders be black: pictures are kept as they are.

    Quirks of the others:

    - The masks of 2023 are int16, x first (560 x 360 x 1): transposed. Raters differ by folder: ``rater`` chooses.
    - The repackaging has masks of 0/1 or 0/255, which are cut above 0, JPEG ones above 127; its ``category.csv`` is
      forged (its own readme) and not read; patients are lost, and halves of one screen may fall into different splits.

    Args:
        source: folder of the raw download.
        rater: part of the path of the 2023 masks to take, where a picture has several.

    Returns:
        The data set.

    Raises:
        InputError: where there is nothing of DDTI's.
    """
    files = files_below(source)
    outlines = [p for p in files if p.suffix.lower() == ".xml" and re.fullmatch(r"\d+", p.stem)]
    pictures = {p.stem: p for p in files if p.suffix.lower() in PICTURES and re.fullmatch(r"\d+_\d+", p.stem)}
    masks = [p for p in files if p.name.lower().endswith(NIFTI) and re.fullmatch(r"\d+_\d+", p.name.split(".")[0])]
    if masks:
        return _from_nifti(source, pictures, masks, rater)
    if outlines:
        return _from_xml(pictures, outlines)
    return _from_pairs(source, files)


def _layout(edition: str, cases: list[Case], notes: list[str]) -> Layout:
    return Layout(edition, cases, LABELS, {"0": "US"}, None, notes)


def _from_xml(pictures: dict[str, Path], outlines: list[Path]) -> Layout:
    cases: list[Case] = []
    notes: list[str] = []
    faults: list[Case] = []
    left = dict(pictures)
    for path in outlines:
        try:
            root = read_xml(path)
            found = _outlines(root, path)
        except InputError as error:
            faults.append(Case(path.stem, path.stem, [path], partial(_refuse, error=error)))
            left = {stem: p for stem, p in left.items() if stem.split("_")[0] != path.stem}
            continue
        number = (root.findtext("number") or "").strip()
        if number and number != path.stem:
            notes.append(f"{path}: calls itself {number}; the file's name counts.")
        for index, polygons in found.items():
            stem = f"{path.stem}_{index}"
            picture = left.pop(stem, None)
            if picture is None:
                notes.append(f"{path}: names {stem}, but there is no such picture.")
            elif not polygons:
                notes.append(f"{picture}: has no usable outline and is left out.")
            else:
                convert = partial(_convert_outlines, name=stem, picture=picture, polygons=polygons)
                cases.append(Case(stem, path.stem, [picture, path], convert))
    notes += [f"{path}: no XML names it; it is left out." for path in left.values()]
    return _layout(f"DDTI, {len(outlines)} XML and {len(pictures)} pictures", cases + faults, notes)


def _refuse(files: CaseFiles, error: InputError) -> list[dict[str, str]]:
    raise error


def _outlines(root: Any, path: Path) -> dict[str, list[list[tuple[float, float]]]]:
    """Usable outlines of each picture that a file names.

    Raises:
        InputError: for a picture that is not named by a number.
    """
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for mark in root.iter("mark"):
        pictures = [(element.text or "").strip() for element in mark.findall("image")]
        for name, svg in zip(pictures, [*mark.findall("svg"), *[None] * len(pictures)]):
            inside(path.parent, f"{path.stem}_{name}")
            if not re.fullmatch(r"[0-9]{1,4}", name):
                raise InputError(f"{path}: <image>{name[:50]}</image> is not a number: correct it.")
            found.setdefault(name, []).extend(_polygons(svg.text if svg is not None else None))
    return found


def _polygons(text: str | None) -> list[list[tuple[float, float]]]:
    """Outlines in the JSON of an ``svg``; none where it cannot be used."""
    try:
        shapes = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    shapes = shapes if isinstance(shapes, list) else []
    polygons = [_points(shape.get("points")) for shape in shapes if isinstance(shape, dict)]
    return [points for points in polygons if len(points) >= MIN_POINTS]


def _points(points: Any) -> list[tuple[float, float]]:
    """The finite points of an outline."""
    result: list[tuple[float, float]] = []
    for point in points if isinstance(points, list) else []:
        x, y = (point.get("x"), point.get("y")) if isinstance(point, dict) else (None, None)
        if isinstance(x, (int, float)) and isinstance(y, (int, float)) and max(abs(x), abs(y)) < 1e6:
            result.append((x, y))
    return result


def _convert_outlines(
    files: CaseFiles, name: str, picture: Path, polygons: list[list[tuple[float, float]]]
) -> list[dict[str, str]]:
    size = open_picture(picture).size
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for points in polygons:
        draw.polygon([(min(max(x, 0), size[0] - 1), min(max(y, 0), size[1] - 1)) for x, y in points], fill=1, outline=1)
    return _write(files, name, picture, np.asarray(mask))


def _write(files: CaseFiles, name: str, picture: Path, label: np.ndarray) -> list[dict[str, str]]:
    """Write the picture, grey as ultrasound is (the owners' JPEG has three equal channels), and its mask."""
    grey = picture_values(picture)
    return [
        {"image": files.picture(grey, f"images/{name}.png"), "label": files.label_picture(label, f"labels/{name}.png")}
    ]


def _from_nifti(source: Path, pictures: dict[str, Path], masks: list[Path], rater: str) -> Layout:
    if not pictures:
        raise InputError(
            f"{source}: holds DDTI's masks of 2023 and no picture: put the pictures (1_1.jpg ...) beside them."
        )
    chosen: dict[str, list[Path]] = {}
    for mask in masks:
        chosen.setdefault(mask.name.split(".")[0], []).append(mask)
    cases, notes = [], []
    for stem, candidates in chosen.items():
        mine = [p for p in candidates if rater.lower() in str(p.relative_to(source)).lower()]
        mask = (mine or candidates)[0]
        if len(candidates) > 1 and len(mine) != 1:
            folders = ", ".join(sorted(str(p.parent.relative_to(source)) for p in candidates))
            raise InputError(
                f"{mask}: several raters outlined {stem} ({folders}): set --rater to part of one folder's name."
            )
        if stem not in pictures:
            notes.append(f"{mask}: has no picture and is left out.")
            continue
        convert = partial(_convert_nifti, name=stem, picture=pictures[stem], mask=mask)
        cases.append(Case(stem, stem.split("_")[0], [pictures[stem], mask], convert))
    notes.append(f"{len(pictures.keys() - chosen.keys())} pictures have no mask of 2023 and are left out.")
    return _layout(f"DDTI with the masks of 2023, {len(chosen)} masks", cases, notes)


def _convert_nifti(files: CaseFiles, name: str, picture: Path, mask: Path) -> list[dict[str, str]]:
    volume = load_image(mask).numpy()
    same_size(mask, volume.shape, picture, (1, *open_picture(picture).size, 1))
    return _write(files, name, picture, volume[0, :, :, 0].T > 0)


def _from_pairs(source: Path, files: list[Path]) -> Layout:
    images = {p.stem: p for p in files if p.parent.name == "image" and p.suffix.lower() in PICTURES}
    masks = {p.stem: p for p in files if p.parent.name == "mask" and p.suffix.lower() in PICTURES}
    if not images.keys() & masks.keys():
        raise InputError(
            f"{source}: holds no DDTI (1.xml and 1_1.jpg, or image/ and mask/): give the unpacked download."
        )
    cases = [
        Case(stem, stem, [path, masks[stem]], partial(_convert_pair, name=stem, picture=path, mask=masks[stem]))
        for stem, path in images.items()
        if stem in masks
    ]
    notes = [f"{path}: has no mask and is left out." for stem, path in images.items() if stem not in masks]
    notes.append("This repackaging has lost the patients: halves of one screen may fall into different splits.")
    return _layout(f"the repackaging of DDTI, {len(cases)} pairs", cases, notes)


def _convert_pair(files: CaseFiles, name: str, picture: Path, mask: Path) -> list[dict[str, str]]:
    values = picture_values(mask)
    size = open_picture(picture).size
    same_size(mask, values.shape, picture, size[::-1])
    return _write(files, name, picture, values > (JPEG_CUT if mask.suffix.lower() in (".jpg", ".jpeg") else 0))
